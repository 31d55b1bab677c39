"""Backward elimination of regressors: the optimal brain surgeon on a linear layer.

The layer computes y = W h, (out,). With some neurons gone and the others, K, fitted again, removing one more neuron j adds

    |v_j|^2 / [A^-1]_jj,    A = C_KK + lambda I,

to the squared error of y, with v_j the column of the present fit, and moves the fit by V -= v_j [A^-1]_j: / [A^-1]_jj (Hassibi and Stork 1993,
applied to a layer's regression). Both A^-1 and V change by a matrix of rank one. Applying those one by one moves d^2
numbers through memory for each neuron; here they are kept as factors and applied in blocks by one matrix product, which
gives the same numbers. What belongs to neurons that are gone is dropped as soon as it is a share worth a copy of the rest, so
that most products are of narrower matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError
from vbpfx.planning.ridge import ridge_factor

# lambda, relative to the mean variance
PENALTY = 1e-3
_BLOCK = 64
# Rows and columns of removed neurons are dropped when they are one of so many.
_DROPPED_SHARE = 8


def ridge_inverse(covariance: Tensor, penalty: float = PENALTY) -> Tensor:
    """(C + lambda s I)^-1, (d, d) float64, with s the mean of the diagonal of C."""
    return torch.cholesky_inverse(ridge_factor(covariance, penalty))


def elimination_costs(
    inputs: Sequence[tuple[Tensor, Tensor]],
    remove: int | None = None,
    among: Tensor | None = None,
    penalty: float = PENALTY,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """The order in which neurons go, each time the one whose going costs least, and what each costs.

    Args:
        inputs: per consumer input the covariance C (d, d) and the weight W (out, d) that reads it.
        remove: how many go; all but one by default.
        among: indices of those that may go; all by default.
        penalty: lambda, relative to the mean variance.
        block: after how many neurons the factors are applied. Any number gives the same result.

    Raises:
        CalibrationError: a covariance or a weight holds NaN or infinity: nothing could be told from it.

    Returns:
        The indices of those that go, in order, int64, and the costs in that order, float64.
    """
    if not all(bool(weight.isfinite().all()) for _, weight in inputs):
        raise CalibrationError("the weights that read its neurons hold NaN or infinity; mend them, or leave it out")
    eliminations = [_Elimination(covariance, weight, penalty, block) for covariance, weight in inputs]
    width = len(inputs[0][0])
    open_ = torch.ones(width, dtype=torch.bool) if among is None else torch.zeros(width, dtype=torch.bool)
    if among is not None:
        open_[among] = True
    left = torch.arange(width)  # the neurons whose rows and columns are still there
    order: list[int] = []
    costs: list[float] = []
    there = torch.ones(width, dtype=torch.bool)
    for _ in range(width - 1 if remove is None else remove):
        cost = torch.stack([elimination.costs() for elimination in eliminations]).sum(0)
        cost[~open_[left]] = torch.inf
        chosen = int(cost.argmin())
        neuron = int(left[chosen])
        order.append(neuron)
        costs.append(max(0.0, float(cost[chosen])))
        open_[neuron] = there[neuron] = False
        applied = [elimination.remove(chosen) for elimination in eliminations]
        if all(applied) and len(left) - int(there.sum()) >= len(left) / _DROPPED_SHARE:
            (still,) = there[left].nonzero(as_tuple=True)
            left = left[still]
            for elimination in eliminations:
                elimination.keep(still)
    return torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)


class _Elimination:
    """One consumer input: A^-1 and V, up to date but for the last few removals, which are kept as factors.

    A removal of j with p = [A^-1]_jj makes A^-1 -= x x^T and V -= u x^T, x = [A^-1]_:j / sqrt(p), u = v_j / sqrt(p).
    """

    def __init__(self, covariance: Tensor, weight: Tensor, penalty: float, block: int) -> None:
        self.inverse, self.fit = ridge_inverse(covariance, penalty), weight.double().clone()
        self.diagonal = self.inverse.diagonal().clone()
        self.norms = self.fit.square().sum(0)
        self.x = torch.empty(block, self.inverse.shape[0], dtype=torch.float64)
        self.u = torch.empty(block, self.fit.shape[0], dtype=torch.float64)
        self.pending = 0

    def costs(self) -> Tensor:
        """|v_j|^2 / [A^-1]_jj for every neuron; meaningless for those that are gone."""
        return self.norms / self.diagonal.clamp_min(1e-300)

    def remove(self, j: int) -> bool:
        """Take neuron j out; whether no factor is waiting to be applied now."""
        x, u = self.x[: self.pending], self.u[: self.pending]
        root = self.diagonal[j].sqrt()
        column = (self.inverse[j] - x[:, j] @ x) / root
        v = (self.fit[:, j] - u.T @ x[:, j]) / root
        across = v @ self.fit - (u @ v) @ x  # v^T V before this removal
        self.diagonal -= column.square()
        self.norms += column * (column * v.square().sum() - 2 * across)
        self.x[self.pending], self.u[self.pending] = column, v
        self.pending += 1
        if self.pending == len(self.x):
            self.inverse.addmm_(self.x.T, self.x, alpha=-1)
            self.fit.addmm_(self.u.T, self.x, alpha=-1)
            # what the sums have gathered of rounding is dropped
            self.diagonal, self.norms = self.inverse.diagonal().clone(), self.fit.square().sum(0)
            self.pending = 0
        return self.pending == 0

    def keep(self, still: Tensor) -> None:
        """Drop all rows and columns but these; no factor may be waiting."""
        self.inverse = self.inverse[still][:, still]
        self.fit, self.diagonal, self.norms = self.fit[:, still], self.diagonal[still], self.norms[still]
        self.x = torch.empty(len(self.x), len(still), dtype=torch.float64)
