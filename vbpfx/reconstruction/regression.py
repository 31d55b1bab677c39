"""Weighted ridge regression of a layer's target on its input: gather sums, then solve for the weights.

For rows x (d,) and targets t (out,) with row weights w, the fit of t ~ V x + c that shrinks toward V0 is

    V = V0 + S_rx (S_xx + lambda s I)^-1,    r = t - V0 x,    c = mean(t) - V mean(x).

S are the weighted covariances, and s is the mean of the diagonal of S_xx (over the columns that may be used). For
lambda -> infinity the weights stay V0 and only the bias changes. If the bias c is fixed, S are moments of x and t - c about zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vbpfx.calibration.moments import answers_at_once, widened
from vbpfx.distributed.ranks import Ranks
from vbpfx.errors import CalibrationError
from vbpfx.graph.precision import full_float32
from vbpfx.planning.ridge import ridge_factor

_PANEL = 256


@dataclass(frozen=True)
class Normal:
    """The weighted means and covariances of x and t that a regression needs; float64.

    For a fit whose bias is fixed, the mean of x is 0, that of t is the bias, and covariances are moments about them.
    """

    mean_x: Tensor
    mean_t: Tensor
    xx: Tensor
    xt: Tensor

    def with_bias(self, bias: Tensor) -> Normal:
        """Return the same for fits whose bias is fixed, (out,)."""
        across = self.xt + torch.outer(self.mean_x, self.mean_t - bias)
        return Normal(torch.zeros_like(self.mean_x), bias, self.xx + torch.outer(self.mean_x, self.mean_x), across)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the mean of |t - V x - c|^2 without a part that is the same for every fit."""
        offset = self.mean_t - weight @ self.mean_x - bias
        return float((weight @ self.xx * weight).sum() - 2 * (weight * self.xt.T).sum() + offset.square().sum())


class Sums:
    """Weighted sums of x, t, x x^T and x t^T about fixed centres. Held-out rows have sums of their own.

    Args:
        centres: the centres of x (d,) and t (out,); by default the means of the first rows that are added.
        bias: the bias (out,) of all fits, if it is fixed.
    """

    def __init__(self, centres: Sequence[Tensor] | None = None, bias: Tensor | None = None) -> None:
        self._centres, self._bias = centres, bias
        self._sums: dict[bool, tuple[Tensor, ...]] = {}

    def add(self, x: Tensor, t: Tensor, weights: Tensor, held_out: bool = False) -> None:
        """Add rows x (n, d) and t (n, out) with weights (n,); ``held_out`` if they are held out."""
        x, t = (widened(v) for v in (x, t))
        if self._centres is None:
            self._centres = self.centres(x, t)
        parts = self._parts(x, t, weights)
        if x.dtype != torch.float64 and answers_at_once(x.device) and not _finite(parts):
            parts = self._parts(x.double(), t.double(), weights)  # squares of finite numbers may overflow float32
        if held_out in self._sums:
            parts = tuple(a.add_(b) for a, b in zip(self._sums[held_out], parts, strict=True))
        self._sums[held_out] = parts

    @full_float32()
    def _parts(self, x: Tensor, t: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over some rows as float64; they are computed in the rows' precision."""
        assert self._centres is not None
        x, t = (v - centre.to(v) for v, centre in zip((x, t), self._centres, strict=True))
        w = weights.to(x)
        wx = x * w[:, None]
        return tuple(part.double() for part in (w.sum(), wx.sum(0), w @ t, _symmetric(wx, x), wx.T @ t))

    @staticmethod
    def centres(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of rows x (n, d) and t (n, out), for use as fixed centres."""
        return widened(x).mean(0), widened(t).mean(0)

    def add_other_ranks(self, ranks: Ranks, inputs: int, outputs: int) -> None:
        """Add the sums of all other ranks. All ranks must use the same centres."""
        shapes = ((), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs))
        for held_out, there in zip((False, True), ranks.sums([k in self._sums for k in (False, True)]), strict=True):
            if there:
                own = self._sums.get(held_out) or [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
                self._sums[held_out] = tuple(ranks.sum(own))

    @cached_property
    def mean_x(self) -> Tensor:
        """The mean of x over all rows."""
        return self._normal(self._sums.values()).mean_x

    @cached_property
    def all(self) -> Normal:
        """Means and covariances of all rows."""
        return self._for_fits(self._sums.values())

    @cached_property
    def fitted(self) -> Normal | None:
        """Means and covariances of the rows that were not held out; None if there are none."""
        return self._for_fits([self._sums[False]]) if False in self._sums else None

    @cached_property
    def held_out(self) -> Normal | None:
        """Means and covariances of the rows that were held out; None if there are none."""
        return self._for_fits([self._sums[True]]) if True in self._sums else None

    def _for_fits(self, sums: Iterable[tuple[Tensor, ...]]) -> Normal:
        normal = self._normal(sums)
        return normal if self._bias is None else normal.with_bias(self._bias)

    def _normal(self, sums: Iterable[tuple[Tensor, ...]]) -> Normal:
        assert self._centres is not None
        w, x, t, xx, xt = (functools.reduce(torch.add, parts).cpu() for parts in zip(*sums, strict=True))
        x, t = x / w, t / w
        centre_x, centre_t = (centre.double().cpu() for centre in self._centres)
        return Normal(centre_x + x, centre_t + t, xx / w - torch.outer(x, x), xt / w - torch.outer(x, t))


def _finite(parts: Sequence[Tensor]) -> bool:
    """Return whether all sums are finite.

    Of x x^T only the diagonal is checked, because no entry is larger than the largest on the diagonal.
    """
    w, x, t, xx, xt = parts
    return all(bool(part.isfinite().all()) for part in (w, x, t, xx.diagonal(), xt))


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b for a product that is known to be symmetric.

    The panels on and above the diagonal are computed and mirrored, which takes little more than half of the products.
    """
    width = a.shape[1]
    product = a.new_empty(width, width)
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        product[start:stop, start:] = a[:, start:stop].T @ b[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def fit(normal: Normal, toward: Tensor, penalty: float, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return V (out, d) and c (out,), float64. V is zero at the columns that may not be used.

    Args:
        toward: V0, (out, d).
        penalty: lambda, relative to the mean of the diagonal of S_xx.
        columns: indices of the columns of x that may be used; all by default.

    Raises:
        CalibrationError: inputs or targets hold NaN or infinity.
    """
    columns = torch.arange(len(normal.xx)) if columns is None else columns
    fitted = torch.zeros(toward.shape, dtype=torch.float64)
    fitted[:, columns] = toward[:, columns].double()
    if penalty < math.inf:
        within = normal.xx[columns]
        residual = normal.xt[columns] - within @ fitted.T
        factor = ridge_factor(within[:, columns], penalty)
        if not bool(residual.isfinite().all()):
            raise CalibrationError(
                "its target outputs or its weights are not finite: activations overflow the model's dtype; run the model in a "
                "wider dtype"
            )
        fitted[:, columns] += torch.cholesky_solve(residual, factor).T
    return fitted, normal.mean_t - fitted @ normal.mean_x


def best_penalty(sums: Sums, toward: Tensor, penalties: tuple[float, ...], columns: Tensor | None = None) -> float:
    """Return the penalty whose fit has the smallest error on the held-out rows; the first penalty if there are none."""
    fitted, held_out = sums.fitted, sums.held_out
    if fitted is None or held_out is None:
        return penalties[0]
    return min(penalties, key=lambda penalty: held_out.error(*fit(fitted, toward, penalty, columns)))
