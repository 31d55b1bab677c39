"""Observers: modules that pass a tensor through and gather the moments of one of its axes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import CoMoments, Moments, answers_at_once

# Of so many samples one is held out: its co-moments choose between fits that have not seen it.
_HELD_OUT_EVERY = 5


class Observer(nn.Module):
    """Identity that accumulates :class:`~vbpfx.calibration.moments.Moments` along one axis.

    Every other axis (samples, tokens, positions) is pooled. It holds no parameter and no buffer, so
    nothing of it enters a ``state_dict``.

    Args:
        name: what it observes, for messages.
        axis: the channel axis of the tensor it will see.
        start: the first channel on that axis that is observed; ``width`` is how many are, ``step`` is from one to the next.
        masked: the axes of the tensor that a mask's samples and tokens are, if it is called with one: counted from the
            end, one axis where they are merged.

        every: of so many rows one enters the co-moments; 0 for none. Which ones does not depend on how the data is split
            into batches, nor on which process sees them.
        rows_a_sample: how many rows a sample has; a little more or less where its length varies.
        samples: the axis of the tensor that the samples are on.

    Attributes:
        moments: what was gathered; None before the first sample.
        calls: number of batches seen.
        rows: the number of the next row among those of all data: its sample's number times ``rows_a_sample``. Who leaves out
            samples that another process sees moves it on.
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
    ) -> None:
        super().__init__()
        self.name, self.masked, self.every, self.rows_a_sample = name, masked, every, rows_a_sample
        self.rows, self.samples = 0, samples
        self.axis, self.start, self.width, self.step = axis, start, width, step
        self.moments: Moments | None = None
        self.calls = 0
        self._bad_call: int | None = None
        self._finite: list[tuple[int, Tensor]] = []

    @property
    def bad_call(self) -> int | None:
        """Index of the first batch that held a NaN or an infinity; None without one. That batch and all after it are not gathered.

        On a GPU batches are only looked at when this is asked for: looking at each would hold up the next. If one was bad then,
        nothing is left of what was gathered.
        """
        waiting, self._finite = self._finite, []
        if waiting and not bool(torch.stack([finite for _, finite in waiting]).all()):
            self._bad_call, self.moments = next(call for call, finite in waiting if not finite), None
        return self._bad_call

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gather, and return x itself. Where ``mask`` (B, T) is zero, nothing is gathered."""
        seen, axis = x.detach().narrow(self.axis, self.start, (self.width - 1) * self.step + 1), self.axis
        if self.step > 1:
            seen = seen.unfold(axis, 1, self.step).squeeze(-1)
        if self.every or mask is not None:
            seen, axis = as_rows(seen, axis, mask, self.masked, self.samples), -1
        if seen.numel() and self._bad_call is None:
            self._gather(seen, axis, mask)
        self.calls += 1
        self.rows += seen.numel() // self.width if mask is None else mask.shape[0] * self.rows_a_sample
        return x

    def _gather(self, seen: Tensor, axis: int, mask: Tensor | None) -> None:
        batch = Moments.of(seen, axis)
        # A NaN or an infinity anywhere in the batch reaches M2, and no finite data makes it otherwise.
        finite = batch.m2.isfinite().all()
        if not answers_at_once(seen.device):
            self._finite.append((self.calls, finite))
        elif not bool(finite):
            self._bad_call = self.calls
            return
        batch = self._with_co_moments(batch, seen, mask) if self.every else batch
        self.moments = batch if self.moments is None else self.moments | batch

    def _with_co_moments(self, batch: Moments, rows: Tensor, mask: Tensor | None) -> Moments:
        """The batch's moments, with co-moments taken over every n-th row (n = ``every``); every fifth sample's are kept apart."""
        numbers = row_numbers(rows.shape[0], self.rows, self.rows_a_sample, mask)
        (index,) = (numbers % self.every == 0).nonzero(as_tuple=True)
        held = is_held_out(numbers[index], self.rows_a_sample)
        chosen, apart = (part.to(rows.device, non_blocking=True) for part in (index[~held], index[held]))
        parts = (rows[chosen], rows[apart])
        co, held_out = (CoMoments.of(part) if part.shape[0] else None for part in parts)
        return replace(batch, co=co, held=held_out)


def row_numbers(count: int, start: int, rows_a_sample: int, mask: Tensor | None = None) -> Tensor:
    """The numbers of a batch's rows among those of all data, (count,): sample s begins at s times ``rows_a_sample``.

    Args:
        start: the number of the batch's first row.
        mask: (B, T), zero for padding, which is not among the rows.
    """
    number = torch.arange(count)
    if mask is None or not count:
        return number + start
    real = mask.bool().sum(1).cpu()
    real = real * (count // int(real.sum()))  # a value may have further axes
    sample = torch.arange(len(real)).repeat_interleave(real)
    return start + sample * rows_a_sample + number - (real.cumsum(0) - real)[sample]


def is_held_out(numbers: Tensor, rows_a_sample: int) -> Tensor:
    """Whether the samples of so numbered rows are held out."""
    return numbers // rows_a_sample % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def as_rows(x: Tensor, axis: int, mask: Tensor | None = None, masked: tuple[int, ...] = (), samples: int = 0) -> Tensor:
    """A value as rows of channels (n, d), sample after sample; padding left out.

    Args:
        axis: the channel axis.
        mask: (B, T), zero for padding; ``masked`` are the axes of the value that its axes are, counted from the end, one
            where they are merged.
        samples: the axis that the samples are on.
    """
    if mask is not None:
        seen = x.movedim((*masked, axis), (*range(len(masked)), -1))
        return seen[mask.bool() if len(masked) == 2 else mask.bool().flatten()].flatten(0, -2)
    if x.ndim < 2:
        return x.unsqueeze(0)
    ahead = (samples,) if samples != axis % x.ndim else ()
    return x.movedim((*ahead, axis), (*range(len(ahead)), -1)).flatten(0, -2)
