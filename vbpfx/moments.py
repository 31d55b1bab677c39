"""Streaming moments of activations.

For n samples x of d channels: count n, mean mu = sum(x) / n and the centred second moment
M2 = sum((x - mu)^2), per channel. Two sets merge pairwise (Chan, Golub and LeVeque 1979):

    delta = mu_b - mu_a
    mu    = mu_a + delta n_b / n
    M2    = M2_a + M2_b + delta^2 n_a n_b / n

which never subtracts two large sums as E[x^2] - E[x]^2 does. Totals are float64. :class:`CoMoments` are the same with the
full matrix sum((x - mu)(x - mu)^T) in place of M2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError

# Rows are widened to float64 a piece at a time: 2 MiB stay in the cache, and no copy of the activation is made.
_ELEMENTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class CoMoments:
    """Number of rows n, mean (d,) and centred second moment (d, d) of one channel axis; float64.

    The products are taken in the rows' own precision (float32 for the half ones) after their mean is subtracted: an error
    of that precision relative to the variance, never to the mean.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> CoMoments:
        """Co-moments of ``rows`` (n, d), n >= 1."""
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        mean = wide.mean(0, dtype=torch.float64)
        centred = wide - mean.to(wide.dtype)
        left = centred.mean(0, dtype=torch.float64)  # what rounding the mean to the rows' precision left of it
        m2 = (centred.T @ centred).double() - len(rows) * torch.outer(left, left)
        return cls(len(rows), mean.to(wide.dtype).double() + left, m2)

    def __or__(self, other: CoMoments) -> CoMoments:
        """The co-moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return CoMoments(
            count,
            self.mean + delta * (other.count / count),
            (self.m2 + other.m2).addr_(delta, delta, alpha=self.count * other.count / count),
        )

    @property
    def covariance(self) -> Tensor:
        """Sample covariance C = M2 / (n - 1), (d, d)."""
        return self.m2 / max(1, self.count - 1)


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and centred second moment (d,) of one channel axis; float64.

    Attributes:
        co: co-moments of a share of the rows; None where none were asked for.
        held: those of the rows of other samples, for choosing what ``co`` should not choose alone.
    """

    count: int
    mean: Tensor
    m2: Tensor
    co: CoMoments | None = None
    held: CoMoments | None = None

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
            self.co | other.co if self.co and other.co else self.co or other.co,
            self.held | other.held if self.held and other.held else self.held or other.held,
        )

    @property
    def variance(self) -> Tensor:
        """Sample variance M2 / (n - 1), (d,); zero where only one sample was seen."""
        return self.m2 / max(1, self.count - 1)

    @property
    def all_co(self) -> CoMoments:
        """The co-moments of all rows that they were gathered from.

        Raises:
            CalibrationError: none were gathered.
        """
        if self.co is None and self.held is None:
            raise CalibrationError(
                "these statistics hold variances alone, and the method needs covariances: gather them with "
                "prepare(..., covariance=True)"
            )
        return self.co | self.held if self.co and self.held else (self.co or self.held)  # type: ignore[return-value]
