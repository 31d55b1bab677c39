"""Backward elimination of regressors: the optimal brain surgeon on a linear layer.

The layer computes y = W h, (out,). Suppose that some neurons are removed and the layer is fitted again on the others,
K, with weights V. Removing one more neuron j adds

    |v_j|^2 / [A^-1]_jj,    A = C_KK + lambda I,

to the squared error of y, where v_j is column j of V. The new fit is V - v_j [A^-1]_j: / [A^-1]_jj, where [A^-1]_j: is
row j (Hassibi and Stork 1993, applied to a layer's regression).

A convolution reads T entries of every channel, so a neuron is a group of T columns that go together. Then v_j is (out, T), [A^-1]_jj
is (T, T), and removing j adds tr(v_j [A^-1]_jj^-1 v_j^T).

A^-1 and V both change by a matrix of rank T. Applying these changes one by one would move d^2 numbers through memory
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
    group: int = 1,
    first: int | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove neurons one by one, each time the one that costs least.

    Args:
        inputs: for every consumer input the covariance C (d T, d T) and the weight W (out, d T) that reads it.
        remove: the number of neurons to remove; all but one by default.
        among: indices of the neurons that may be removed; all by default.
        penalty: lambda, relative to the mean variance.
        block: the number of removed columns after which the factors are applied. Every number gives the same result.
        group: T, the number of successive columns that belong to one neuron.
        first: the neuron to remove first, whatever it costs; it counts as one of those to remove.
        shares: for every neuron of ``among`` the number of its share. Equally many neurons are removed from each share.

    Raises:
        CalibrationError: a covariance or a weight holds NaN or infinity, so that costs cannot be computed.

    Returns:
        The indices of the removed neurons in the order of removal, int64, and their costs in the same order, float64.
    """
    if not all(bool(weight.isfinite().all()) for _, weight in inputs):
        raise CalibrationError("weights that read its neurons hold NaN or infinity; load or train them again")
    eliminations = [_Elimination(covariance, weight, penalty, block, group) for covariance, weight in inputs]
    width = len(inputs[0][0]) // group
    open_ = torch.ones(width, dtype=torch.bool) if among is None else torch.zeros(width, dtype=torch.bool)
    if among is not None:
        open_[among] = True
    share = torch.full((width,), -1)
    if among is not None and shares is not None:
        share[among] = shares
    left = torch.arange(width)  # the neurons whose rows and columns are still there
    order: list[int] = []
    costs: list[float] = []
    there = torch.ones(width, dtype=torch.bool)
    steps = width - 1 if remove is None else remove
    each = 0 if shares is None else (steps - (first is not None)) // len(set(shares.tolist()))
    for _ in range(steps):
        cost = torch.stack([elimination.costs() for elimination in eliminations]).sum(0)
        cheapest = int(cost.masked_fill(~open_[left], torch.inf).argmin())
        chosen = cheapest if first is None or order else first
        neuron = int(left[chosen])
        order.append(neuron)
        costs.append(max(0.0, float(cost[chosen])))
        open_[neuron] = there[neuron] = False
        if shares is not None and int((share[order] == share[neuron]).sum()) == each:
            open_[share == share[neuron]] = False
        applied = [elimination.remove(chosen) for elimination in eliminations]
        if all(applied) and len(left) - int(there.sum()) >= len(left) / _DROPPED_SHARE:
            (still,) = there[left].nonzero(as_tuple=True)
            left = left[still]
            for elimination in eliminations:
                elimination.keep(still)
    return torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)


class _Elimination:
    """A^-1 and V for one consumer input. The last few removals are not applied to them yet, but kept as factors.

    With [A^-1]_jj = L L^T, removing j means A^-1 -= x^T x and V -= u x, where x = L^-1 [A^-1]_j: and u = v_j L^-T.
    """

    def __init__(self, covariance: Tensor, weight: Tensor, penalty: float, block: int, group: int) -> None:
        self.inverse, self.fit = ridge_inverse(covariance, penalty), weight.double().clone()
        self.group, rows = group, max(group, block - block % group)
        self.x = torch.empty(rows, self.inverse.shape[0], dtype=torch.float64)
        self.u = torch.empty(rows, self.fit.shape[0], dtype=torch.float64)
        self.pending = 0
        self._compute()

    def _compute(self) -> None:
        """Compute the blocks (d, T, T) of A^-1 and of V^T V that belong to one neuron each."""
        t, n = self.group, len(self.inverse) // self.group
        self.own = self.inverse.reshape(n, t, n, t).diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()
        columns = self.fit.T.reshape(n, t, -1)
        self.squares = columns @ columns.mT

    def costs(self) -> Tensor:
        """Return tr(v_j [A^-1]_jj^-1 v_j^T) for every neuron; the values of removed neurons have no meaning."""
        if self.group == 1:
            return (self.squares / self.own).flatten()
        factor, _ = torch.linalg.cholesky_ex(self.own)
        solved: Tensor = torch.cholesky_solve(self.squares, factor)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, j: int) -> bool:
        """Remove neuron j. Return whether all factors are applied, so that none is waiting."""
        t, x, u = self.group, self.x[: self.pending], self.u[: self.pending]
        at = slice(j * t, (j + 1) * t)
        factor = torch.linalg.cholesky(self.own[j])
        rows = torch.linalg.solve_triangular(factor, self.inverse[at] - x[:, at].T @ x, upper=False)
        v = torch.linalg.solve_triangular(factor, (self.fit[:, at] - u.T @ x[:, at]).T, upper=False).T
        across = v.T @ self.fit - (v.T @ u.T) @ x  # v^T V before this removal
        self.own -= self._products(rows, rows)
        both = self._products(rows, (v.T @ v) @ rows / 2 - across)
        self.squares += both + both.mT
        self.x[self.pending : self.pending + t], self.u[self.pending : self.pending + t] = rows, v.T
        self.pending += t
        if self.pending == len(self.x):
            self.inverse.addmm_(self.x.T, self.x, alpha=-1)
            self.fit.addmm_(self.u.T, self.x, alpha=-1)
            self._compute()  # anew, to drop the rounding errors that their updates have accumulated
            self.pending = 0
        return self.pending == 0

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a_j^T b_j (d, T, T) for the columns a_j and b_j (T, T) of every neuron."""
        stacks = (matrix.reshape(self.group, -1, self.group) for matrix in (a, b))
        return torch.stack([x[:, :, None] * y[:, None, :] for x, y in zip(*stacks, strict=True)]).sum(0)

    def keep(self, still: Tensor) -> None:
        """Keep only these neurons; no factor may be waiting."""
        columns = (still[:, None] * self.group + torch.arange(self.group)).flatten()
        self.inverse = self.inverse[columns][:, columns]
        self.fit, self.own, self.squares = self.fit[:, columns], self.own[still], self.squares[still]
        self.x = torch.empty(len(self.x), len(columns), dtype=torch.float64)
