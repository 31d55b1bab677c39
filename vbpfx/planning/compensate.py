"""Compensation: compute what replaces the removed neurons. These functions take tensors and return tensors.

The consumer computes y = W h + b. If the removed neurons h_P are replaced by a + B h_K, a function of the kept ones,
then

    y = (W_K + W_P B) h_K + (b + W_P a).

So the replacement is folded into the consumer: W' = W_K + W_P B and b' = b + W_P a, with the original W. A layer
without a bias gets one.

- ``"none"``: a = 0, B = 0.
- ``"mean"``, mean-shift compensation (VBP, ICCV 2025, section 3): a = mu_P, B = 0.
- ``"ridge"``, the best linear prediction: B = C_PK (C_KK + lambda s I)^-1 and a = mu_P - B mu_K. s is the mean of the
  diagonal of C_KK, so that lambda has no unit. For lambda -> infinity this is ``"mean"``. lambda is chosen from
  :data:`PENALTIES`, infinity among them, on calibration samples that the regression does not see. The final regression
  uses all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.planning.ridge import ridge_factor

# The relative lambdas that are tried; infinity is the same as "mean".
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
DEFAULT_PENALTY = 1e-2  # used when no samples were held out

Prediction = tuple[Tensor, Tensor | None]
Compensation = Callable[[Moments, Tensor, Tensor, bool], Prediction]


def none(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """Return a = 0, (|P|,) float64, and no B: nothing replaces the removed neurons."""
    return torch.zeros(len(pruned), dtype=torch.float64), None


def mean(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """Return a = mu_P, (|P|,) float64, and no B."""
    return moments.mean.cpu()[pruned], None


def ridge(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """Return a (|P|,) and B (|P|, |K|), float64; as :func:`mean` where prediction is not possible or does not help."""
    if not predicts:
        return mean(moments, kept, pruned, predicts)
    penalty = (
        min(PENALTIES, key=lambda p: _held_out_error(moments, kept, pruned, p)) if moments.held_out else DEFAULT_PENALTY
    )
    prediction = predict(moments.all_co, kept, pruned, penalty)
    mu = moments.mean.cpu()
    return mu[pruned] - prediction @ mu[kept], None if penalty == math.inf else prediction


def predict(co: CoMoments, kept: Tensor, pruned: Tensor, penalty: float) -> Tensor:
    """Return B = C_PK (C_KK + lambda s I)^-1, (|P|, |K|) float64, with s = tr(C_KK) / |K|.

    Args:
        penalty: lambda, relative to the mean variance of the kept neurons.
    """
    if penalty == math.inf:
        return torch.zeros(len(pruned), len(kept), dtype=torch.float64)
    c = co.covariance.cpu()
    within, across = c[kept][:, kept], c[kept][:, pruned]
    return torch.cholesky_solve(across, ridge_factor(within, penalty)).T.contiguous()


def _held_out_error(moments: Moments, kept: Tensor, pruned: Tensor, penalty: float) -> float:
    """Return the squared error of predicting h_P, summed over P, on the held-out samples."""
    if moments.co is None or moments.held_out is None:
        return 0.0
    prediction = predict(moments.co, kept, pruned, penalty)
    c = moments.held_out.covariance.cpu()
    within, across, own = c[kept][:, kept], c[pruned][:, kept], c.diagonal()[pruned]
    return float((own - 2 * (prediction * across).sum(1) + ((prediction @ within) * prediction).sum(1)).sum())


def about_zero(moments: Moments) -> Moments:
    """Return moments about zero, with a mean of zero: what is predicted from them runs through the origin, so that a = 0."""
    co, held_out = (
        None
        if c is None
        else CoMoments(c.count, torch.zeros_like(c.mean), c.m2 + c.count * torch.outer(c.mean, c.mean))
        for c in (moments.co, moments.held_out)
    )
    mean = moments.mean
    return Moments(moments.count, torch.zeros_like(mean), moments.m2 + moments.count * mean.square(), co, held_out)


COMPENSATIONS: Mapping[str, Compensation] = {"none": none, "mean": mean, "ridge": ridge}


def fold(weight: Tensor, axis: int, pruned: Tensor, constants: Tensor, groups: int = 1) -> Tensor:
    """Return W_P a, which is added to the consumer's bias; (out,) float64.

    Args:
        weight: W. The other one of its first two axes is the output axis. Further axes are a convolution's window: a
            constant input is summed over it.
        axis: the axis of W that is contracted.
        pruned: indices P along ``axis``.
        constants: a, (|P|,).
        groups: for a grouped convolution's weight (out, in / groups, ...) the number of groups. P counts the channels of all
            groups one behind the other, and the rows of a group read that group's channels alone.
    """
    shift = fold_taps(weight, axis, pruned, constants, groups)
    return shift.flatten(1).sum(1) if shift.ndim > 1 else shift


def fold_taps(weight: Tensor, axis: int, pruned: Tensor, constants: Tensor, groups: int = 1) -> Tensor:
    """Return W_P a for every entry of a convolution's window by itself; (out, ...) float64. Arguments as for :func:`fold`."""
    if groups > 1:
        parts = zip(weight.chunk(groups, 0), _by_group(pruned, groups, weight.shape[axis]), strict=True)
        return torch.cat([fold_taps(rows, axis, own, constants[which]) for rows, (which, own) in parts])
    columns = weight.detach().movedim(axis, -1).index_select(-1, pruned.to(weight.device)).double()
    return columns @ constants.to(columns)


def fold_columns(
    weight: Tensor, axis: int, kept: Tensor, pruned: Tensor, prediction: Tensor, groups: int = 1
) -> Tensor:
    """Return what is added to the consumer's weight: W_P B at the kept columns, zero elsewhere; shaped as W, float64.

    Args:
        weight, axis, pruned, groups: as for :func:`fold`.
        kept: indices K along ``axis``.
        prediction: B, (|P|, |K|). With groups, it must be 0 between different groups.
    """
    if groups > 1:
        stays, goes = (_by_group(channels, groups, weight.shape[axis]) for channels in (kept, pruned))
        return torch.cat(
            [
                fold_columns(rows, axis, own_kept, own_pruned, prediction[which_pruned][:, which_kept])
                for rows, (which_kept, own_kept), (which_pruned, own_pruned) in zip(
                    weight.chunk(groups, 0), stays, goes, strict=True
                )
            ]
        )
    moved = weight.detach().movedim(axis, -1).double()
    gain = torch.zeros_like(moved)
    gain[..., kept.to(weight.device)] = moved[..., pruned.to(weight.device)] @ prediction.to(moved)
    return gain.movedim(-1, axis)


def _by_group(channels: Tensor, groups: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return, for every group of ``size`` channels, the indices of its entries, and the entries counted within the group."""
    found = [(channels // size == group).nonzero().flatten() for group in range(groups)]
    return [(which, channels[which] - group * size) for group, which in enumerate(found)]
