"""Streaming moments of activations.

For n samples x of d channels: count n, mean mu = sum(x) / n and the centred second moment
M2 = sum((x - mu)^2), per channel. Two sets merge pairwise (Chan, Golub and LeVeque 1979):

    delta = mu_b - mu_a
    mu    = mu_a + delta n_b / n
    M2    = M2_a + M2_b + delta^2 n_a n_b / n

which never subtracts two large sums as E[x^2] - E[x]^2 does. Totals are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are widened to float64 a piece at a time: 2 MiB stay in the cache, and no copy of the activation is made.
_ELEMENTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and centred second moment (d,) of one channel axis; float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Moments of ``rows`` (n, d), any float dtype, n >= 1."""
        step = max(1, _ELEMENTS_AT_ONCE // max(1, rows.shape[1]))
        total: Moments | None = None
        for piece in torch.split(rows, step):
            wide = piece.double()
            mean = wide.mean(0)
            part = cls(wide.shape[0], mean, (wide - mean).square().sum(0))
            total = part if total is None else total | part
        assert total is not None
        return total

    def __or__(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """Sample variance M2 / (n - 1), (d,); zero where only one sample was seen."""
        return self.m2 / max(1, self.count - 1)
