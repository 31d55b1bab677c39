"""Compute float32 products in full float32, whatever lower precision the process allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vbpfx.display.whole_process import shared_by_threads


@shared_by_threads
@contextmanager
def full_float32() -> Iterator[None]:
    """A context in which float32 products and convolutions are computed in full float32.

    GPUs round the factors of convolutions to TF32's 11 bits by default, and those of matrix products if
    ``torch.set_float32_matmul_precision`` allows it. Some processors round to bfloat16's 8 bits. That is good enough
    for the network itself, but not for comparing two networks to 1e-4, and not for a covariance that is inverted.
    """
    backends: Any = torch.backends  # torch creates these attributes on access, which type checkers do not see
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
