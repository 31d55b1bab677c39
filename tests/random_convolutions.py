"""Blocks of random networks whose layers are convolutions with padding, strides, dilation or groups, or transposed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_middles import Hidden
from random_templates import Chain, Planted, Step, Template, template
from torch import Tensor, nn

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def _convolution(kernel: int, **options: Any) -> Callable[..., nn.Module]:
    return lambda dims, inputs, outputs, bias: _CONVOLUTIONS[dims](inputs, outputs, kernel, bias=bias, **options)


def _transposed(kernel: int, **options: Any) -> Callable[..., nn.Module]:
    return lambda dims, inputs, outputs, bias: _TRANSPOSED[dims](inputs, outputs, kernel, bias=bias, **options)


def _uneven(dims: int, inputs: int, outputs: int, bias: bool) -> nn.Module:
    if dims == 1:
        return nn.Conv1d(inputs, outputs, 2, padding=2, bias=bias)
    return nn.Conv2d(inputs, outputs, (3, 2), (1, 2), (2, 1), bias=bias)


def _grouped(dims: int, inputs: int, outputs: int, bias: bool) -> nn.Module:
    groups = next(g for g in (4, 3, 2, 1) if inputs % g == outputs % g == 0)
    return _CONVOLUTIONS[dims](inputs, outputs, 3, padding=1, groups=groups, bias=bias)


# Kinds of windows. Those that put zeros around their input need a constant channel.
WINDOWS: dict[str, Callable[..., nn.Module]] = {
    "pointwise": _convolution(1),
    "replicated": _convolution(3, padding=1, padding_mode="replicate"),
    "circular": _convolution(3, padding=1, padding_mode="circular"),
    "padded": _convolution(3, padding=1),
    "padded to the same size": _convolution(3, padding="same", dilation=2),
    "padded by much": _convolution(1, padding=1),
    "strided": _convolution(3, padding=1, stride=2),
    "dilated": _convolution(3, padding=2, dilation=2),
    "uneven": _uneven,
    "transposed": _transposed(3, stride=2, padding=1, output_padding=1),
    "transposed cells": _transposed(2, stride=2),
    "transposed, one entry": _transposed(1),
    "transposed, padded": _transposed(3, padding=1),
    "grouped": _grouped,
}
_CONSTANT = frozenset({"pointwise", "replicated", "circular", "transposed, one entry"})
# Middle operators that leave some constant a constant other than 0, so that a block must be found where they stand before zeros.
STAYING = (
    {f"nn.{name}" for name in ("ReLU", "GELU", "SiLU", "LeakyReLU", "ELU", "SELU", "CELU", "Mish", "Sigmoid", "Tanh", "Softplus", "Softsign", "Identity", "Dropout")}
    | {f"F.{name}" for name in ("relu", "gelu", "silu", "leaky_relu", "elu", "selu", "celu", "mish", "softplus", "softsign", "relu(inplace)", "silu(inplace)")}
    | {"scale", "shift", "scale and shift", "parameter through a function", "one for all", "where", "masked_fill", "like"}
    | {"nn.PReLU()", "nn.PReLU(w)", "F.prelu", "nn.BatchNorm", "F.batch_norm", "BatchNorm behind transpose", "F.conv2d depthwise", "depthwise over tokens"}
    | {"max pool", "adaptive pool", "squeeze and excite", "transpose and back", "movedim and back", "channels last and back"}
)  # fmt: skip


def _by_view(groups: int, positions: int, x: Tensor) -> Tensor:
    samples, channels, *sizes = (x.size(dim) for dim in range(2 + positions))
    return x.view(samples, groups, channels // groups, *sizes).transpose(1, 2).reshape(samples, channels, *sizes)


def _by_permute(groups: int, positions: int, x: Tensor) -> Tensor:
    apart = x.unflatten(1, (groups, -1))
    return apart.permute(0, 2, 1, *range(3, 3 + positions)).flatten(1, 2)


def _by_stack(groups: int, positions: int, x: Tensor) -> Tensor:
    return torch.stack([x.chunk(groups, 1)[group] for group in range(groups)], 2).flatten(1, 2)


# Ways to write a shuffle of G groups over so many axes of positions: channel g d + c of x (B, G d, ...) becomes channel c G + g.
SHUFFLES: dict[str, Callable[[int, int], Callable[[Tensor], Tensor]]] = {
    "view, transpose, reshape": lambda groups, positions: functools.partial(_by_view, groups, positions),
    "unflatten, permute, flatten": lambda groups, positions: functools.partial(_by_permute, groups, positions),
    "chunk, stack, flatten": lambda groups, positions: functools.partial(_by_stack, groups, positions),
    "F.channel_shuffle": lambda groups, positions: functools.partial(F.channel_shuffle, groups=groups),
    "nn.ChannelShuffle": lambda groups, positions: nn.ChannelShuffle(groups),
}


def _cells_by_view(x: Tensor) -> Tensor:
    samples, channels, height, width = (x.size(dim) for dim in range(4))
    cells = x.view(samples, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return cells.reshape(samples, channels // 4, 2 * height, 2 * width)


def _cells_in_front(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


# Ways to make one channel of twice the height and width of four channels. The last one takes channels that lie apart.
CELLS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "F.pixel_shuffle": lambda: functools.partial(F.pixel_shuffle, upscale_factor=2),
    "nn.PixelShuffle": lambda: nn.PixelShuffle(2),
    "view, permute, reshape": lambda: _cells_by_view,
    "unflatten, permute, flatten": lambda: _cells_in_front,
}
KNOWN_CELLS = ("F.pixel_shuffle", "nn.PixelShuffle")


def groups_of_a_shuffle(width: int) -> int:
    """Return the number of groups of a shuffle: 3 or 2 if it divides the width, or the width itself."""
    return next((groups for groups in (3, 2) if width % groups == 0), width)


@functools.lru_cache
def positions_behind(window: str, positions: tuple[int, ...]) -> tuple[int, ...]:
    """Return the positions behind a convolution."""
    with torch.no_grad():
        return tuple(WINDOWS[window](len(positions), 1, 1, False)(torch.zeros(1, 1, *positions)).shape[2:])


def _fits(step: Step, layout: str, positions: tuple[int, ...], channels: int) -> bool:
    return layout != "flat"


class Convolved(Template):
    """A template whose producers and consumers are convolutions. What they return is resized to the stream's positions."""

    @property
    def hidden_positions(self) -> tuple[int, ...]:
        """The positions of the hidden tensor."""
        return positions_behind(self.step.windows[0], self.positions)

    def window(self, end: int, inputs: int, outputs: int) -> nn.Module:
        """Return a producer (``end=0``) or a consumer (``end=1``)."""
        return WINDOWS[self.step.windows[end]](len(self.positions), inputs, outputs, self.step.biased[end])

    def within(self, names: tuple[str, ...] | None = None, width: int | None = None) -> Chain:
        """Return a chain of middle operators at the positions of the hidden tensor."""
        hidden = Hidden(self.layout, self.hidden_positions, self.channels, self.step.width if width is None else width)
        return Chain(self.step.middle if names is None else names, hidden)

    def first(self, x: Tensor) -> Tensor:
        """Return tokens or images with the channels in axis 1, or turn them back."""
        return x.transpose(1, 2) if self.layout == "tokens" else x

    def resized(self, x: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Return a tensor with the channels in axis 1 at other positions."""
        return (F.adaptive_avg_pool1d if len(positions) == 1 else F.adaptive_avg_pool2d)(x, positions)

    def through(self, chain: Chain, h: Tensor, x: Tensor) -> Tensor:
        """Return a hidden tensor behind a chain; both have the channels in axis 1."""
        stream = x if self.hidden_positions == tuple(self.positions) else self.resized(x, self.hidden_positions)
        return self.first(chain(self.first(h), self.first(stream)))

    def convolve(self, x: Tensor) -> Tensor:
        """Return what the block computes, with the channels in axis 1."""
        raise NotImplementedError

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.first(self.resized(self.convolve(self.first(x)), self.positions))

    def found_before_zeros(self, planted: list[Planted], *chains: Chain) -> list[Planted]:
        """Return planted blocks if they must be found before the consumer's padding."""
        names = {name for chain in chains for name in chain.names}
        if self.step.windows[1] in _CONSTANT or (self.step.biased[0] and names <= STAYING):
            return planted
        return []


@template("convolutions", _fits)
class Convolutions(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, width, outputs)
        self.between = self.within()

    def convolve(self, x: Tensor) -> Tensor:
        return self.fc2(self.through(self.between, self.fc1(x), x))

    def planted(self) -> list[Planted]:
        if "grouped" in self.step.windows:
            return []  # groups of single channels are not narrowed
        return self.found_before_zeros(self.block([self.fc1], [self.fc2], self.between), self.between)


@template("gated convolutions", _fits)
class GatedConvolutions(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.gate, self.up = self.window(0, inputs, width), self.window(0, inputs, width)
        self.fc2 = self.window(1, width, outputs)
        self.between, self.second = self.within(), self.within(self.step.other)

    def convolve(self, x: Tensor) -> Tensor:
        gate = self.through(self.between, self.gate(x), x)
        return self.fc2(gate * self.through(self.second, self.up(x), x))


@template("packed convolutions", _fits)
class PackedConvolutions(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.packed, self.fc2 = self.window(0, inputs, 2 * width), self.window(1, width, outputs)
        self.between = self.within()

    def convolve(self, x: Tensor) -> Tensor:
        gate, value = self.packed(x).chunk(2, 1)
        return self.fc2(self.through(self.between, gate, x).sigmoid() * value)


@template("convolutions with two readers", _fits)
class TwoReaders(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, width, outputs)
        self.beside = WINDOWS["pointwise"](len(self.positions), width, 3, self.step.biased[1])
        self.between, self.second = self.within(), self.within(self.step.other)

    def convolve(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        beside = self.beside(self.through(self.second, h, x)).mean(1, keepdim=True)
        y = self.fc2(self.through(self.between, h, x))
        return self.resized(y, self.positions) + self.resized(beside, self.positions)


@template("convolutions called twice", _fits)
class CalledTwice(Convolutions):
    def convolve(self, x: Tensor) -> Tensor:
        return super().convolve(x) + super().convolve(x.sin())

    def planted(self) -> list[Planted]:
        return []


@template("convolutions that read all before", _fits)
class DenseConvolutions(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.a, self.down = self.window(0, inputs, width), self.window(1, width + 3, outputs)
        self.b = WINDOWS["padded"](len(self.positions), width, 3, True)
        self.between, self.second = self.within(), self.within(self.step.other, 3)

    def convolve(self, x: Tensor) -> Tensor:
        h = self.through(self.between, self.a(x), x)
        return self.down(torch.cat([h, self.through(self.second, self.b(h), x)], 1))


@template("convolutions in a row", _fits)
class RowOfConvolutions(Convolved):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.a, self.c = self.window(0, inputs, width), self.window(1, width + 2, outputs)
        self.b = WINDOWS["padded"](len(self.positions), width, width + 2, self.step.biased[1])
        self.between, self.second = self.within(), self.within(self.step.other, width + 2)

    def convolve(self, x: Tensor) -> Tensor:
        h = self.through(self.between, self.a(x), x)
        return self.c(self.through(self.second, self.b(h), x))


class Shuffled(Convolved):
    """A template in which channels are shuffled. What the shuffle touches may be refused, and is right otherwise."""

    ways: tuple[str, ...] = tuple(SHUFFLES)

    def shuffle(self, width: int) -> Callable[[Tensor], Tensor]:
        """Return the step's shuffle of an axis of this width."""
        return SHUFFLES[self.step.shuffle](groups_of_a_shuffle(width), len(self.positions))


@template("shuffled convolutions", _fits)
class ShuffledConvolutions(Shuffled):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, width, outputs)
        self.between, self.shuffled = self.within(), self.shuffle(width)

    def convolve(self, x: Tensor) -> Tensor:
        return self.fc2(self.shuffled(self.through(self.between, self.fc1(x), x)))


@template("shuffled between groups", _fits)
class ShuffledBetweenGroups(Shuffled):
    """Two grouped convolutions with a shuffle and a depthwise convolution between them (ShuffleNet)."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        kind, groups = _CONVOLUTIONS[len(self.positions)], groups_of_a_shuffle(width)
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, width, outputs)
        self.apart = kind(width, width, 1, groups=groups, bias=self.step.biased[0])
        self.depthwise = kind(width, width, 3, padding=1, groups=width, bias=self.step.biased[1])
        self.together = kind(width, width, 1, groups=groups, bias=self.step.biased[1])
        self.between, self.second, self.shuffled = self.within(), self.within(self.step.other), self.shuffle(width)

    def convolve(self, x: Tensor) -> Tensor:
        h = self.through(self.between, self.apart(self.fc1(x)), x)
        return self.fc2(self.through(self.second, self.together(self.depthwise(self.shuffled(h))), x))


def _halves(step: Step, layout: str, positions: tuple[int, ...], channels: int) -> bool:
    return layout != "flat" and channels % 2 == 0 and step.outputs == channels


@template("shuffled with the stream", _halves)
class ShuffledWithTheStream(Shuffled):
    """One half of the stream passes the block, and is then shuffled with the other half (ShuffleNet V2)."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs // 2, width), self.window(1, width, inputs // 2)
        self.between, self.shuffled = self.within(), self.shuffle(inputs)

    def convolve(self, x: Tensor) -> Tensor:
        kept, taken = x.chunk(2, dim=1)
        made = self.fc2(self.through(self.between, self.fc1(taken), x))
        return self.shuffled(torch.cat([kept, self.resized(made, self.positions)], 1))

    def planted(self) -> list[Planted]:
        if "grouped" in self.step.windows:
            return []  # groups of single channels are not narrowed
        return self.found_before_zeros(self.block([self.fc1], [self.fc2], self.between), self.between)


@template("channels into pixels", lambda step, layout, *_: layout == "images" and step.width % 4 == 0)
class IntoPixels(Shuffled):
    """Four channels become the four cells of one pixel, in front of the next convolution (super-resolution)."""

    ways = tuple(CELLS)

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, width // 4, outputs)
        self.between, self.cells = self.within(), CELLS[self.step.shuffle]()

    def convolve(self, x: Tensor) -> Tensor:
        return self.fc2(self.cells(self.through(self.between, self.fc1(x), x)))

    def planted(self) -> list[Planted]:
        if "grouped" in self.step.windows or self.step.shuffle not in KNOWN_CELLS:
            return []
        blocks = self.block([self.fc1], [self.fc2], self.between, width=self.step.width // 4)
        return self.found_before_zeros(blocks, self.between)


@template("pixels into channels", lambda step, layout, *_: layout == "images")
class FromPixels(Shuffled):
    """The four cells of a pixel become four channels, which are shuffled."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.window(0, inputs, width), self.window(1, 4 * width, outputs)
        self.between, self.shuffled = self.within(), self.shuffle(4 * width)

    def convolve(self, x: Tensor) -> Tensor:
        h = self.resized(self.through(self.between, self.fc1(x), x), (4, 4))
        return self.fc2(self.shuffled(F.pixel_unshuffle(h, 2)))
