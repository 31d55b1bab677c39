"""Streaming moments of activations.

For n samples x of d channels: count n, mean mu = sum(x) / n and the centred second moment
M2 = sum((x - mu)^2), per channel. Two sets merge pairwise (Chan, Golub and LeVeque 1979):

    delta = mu_b - mu_a
    mu    = mu_a + delta n_b / n
    M2    = M2_a + M2_b + delta^2 n_a n_b / n

which never subtracts two large sums as E[x^2] - E[x]^2 does. Totals are float64. A batch is read once, in pieces that stay
in the cache and in the activations' own precision: a piece less one of its batch's samples loses no digits to a large mean
(Chan, Golub and LeVeque 1983, shifted data), and what rounding is left is of that precision relative to the variance.
:class:`CoMoments` are the same with the full matrix sum((x - mu)(x - mu)^T) in place of M2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError
from vbpfx.graph.precision import full_float32

_HALF = (torch.float16, torch.bfloat16)
# A piece of 2 MiB stays in the cache, and is long enough that calling the operators costs nothing beside it. Rows are added
# up one after another: a piece of few channels ends before its roundings add up.
_ELEMENTS_AT_ONCE, _ROWS_AT_ONCE = 1 << 19, 1 << 12
# Elsewhere every operator is a launch, and sums are trees of partial ones: pieces only bound the memory for the shifted copy.
_ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 26


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
        wide = widened(rows)
        mean = wide.mean(0, dtype=torch.float64)
        centred = wide - mean.to(wide.dtype)
        left = centred.mean(0, dtype=torch.float64)  # what rounding the mean to the rows' precision left of it
        with full_float32():
            product = centred.T @ centred
        m2 = product.double().addr_(left, left, alpha=-len(rows))
        # no entry of it is larger than those of its diagonal, which is all that needs looking at
        if wide.dtype != torch.float64 and answers_at_once(wide.device) and not bool(m2.diagonal().isfinite().all()):
            return cls.of(wide.double())  # squares of what is finite may leave float32
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
    def of(cls, values: Tensor, axis: int = -1) -> Moments:
        """Moments of every channel of ``axis`` over all other axes; any float dtype, at least one value a channel."""
        values = _samples_of_channels(values, axis)
        shift = widened(values[:1] if values.ndim == 2 else values[:1, :, :1])
        on_cpu = values.device.type == "cpu"
        step = max(1, (_ELEMENTS_AT_ONCE if on_cpu else _ELEMENTS_AT_ONCE_ELSEWHERE) // values[0].numel())
        step = min(step, _ROWS_AT_ONCE if on_cpu else len(values))
        piece = torch.empty_like(values[:step], dtype=shift.dtype, memory_format=torch.contiguous_format)
        means, variances = [], []
        for part in torch.split(values, step):
            shifted = torch.sub(part, shift, out=piece[: len(part)])
            variance, mean = _var_mean(shifted)
            means.append(mean)
            variances.append(variance)
        each, count = values[0, 0].numel(), values[:, 0].numel()
        n = torch.full((len(means), 1), each * step, dtype=torch.float64, device=values.device)
        n[-1] = each * (len(values) - step * (len(means) - 1))
        local = torch.stack(means).double()
        mean = (local * n).sum(0) / count
        m2 = (torch.stack(variances).double() * n).sum(0) + ((local - mean).square() * n).sum(0)
        if values.dtype != torch.float64 and answers_at_once(values.device) and not bool(m2.isfinite().all()):
            return cls.of(values.double(), 1)  # squares of what is finite may leave float32
        return cls(count, mean + shift.double().flatten(), m2)

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

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """For a file: tensors by name, and the counts of their parts; :meth:`from_tensors` reads them."""
        parts = {key: part for key, part in (("all", self), ("co", self.co), ("held", self.held)) if part}
        tensors = {f"{key}/{name}": getattr(part, name) for key, part in parts.items() for name in ("mean", "m2")}
        return tensors, {key: part.count for key, part in parts.items()}

    @classmethod
    def from_tensors(cls, read: Callable[[str], Tensor], counts: Mapping[str, int]) -> Moments:
        """What :meth:`to_tensors` gave; ``read`` returns a tensor by its name."""
        co = {
            key: CoMoments(counts[key], read(f"{key}/mean"), read(f"{key}/m2"))
            for key in ("co", "held")
            if key in counts
        }
        return cls(counts["all"], read("all/mean"), read("all/m2"), **co)

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


def widened(values: Tensor) -> Tensor:
    """The values in float32 at least: squares and sums of half-precision ones lose too much."""
    return values.float() if values.dtype in _HALF else values


def answers_at_once(device: torch.device) -> bool:
    """Whether a value can be looked at without waiting for everything that was asked for before."""
    return device.type == "cpu"


def _samples_of_channels(values: Tensor, axis: int) -> Tensor:
    """The same values as (n, d) or (n, d, l), a view wherever the memory's order admits one."""
    axis %= values.ndim
    channels_last = values.movedim(axis, -1)
    if axis == values.ndim - 1 or channels_last.is_contiguous():
        return channels_last.flatten(0, -2) if values.ndim > 1 else values[None]
    return (values.flatten(0, axis - 1) if axis else values[None]).flatten(2)


def _var_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (divided by n) and mean of every channel of (n, d) or (n, d, l)."""
    if values.device.type == "cpu":  # where the reduction over rows that torch.var_mean runs is ten times slower
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        return variance, mean
    return torch.var_mean(values, [i for i in range(values.ndim) if i != 1], correction=0)
