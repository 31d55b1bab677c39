"""Observers: modules that return their input unchanged and gather the moments of one of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import CoMoments, Moments, answers_at_once
from vbpfx.rules.routing import Routing, rows_by_expert

# One sample in this many is held out: its co-moments are used to choose between fits that have not seen it.
_HELD_OUT_EVERY = 5


class Observer(nn.Module):
    """An identity module that accumulates the :class:`~vbpfx.calibration.moments.Moments` of one axis.

    All other axes (samples, tokens, positions) are pooled. The module has no parameters and no buffers, so it adds
    nothing to a ``state_dict``.

    Args:
        name: name of the block that is observed, for messages.
        axis: the channel axis of the tensor.
        start: the first observed channel on that axis.
        width: the number of observed channels.
        masked: the axes of the tensor that correspond to the samples and the tokens of a mask, counted from the end;
            one axis if the tensor has them merged. It is used when the observer is called with a mask.
        every: every n-th row enters the co-moments, with n = ``every``; 0 for no co-moments. Which rows these are
            depends neither on the division of the data into batches nor on the process that sees them.
        rows_a_sample: the number of rows of one sample, approximately if lengths vary.
        samples: the axis of the samples in the tensor.
        step: the distance on the axis from one observed channel to the next.
        size, stride, counting, divisor: as for :class:`vbpfx.plans.records.ValueAxis`.

    Attributes:
        moments: the moments gathered so far; None before the first sample.
        calls: number of batches seen.
        rows: the number of the next row among those of all data, which is its sample's number times ``rows_a_sample``.
            A caller that skips samples of another process must increase it.
    """

    def __init__(
        self,
        name: str,
        axis: int,
        start: int,
        width: int,
        masked: tuple[int, ...] = (),
        every: int = 0,
        rows_a_sample: int = 1,
        samples: int = 0,
        step: int = 1,
        size: int = 0,
        stride: int = 0,
        counting: int = 0,
        divisor: int = 1,
    ) -> None:
        super().__init__()
        self.name, self.masked, self.every, self.rows_a_sample = name, masked, every, rows_a_sample
        self.rows, self.samples = 0, samples
        self.axis, self.start, self.width, self.step = axis, start, width, step
        self.size, self.stride, self.counting, self.divisor = size, stride, counting, divisor
        self.moments: Moments | None = None
        self.calls = 0
        self._bad_call: int | None = None
        self._finite: list[tuple[int, Tensor]] = []

    @property
    def gathering(self) -> Sequence[Observer]:
        """The observers that hold the moments: this one."""
        return (self,)

    @property
    def bad_call(self) -> int | None:
        """Index of the first batch with a NaN or an infinity; None if there is none.

        That batch and all after it are not gathered. On a GPU the batches are checked only when this property is read,
        because checking every batch would delay the next. If one of them was bad, all gathered moments are dropped.
        """
        waiting, self._finite = self._finite, []
        if waiting and not bool(torch.stack([finite for _, finite in waiting]).all()):
            self._bad_call, self.moments = next(call for call, finite in waiting if not finite), None
        return self._bad_call

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gather the moments of x, and return x itself. Positions where ``mask`` (B, T) is zero are left out."""
        if self.size and not self.stride:
            seen, axis, masked, samples = self._groups_beside(x.detach())
        else:
            seen, axis, masked, samples = self._own(x.detach()), self.axis, self.masked, self.samples
        if self.every or mask is not None:
            seen, axis = as_rows(seen, axis, mask, masked, samples), -1
        if seen.numel() and self._bad_call is None:
            self._gather(seen, axis, mask)
        self.calls += 1
        self.rows += seen.numel() // self.width if mask is None else mask.shape[0] * self.rows_a_sample
        return x

    def _groups_beside(self, x: Tensor) -> tuple[Tensor, int, tuple[int, ...], int]:
        """Return x with the channels of all groups one behind the other on the last axis, and where its other axes are then.

        These are the channel axis, the axes of the mask, and the axis of the samples.
        """
        axis, counting = self.axis % x.ndim, self.counting % x.ndim
        others = [dim for dim in range(x.ndim) if dim not in (axis, counting)]
        groups = self.width // self.size
        own = self.start + self.step * torch.arange(self.size)
        whole = len(own) == x.shape[axis] and self.step == 1
        seen = x if whole else x.index_select(axis, own.to(x.device))
        seen = seen.permute(*others, counting, axis).unflatten(-2, (-1, groups, self.divisor))  # type: ignore[no-untyped-call]
        seen = seen.transpose(-2, -3).flatten(-2)  # (..., entries in front of the groups, divisor, channels)
        places = {dim: at for at, dim in enumerate(others)} | {counting: len(others)}
        masked = tuple(places[dim % x.ndim] - seen.ndim for dim in self.masked)
        return seen, -1, masked, places.get(self.samples % x.ndim, 0)

    def _own(self, x: Tensor) -> Tensor:
        """Return the block's channels of x; a view, unless they are in groups that do not follow each other."""
        if self.size:
            first = self.start + self.step * torch.arange(self.size)
            own = first + self.stride * torch.arange(self.width // self.size)[:, None]
            return x.index_select(self.axis, own.flatten().to(x.device))
        seen = x.narrow(self.axis, self.start, (self.width - 1) * self.step + 1)
        return seen.unfold(self.axis, 1, self.step).squeeze(-1) if self.step > 1 else seen

    def _gather(self, seen: Tensor, axis: int, mask: Tensor | None) -> None:
        batch = Moments.of(seen, axis)
        # A NaN or an infinity anywhere in the batch makes M2 not finite, and finite data never does.
        finite = batch.m2.isfinite().all()
        if not answers_at_once(seen.device):
            self._finite.append((self.calls, finite))
        elif not bool(finite):
            self._bad_call = self.calls
            return
        batch = self._with_co_moments(batch, seen, mask) if self.every else batch
        self.moments = batch if self.moments is None else self.moments | batch

    def _with_co_moments(self, batch: Moments, rows: Tensor, mask: Tensor | None) -> Moments:
        """Return the batch's moments with co-moments over every n-th row, n = ``every``.

        Held-out samples have co-moments of their own.
        """
        numbers = row_numbers(rows.shape[0], self.rows, self.rows_a_sample, mask)
        (index,) = (numbers % self.every == 0).nonzero(as_tuple=True)
        is_apart = is_held_out(numbers[index], self.rows_a_sample)
        chosen, apart = (part.to(rows.device, non_blocking=True) for part in (index[~is_apart], index[is_apart]))
        parts = (rows[chosen], rows[apart])
        co, held_out = (CoMoments.of(part) if part.shape[0] else None for part in parts)
        return replace(batch, co=co, held_out=held_out)


class ExpertsObserver(Observer):
    """An identity module that passes the rows of each expert to an observer of this expert.

    Which rows enter an expert's co-moments depends on the division of the data into batches, since rows are counted expert by expert.

    Args:
        observers: for every expert its observer; modules at several places may share them.
        routing: how the rows are divided among the experts.
    """

    def __init__(self, observers: Sequence[Observer], routing: Routing) -> None:
        first = observers[0]
        super().__init__(first.name, first.axis, first.start, first.width, every=first.every, step=first.step)
        self._observers, self.routing = tuple(observers), routing

    @property
    def gathering(self) -> Sequence[Observer]:
        """The experts' observers."""
        return self._observers

    @torch.no_grad()
    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """Gather the moments of every expert's rows, and return x itself.

        Args:
            by: the value of the node ``routing.by``.
        """
        for expert, index in rows_by_expert(x, self.routing, by):
            self._observers[expert](x[index])
        return x


def row_numbers(count: int, start: int, rows_a_sample: int, mask: Tensor | None = None) -> Tensor:
    """Return the numbers of a batch's rows among those of all data, (count,).

    The rows of sample s begin at s times ``rows_a_sample``.

    Args:
        start: the number of the batch's first row.
        mask: (B, T), zero for padding; padding is not among the rows.
    """
    number = torch.arange(count)
    if mask is None or not count:
        return number + start
    real = mask.bool().sum(1).cpu()
    real = real * (count // int(real.sum()))  # a value with further axes has several rows per token
    sample = torch.arange(len(real)).repeat_interleave(real)
    return start + sample * rows_a_sample + number - (real.cumsum(0) - real)[sample]


def is_held_out(numbers: Tensor, rows_a_sample: int) -> Tensor:
    """Return, for rows with these numbers, whether their samples are held out."""
    return numbers // rows_a_sample % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def as_rows(x: Tensor, axis: int, mask: Tensor | None = None, masked: tuple[int, ...] = (), samples: int = 0) -> Tensor:
    """Return a value as rows of channels (n, d), sample after sample, without padding.

    Args:
        axis: the channel axis.
        mask: (B, T), zero for padding.
        masked: the axes of the value that correspond to the mask's axes, counted from the end; one axis if the value
            has them merged.
        samples: the axis of the samples.
    """
    if mask is not None:
        seen = x.movedim((*masked, axis), (*range(len(masked)), -1))
        return seen[mask.bool() if len(masked) == 2 else mask.bool().flatten()].flatten(0, -2)
    if x.ndim < 2:
        return x.unsqueeze(0)
    ahead = (samples,) if samples != axis % x.ndim else ()
    return x.movedim((*ahead, axis), (*range(len(ahead)), -1)).flatten(0, -2)
