"""Backward elimination of regressors: the optimal brain surgeon on a linear layer.

The layer computes y = W h, (out,). Suppose that some neurons are removed and the layer is fitted again on the others,
K, with weights V. Removing one more neuron j adds

    |v_j|^2 / [A^-1]_jj,    A = C_KK + lambda I,

to the squared error of y, where v_j is column j of V. The new fit is V - v_j [A^-1]_j: / [A^-1]_jj, where [A^-1]_j: is
row j (Hassibi and Stork 1993, applied to a layer's regression).

A^-1 and V both change by a matrix of rank one. Applying these changes one by one would move d^2 numbers through memory
for every neuron. Here they are collected as factors and applied in blocks by one matrix product, which gives the same
numbers. Rows and columns of removed neurons are dropped once there are enough of them to be worth a copy of the rest,
so that most products are of smaller matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError
from vbpfx.planning.ridge import ridge_factor

# lambda, relative to the mean variance
PENALTY = 1e-3
# After this many removals the collected factors are applied.
_BLOCK = 64
# Rows and columns of removed neurons are dropped when they are at least one in this many.
_DROPPED_SHARE = 8


def ridge_inverse(covariance: Tensor, penalty: float = PENALTY) -> Tensor:
    """Return (C + lambda s I)^-1, (d, d) float64, with s the mean of the diagonal of C."""
    return torch.cholesky_inverse(ridge_factor(covariance, penalty))


def elimination_costs(
    inputs: Sequence[tuple[Tensor, Tensor]],
    remove: int | None = None,
    among: Tensor | None = None,
    penalty: float = PENALTY,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Remove neurons one by one, each time the one that costs least.

    Args:
        inputs: for every consumer input the covariance C (d, d) and the weight W (out, d) that reads it.
        remove: the number of neurons to remove; all but one by default.
        among: indices of the neurons that may be removed; all by default.
        penalty: lambda, relative to the mean variance.
        block: the number of removals after which the factors are applied. Every number gives the same result.

    Raises:
        CalibrationError: a covariance or a weight holds NaN or infinity, so that costs cannot be computed.

    Returns:
        The indices of the removed neurons in the order of removal, int64, and their costs in the same order, float64.
    """
    if not all(bool(weight.isfinite().all()) for _, weight in inputs):
        raise CalibrationError("weights that read its neurons hold NaN or infinity; load or train them again")
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
    """A^-1 and V for one consumer input. The last few removals are not applied to them yet, but kept as factors.

    With p = [A^-1]_jj, removing j means A^-1 -= x x^T and V -= u x^T, where x = [A^-1]_:j / sqrt(p) and
    u = v_j / sqrt(p).
    """

    def __init__(self, covariance: Tensor, weight: Tensor, penalty: float, block: int) -> None:
        self.inverse, self.fit = ridge_inverse(covariance, penalty), weight.double().clone()
        self.diagonal = self.inverse.diagonal().clone()
        self.norms = self.fit.square().sum(0)
        self.x = torch.empty(block, self.inverse.shape[0], dtype=torch.float64)
        self.u = torch.empty(block, self.fit.shape[0], dtype=torch.float64)
        self.pending = 0

    def costs(self) -> Tensor:
        """Return |v_j|^2 / [A^-1]_jj for every neuron; the values of removed neurons have no meaning."""
        return self.norms / self.diagonal.clamp_min(1e-300)

    def remove(self, j: int) -> bool:
        """Remove neuron j. Return whether all factors are applied, so that none is waiting."""
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
            # compute these anew, to drop the rounding errors that their updates have accumulated
            self.diagonal, self.norms = self.inverse.diagonal().clone(), self.fit.square().sum(0)
            self.pending = 0
        return self.pending == 0

    def keep(self, still: Tensor) -> None:
        """Keep only these rows and columns; no factor may be waiting."""
        self.inverse = self.inverse[still][:, still]
        self.fit, self.diagonal, self.norms = self.fit[:, still], self.diagonal[still], self.norms[still]
        self.x = torch.empty(len(self.x), len(still), dtype=torch.float64)
