"""The precision of products, whatever the process allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vbpfx.graph.whole_process import shared_by_threads


@shared_by_threads
@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32, as long as this lasts.

    GPUs round the factors of convolutions to TF32's 11 bits unless they are told otherwise, those of matrix products where
    ``torch.set_float32_matmul_precision`` allows it, and some processors to bfloat16's 8. That is as good as the network needs,
    but neither for comparing two networks to 1e-4 nor for a covariance that is inverted.
    """
    backends: Any = torch.backends  # which makes these as they are asked for
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    settings = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
