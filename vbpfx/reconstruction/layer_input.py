"""The input of a layer that is fitted, as rows of a regression.

A layer sums over channels or, if it is a convolution, over windows of T entries of each channel. So its regression has T columns for
each channel, those of one channel beside each other, and one row for each position of its output.

A block that is read through zero padding keeps a constant channel for the constants of its removed neurons. Which channel that is
may not be decided yet, so in a regression constant channels stand behind the layer's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.rules.windows import Window, applied


@dataclass(frozen=True)
class LayerInput:
    """What a layer reads.

    Attributes:
        axis: the axis of its input that holds the channels.
        channels: the number of channels of the dense layer.
        size: the axes of its weight behind outputs and channels: those of a convolution's window.
        window: the windows; None if the layer reads only the position that it computes.
        constants: the values of the constant channels that the layer reads and pads with zeros.
    """

    axis: int
    channels: int
    size: tuple[int, ...]
    window: Window | None
    constants: tuple[float, ...]

    @property
    def whole(self) -> int:
        """The number of channels, the constant ones included."""
        return self.channels + len(self.constants)

    @property
    def taps(self) -> int:
        """T, the number of columns of a channel."""
        return math.prod(self.size)

    def columns(self, channels: Tensor) -> Tensor:
        """Return the columns of some channels."""
        return (channels[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight (out, channels, ...) as (out, columns); it is 0 at constant channels if it has no entries for them."""
        missing = weight.new_zeros(len(weight), self.whole - weight.shape[1], *self.size)
        return torch.cat([weight, missing], 1).flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, columns) as a weight (out, channels, ...), constant channels included."""
        return matrix.reshape(len(matrix), self.whole, *self.size)

    def of_another(self, weight: Tensor, channels: Tensor) -> Tensor:
        """Return rows (..., columns) for the weight (out, n, ...) by which another layer reads n of the channels.

        If its window has another size, each of its entries becomes outputs of their own, which read the middle of this window.
        """
        if tuple(weight.shape[2:]) != self.size:
            entries = weight.flatten(2).movedim(-1, 0).flatten(0, 1) if weight.ndim > 2 else weight
            weight = entries.new_zeros(*entries.shape, self.taps)
            weight[:, :, self.taps // 2] = entries
        rows = weight.new_zeros(len(weight), self.whole, self.taps)
        rows[:, channels] = weight.reshape(len(weight), len(channels), self.taps)
        return rows.flatten(1)

    def means(self, columns: Tensor) -> Tensor:
        """Return the means of the dense layer's channels, without the zeros of padding, from the means of all columns."""
        means = columns.reshape(self.whole, self.taps)
        own = means[: self.channels].mean(1)
        return own / (means[self.channels].mean() / self.constants[0]) if self.constants else own

    def rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return rows (n, columns) for some positions of the output of a layer with windows.

        Args:
            x: the layer's input.
            positions: indices (n,) into the flattened samples and spatial axes of the output.
        """
        assert self.window is not None
        windows, inside = self.window.gather(x, positions)
        held = [(inside * value)[:, None].to(windows) for value in self.constants]
        return torch.cat([windows, *held], 1).flatten(1)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor, channels: Tensor) -> Tensor:
        """Return the layer's output for weights (out, n, ...) of only some channels; constant channels are added to x."""
        own = channels[channels < self.channels].to(x.device)
        values = [self.constants[c - self.channels] for c in channels.tolist() if c >= self.channels]
        x = x.index_select(self.axis, own) if len(own) < self.channels else x
        held = [torch.full_like(x.narrow(self.axis, 0, 1), value) for value in values]
        x = torch.cat([x, *held], self.axis) if held else x
        return applied(x, weight.to(x), bias.to(x), self.axis, self.window)
