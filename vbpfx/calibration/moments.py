"""Streaming moments of activations.

For n samples x of d channels they are, per channel, the count n, the mean mu = sum(x) / n and the centred second moment
M2 = sum((x - mu)^2). Two sets a and b are merged pairwise (Chan, Golub and LeVeque 1979):

    delta = mu_b - mu_a
    mu    = mu_a + delta n_b / n
    M2    = M2_a + M2_b + delta^2 n_a n_b / n

This never subtracts two large sums, as E[x^2] - E[x]^2 does. Totals are float64. Every batch is read once, in the
activations' own precision and in pieces that stay in the cache. One of the batch's samples is subtracted from each
piece, so that a large mean costs no digits (Chan, Golub and LeVeque 1983, shifted data). The remaining rounding error
is of that precision relative to the variance. :class:`CoMoments` have the full matrix sum((x - mu)(x - mu)^T) in place
of M2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError
from vbpfx.graph.precision import full_float32

_HALF = (torch.float16, torch.bfloat16)
# On the CPU a piece of 2 MiB stays in the cache, and is large enough for the cost of calling operators not to matter.
# Rows are summed one after another, so the number of rows is limited, too, before rounding errors add up.
_ELEMENTS_AT_ONCE, _ROWS_AT_ONCE = 1 << 19, 1 << 12
# On a GPU every operator is a kernel launch and sums are computed as trees, so pieces only limit the memory for the
# shifted copy.
_ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class CoMoments:
    """Number of rows n, mean (d,) and centred second moment (d, d) of one channel axis; float64.

    The products are computed in the rows' own precision (float32 for half precision) after the mean is subtracted. So
    their error is relative to the variance and not to the mean.

    Attributes:
        together: (d, d), true for pairs of channels whose covariance counts; None if all do. Others have a covariance of 0.
    """

    count: int
    mean: Tensor
    m2: Tensor
    together: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> CoMoments:
        """Return the co-moments of ``rows`` (n, d), n >= 1."""
        wide = widened(rows)
        mean = wide.mean(0, dtype=torch.float64)
        centred = wide - mean.to(wide.dtype)
        left = centred.mean(0, dtype=torch.float64)  # the part of the mean lost by rounding it to the rows' precision
        with full_float32():
            product = centred.T @ centred
        m2 = product.double().addr_(left, left, alpha=-len(rows))
        # no entry is larger than the largest on the diagonal, so checking the diagonal is enough
        if wide.dtype != torch.float64 and answers_at_once(wide.device) and not bool(m2.diagonal().isfinite().all()):
            return cls.of(wide.double())  # squares of finite numbers may overflow float32
        return cls(len(rows), mean.to(wide.dtype).double() + left, m2)

    def __or__(self, other: CoMoments) -> CoMoments:
        """Return the co-moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return CoMoments(
            count,
            self.mean + delta * (other.count / count),
            (self.m2 + other.m2).addr_(delta, delta, alpha=self.count * other.count / count),
            self.together,
        )

    @property
    def covariance(self) -> Tensor:
        """The sample covariance C = M2 / (n - 1), (d, d)."""
        covariance = self.m2 / max(1, self.count - 1)
        return covariance if self.together is None else covariance * self.together.to(covariance.device)


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and centred second moment (d,) of one channel axis; float64.

    Attributes:
        co: co-moments of a share of the rows; None if none were gathered.
        held_out: co-moments of rows from held-out samples, to choose between fits that were made from ``co``.
    """

    count: int
    mean: Tensor
    m2: Tensor
    co: CoMoments | None = None
    held_out: CoMoments | None = None

    @classmethod
    def of(cls, values: Tensor, axis: int = -1) -> Moments:
        """Return the moments of every channel of ``axis`` over all other axes.

        ``values`` may have any float dtype, and must hold at least one value per channel.
        """
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
            return cls.of(values.double(), 1)  # squares of finite numbers may overflow float32
        return cls(count, mean + shift.double().flatten(), m2)

    @classmethod
    def nothing(cls, width: int) -> Moments:
        """Return the moments of no rows: zeros."""
        zeros = torch.zeros(width, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def __or__(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        count = max(1, self.count + other.count)
        delta = other.mean - self.mean
        return Moments(
            self.count + other.count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
            self.co | other.co if self.co and other.co else self.co or other.co,
            self.held_out | other.held_out if self.held_out and other.held_out else self.held_out or other.held_out,
        )

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return tensors by name and counts by part, for a file; :meth:`from_tensors` is the inverse."""
        parts = {key: part for key, part in (("all", self), ("co", self.co), ("held", self.held_out)) if part}
        tensors = {f"{key}/{name}": getattr(part, name) for key, part in parts.items() for name in ("mean", "m2")}
        return tensors, {key: part.count for key, part in parts.items()}

    @classmethod
    def from_tensors(cls, read: Callable[[str], Tensor], counts: Mapping[str, int]) -> Moments:
        """Return the moments that :meth:`to_tensors` was called on; ``read`` returns a tensor by its name."""
        parts = {
            key: CoMoments(counts[key], read(f"{key}/mean"), read(f"{key}/m2"))
            for key in ("co", "held")
            if key in counts
        }
        return cls(counts["all"], read("all/mean"), read("all/m2"), parts.get("co"), parts.get("held"))

    @property
    def variance(self) -> Tensor:
        """The sample variance M2 / (n - 1), (d,); zero if only one sample was seen."""
        return self.m2 / max(1, self.count - 1)

    @property
    def all_co(self) -> CoMoments:
        """The co-moments of all rows that enter them, including the held-out ones.

        Raises:
            CalibrationError: no co-moments were gathered.
        """
        if self.co is None and self.held_out is None:
            raise CalibrationError(
                "these statistics hold variances alone, and the method needs covariances: gather them with "
                "prepare(..., covariance=True)"
            )
        return self.co | self.held_out if self.co and self.held_out else (self.co or self.held_out)  # type: ignore[return-value]


def widened(values: Tensor) -> Tensor:
    """Return the values in at least float32, because squares and sums of half-precision values lose too many digits."""
    return values.float() if values.dtype in _HALF else values


def answers_at_once(device: torch.device) -> bool:
    """Return whether a value on this device can be read without waiting for work that is queued there."""
    return device.type == "cpu"


def _samples_of_channels(values: Tensor, axis: int) -> Tensor:
    """Return the values as (n, d) or (n, d, l) with channels d, as a view where the memory layout allows it."""
    axis %= values.ndim
    channels_last = values.movedim(axis, -1)
    if axis == values.ndim - 1 or channels_last.is_contiguous():
        return channels_last.flatten(0, -2) if values.ndim > 1 else values[None]
    return (values.flatten(0, axis - 1) if axis else values[None]).flatten(2)


def _var_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance (divided by n) and the mean of every channel of (n, d) or (n, d, l)."""
    if values.device.type == "cpu":  # the reduction over rows in torch.var_mean is ten times slower here
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        return variance, mean
    return torch.var_mean(values, [i for i in range(values.ndim) if i != 1], correction=0)
