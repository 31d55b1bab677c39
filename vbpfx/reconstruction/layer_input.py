"""The input of a layer that is fitted, as rows of regressions.

A layer sums over channels or, if it is a convolution, over windows of T entries of each channel. So its regression has T columns for
each channel, those of one channel beside each other, and one row for each position of its output. A grouped convolution has one
regression for each of its groups (:class:`Part`).

A block that is read through zero padding may keep a constant channel for the constants of its removed neurons. Which channel that is
may not be decided yet, so in a regression constant channels stand behind the layer's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.plans.records import ValueAxis
from vbpfx.rules.windows import Window, applied


@dataclass(frozen=True)
class Held:
    """A constant channel that a layer reads and pads with zeros.

    Attributes:
        block: name of the block that it belongs to.
        source: the value from which the layer reads the block.
        value: the channel's value.
    """

    block: str
    source: ValueAxis
    value: float


@dataclass(frozen=True)
class Part:
    """The outputs of one group of a layer, and the channels that they read; a layer without groups has one part.

    Attributes:
        outputs: the outputs.
        first, own: the first of the dense layer's channels, and how many there are.
        constants: indices of the constant channels, which count from behind the dense layer's channels on.
    """

    outputs: slice
    first: int
    own: int
    constants: tuple[int, ...]

    @property
    def channels(self) -> list[int]:
        """The channels, in the order of the regression's columns."""
        return [*range(self.first, self.first + self.own), *self.constants]

    def holds(self, positions: Tensor) -> Tensor:
        """Return for every position among the dense layer's channels whether it belongs to the part."""
        return (positions >= self.first) & (positions < self.first + self.own)


@dataclass(frozen=True)
class LayerInput:
    """What a layer reads.

    Attributes:
        axis: the axis of its input that holds the channels.
        channels: the number of channels of the dense layer.
        outputs: the number of its outputs.
        groups: the number of groups.
        size: the axes of its weight behind outputs and channels: those of a convolution's window.
        window: the windows; None if the layer reads only the position that it computes.
        held: the constant channels. They are numbered from ``channels`` on.
        reading: for every constant channel the positions of its block among the layer's channels.
    """

    axis: int
    channels: int
    outputs: int
    groups: int
    size: tuple[int, ...]
    window: Window | None
    held: tuple[Held, ...]
    reading: tuple[Tensor, ...]

    @property
    def whole(self) -> int:
        """The number of channels, the constant ones included."""
        return self.channels + len(self.held)

    @property
    def taps(self) -> int:
        """T, the number of columns of a channel."""
        return math.prod(self.size)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the layer, one for each group."""
        own, rows = self.channels // self.groups, self.outputs // self.groups

        def part(number: int) -> Part:
            one = Part(slice(number * rows, (number + 1) * rows), number * own, own, ())
            constants = (self.channels + i for i, at in enumerate(self.reading) if bool(one.holds(at).any()))
            return Part(one.outputs, one.first, own, tuple(constants))

        return tuple(part(number) for number in range(self.groups))

    def held_by(self, part: Part) -> list[tuple[int, Held]]:
        """Return a part's constant channels, each with its place among the part's channels."""
        return [(place, self.held[c - self.channels]) for place, c in enumerate(part.constants, part.own)]

    def columns(self, channels: Tensor) -> Tensor:
        """Return the columns of channels that are numbered from 0 on, T for each."""
        return (channels[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def matrix(self, weight: Tensor, part: Part) -> Tensor:
        """Return a part of a weight (out, channels, ...) as (outputs, columns); it is 0 at constant channels."""
        own = weight[part.outputs]
        missing = own.new_zeros(len(own), len(part.constants), *self.size)
        return torch.cat([own, missing], 1).flatten(1)

    def of_another(self, weight: Tensor, channels: Tensor, part: Part) -> Tensor:
        """Return rows (..., columns) for the weight (out, n, ...) by which another layer reads n of a part's channels.

        If its window has another size, each of its entries becomes outputs of their own, which read the middle of this window.

        Args:
            channels: the channels (n,), numbered as columns of the part.
        """
        if tuple(weight.shape[2:]) != self.size:
            entries = weight.flatten(2).movedim(-1, 0).flatten(0, 1) if weight.ndim > 2 else weight
            weight = entries.new_zeros(*entries.shape, self.taps)
            weight[:, :, self.taps // 2] = entries
        rows = weight.new_zeros(len(weight), len(part.channels), self.taps)
        rows[:, channels] = weight.reshape(len(weight), len(channels), self.taps)
        return rows.flatten(1)

    def means(self, columns: Tensor, part: Part) -> Tensor:
        """Return the means of a part's own channels, without the zeros of padding, from the means of all its columns."""
        means = columns.reshape(-1, self.taps)
        own = means[: part.own].mean(1)
        for place, held in self.held_by(part)[:1]:
            own = own / (means[place].mean() / held.value)
        return own

    def rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return rows (n, columns) of all channels for some positions of the output of a layer with windows.

        Args:
            x: the layer's input.
            positions: indices (n,) into the flattened samples and spatial axes of the output.
        """
        assert self.window is not None
        windows, inside = self.window.gather(x, positions)
        held = [(inside * constant.value)[:, None].to(windows) for constant in self.held]
        return torch.cat([windows, *held], 1).flatten(1)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor, channels: Tensor) -> Tensor:
        """Return the layer's output for weights (out, n, ...) of only some channels.

        Args:
            channels: the channels that are read, constant ones among them, group by group.
        """
        if len(channels) < self.channels or self.held:
            held = [torch.full_like(x.narrow(self.axis, 0, 1), constant.value) for constant in self.held]
            x = torch.cat([x, *held], self.axis).index_select(self.axis, channels.to(x.device))
        return applied(x, weight.to(x), bias.to(x), self.axis, self.window)
