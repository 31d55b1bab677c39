"""Compensation: what stands for the removed neurons. Tensors in, tensors out.

The consumer computes y = W h + b. With h_P replaced by a + B h_K,

    y = (W_K + W_P B) h_K + (b + W_P a),

so the folds are W' = W_K + W_P B and b' = b + W_P a with the original W; a layer without a bias gets one.

- ``"none"``: a = 0, B = 0.
- ``"mean"``, mean-shift compensation (VBP, ICCV 2025, section 3): a = mu_P, B = 0.
- ``"ridge"``, the best linear prediction: B = C_PK (C_KK + lambda s I)^-1 and a = mu_P - B mu_K, with s the mean of the
  diagonal of C_KK, so that lambda has no unit. lambda -> infinity is the mean fold. lambda is the best of
  :data:`PENALTIES` on calibration samples that the regression does not see, infinity among them; then all samples are
  used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.planning.ridge import ridge_factor

# The relative lambdas that are tried; infinity is the mean fold.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
DEFAULT_PENALTY = 1e-2  # where nothing was held out

Prediction = tuple[Tensor, Tensor | None]
Compensation = Callable[[Moments, Tensor, Tensor, bool], Prediction]


def none(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """a = 0: the removed neurons are left out, nothing stands for them; (|P|,) float64."""
    return torch.zeros(len(pruned), dtype=torch.float64), None


def mean(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """a = mu_P; (|P|,) float64."""
    return moments.mean.cpu()[pruned], None


def ridge(moments: Moments, kept: Tensor, pruned: Tensor, predicts: bool) -> Prediction:
    """a (|P|,) and B (|P|, |K|), float64; the mean fold where nothing may be, or is worth being, predicted."""
    if not predicts:
        return mean(moments, kept, pruned, predicts)
    penalty = (
        min(PENALTIES, key=lambda p: _held_out_error(moments, kept, pruned, p)) if moments.held else DEFAULT_PENALTY
    )
    prediction = predict(moments.all_co, kept, pruned, penalty)
    mu = moments.mean.cpu()
    return mu[pruned] - prediction @ mu[kept], None if penalty == math.inf else prediction


def predict(co: CoMoments, kept: Tensor, pruned: Tensor, penalty: float) -> Tensor:
    """B = C_PK (C_KK + lambda s I)^-1, (|P|, |K|) float64; s = tr(C_KK) / |K|.

    Args:
        penalty: lambda, relative to the mean variance of the kept neurons.
    """
    if penalty == math.inf:
        return torch.zeros(len(pruned), len(kept), dtype=torch.float64)
    c = co.covariance.cpu()
    within, across = c[kept][:, kept], c[kept][:, pruned]
    return torch.cholesky_solve(across, ridge_factor(within, penalty)).T.contiguous()


def _held_out_error(moments: Moments, kept: Tensor, pruned: Tensor, penalty: float) -> float:
    """Sum over P of the squared error of predicting h_P, on the samples that were held out."""
    if moments.co is None or moments.held is None:
        return 0.0
    prediction = predict(moments.co, kept, pruned, penalty)
    c = moments.held.covariance.cpu()
    within, across, own = c[kept][:, kept], c[pruned][:, kept], c.diagonal()[pruned]
    return float((own - 2 * (prediction * across).sum(1) + ((prediction @ within) * prediction).sum(1)).sum())


COMPENSATIONS: Mapping[str, Compensation] = {"none": none, "mean": mean, "ridge": ridge}


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


def fold_columns(weight: Tensor, axis: int, kept: Tensor, pruned: Tensor, prediction: Tensor) -> Tensor:
    """W_P B at the kept columns, zero elsewhere: what the consumer's weight gains; shaped as W, float64.

    Args:
        weight, axis, pruned: as for :func:`fold`; ``kept`` are the indices K.
        prediction: B, (|P|, |K|).
    """
    moved = weight.detach().movedim(axis, -1).double()
    gain = torch.zeros_like(moved)
    gain[..., kept.to(weight.device)] = moved[..., pruned.to(weight.device)] @ prediction.to(moved)
    return gain.movedim(-1, axis)
