"""Compensation: what stands for the removed neurons. Tensors in, tensors out.

The consumer computes y = W h + b. With h_P replaced by constants a,

    y = W_K h_K + (b + W_P a),

so the fold is b' = b + W_P a with the original W; a layer without a bias gets one. Mean-shift
compensation (VBP, ICCV 2025, section 3) is a = mu_P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vbpfx.moments import Moments


def mean(moments: Moments, pruned: Tensor) -> Tensor:
    """a = mu_P; (|P|,) float64."""
    return moments.mean.cpu()[pruned]


def none(moments: Moments, pruned: Tensor) -> Tensor:
    """a = 0: the removed neurons are left out, nothing stands for them; (|P|,) float64."""
    return torch.zeros(len(pruned), dtype=torch.float64)


COMPENSATIONS: Mapping[str, Callable[[Moments, Tensor], Tensor]] = {"mean": mean, "none": none}


def fold(weight: Tensor, axis: int, pruned: Tensor, constants: Tensor) -> Tensor:
    """W_P a, what the consumer's bias gains; (out,) float64.

    Args:
        weight: W; ``axis`` is the axis that is contracted, the other leading axis is the output, further
            axes are the window of a convolution, over which a constant input sums up.
        pruned: indices P along ``axis``.
        constants: a, (|P|,).
    """
    columns = weight.detach().movedim(axis, -1).index_select(-1, pruned.to(weight.device)).double()
    shift = columns @ constants.to(columns)
    return shift.flatten(1).sum(1) if shift.ndim > 1 else shift
