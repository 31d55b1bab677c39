"""The blocks of random networks: templates that plant hidden axes, both prunable ones and traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from random_middles import Hidden, Op
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One block of a random network.

    Attributes:
        template: name of the template in :data:`TEMPLATES`.
        width: hidden width.
        outputs: output channels.
        middle, other: names in :data:`random_middles.MIDDLES`; the template decides where they are placed.
        spelled: how producers and consumers are written.
        biased: whether producers and consumers have biases.
        norm: what the stream passes in front of the block: ``""``, ``"layer"``, ``"batch"``, ``"relu"`` or ``"relu_"``.
        residual: whether the block is added to the stream.
        calls: how often the block is called in sequence.
        windows: the kinds of convolutions that make and read the hidden axis, in templates of convolutions.
        shuffle: how the channels between these convolutions are shuffled, in templates that shuffle them.
        experts: how experts run, in templates of experts.
    """

    template: str
    width: int
    outputs: int
    middle: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    spelled: tuple[str, str] = ("layer", "layer")
    biased: tuple[bool, bool] = (True, True)
    norm: str = ""
    residual: bool = False
    calls: int = 1
    windows: tuple[str, str] = ("", "")
    shuffle: str = ""
    experts: str = ""


@dataclass(frozen=True)
class Planted:
    """A block that must be found: its weights by identity, and its width."""

    producers: tuple[nn.Parameter, ...]
    consumers: tuple[nn.Parameter, ...]
    width: int


class Around(nn.Module):
    """A layer that needs the channels at another axis: Conv1d for tokens, Linear for images."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv1d):
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Bare(nn.Module):
    """A functional layer with parameters of its own."""

    def __init__(self, spelled: str, layout: str, inputs: int, outputs: int, biased: bool) -> None:
        super().__init__()
        self.spelled, self.layout = spelled, layout
        shape = (
            (inputs, outputs)
            if spelled in ("matmul", "addmm")
            else (outputs, inputs, *((1, 1) if layout == "images" else ()))
        )
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(outputs)) if biased or spelled == "addmm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.spelled == "addmm":
            return torch.addmm(self.bias, x, self.weight)
        if self.spelled == "matmul":
            return x @ self.weight if self.bias is None else x @ self.weight + self.bias
        return (F.conv2d if self.layout == "images" else F.linear)(x, self.weight, self.bias)


SPELLED = {
    "flat": ("layer", "functional", "addmm", "matmul"),
    "tokens": ("layer", "functional", "around", "matmul"),
    "images": ("layer", "functional", "around"),
}


def weight(layer: Any) -> nn.Parameter:
    """Return the weight of a layer that :meth:`Template.layer` made."""
    return (layer.layer if isinstance(layer, Around) else layer).weight


class Chain(nn.Module):
    """Middle operators in sequence."""

    def __init__(self, names: tuple[str, ...], hidden: Hidden) -> None:
        super().__init__()
        self.names = names
        self.ops = nn.ModuleList(Op(name, hidden) for name in names)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        for op in self.ops:
            h = op(h, x)
        return h

    @property
    def gates(self) -> list[Any]:
        """The squeeze-and-excite operators of the chain, which both read and make the hidden axis."""
        return [op for op in self.ops if hasattr(op, "down")]


class Template(nn.Module):
    """A block from a stream to a stream; ``taps`` collects further outputs of the network."""

    def __init__(self, step: Step, layout: str, positions: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.step, self.layout, self.positions, self.channels = step, layout, positions, channels
        self.hidden = Hidden(layout, positions, channels, step.width)
        self.make(step.width, channels, step.outputs)

    def make(self, width: int, inputs: int, outputs: int) -> None:
        """Make the layers."""
        raise NotImplementedError

    def layer(self, end: int, inputs: int, outputs: int) -> nn.Module:
        """Return a layer over the channels in the step's spelling for producers (``end=0``) or consumers (``end=1``)."""
        spelled, biased = self.step.spelled[end], self.step.biased[end]
        if spelled == "around":
            return Around(
                nn.Conv1d(inputs, outputs, 1, bias=biased)
                if self.layout == "tokens"
                else nn.Linear(inputs, outputs, bias=biased)
            )
        if spelled != "layer":
            return Bare(spelled, self.layout, inputs, outputs, biased)
        return (
            nn.Conv2d(inputs, outputs, 1, bias=biased)
            if self.layout == "images"
            else nn.Linear(inputs, outputs, bias=biased)
        )

    def chain(self, names: tuple[str, ...] | None = None, width: int | None = None) -> Chain:
        """Return a chain of the step's middle operators or of others."""
        hidden = Hidden(self.layout, self.positions, self.channels, self.step.width if width is None else width)
        return Chain(self.step.middle if names is None else names, hidden)

    def block(
        self, producers: list[nn.Module], consumers: list[nn.Module], *chains: Chain, width: int | None = None
    ) -> list[Planted]:
        """Return the planted block of these layers, and the blocks in the squeeze-and-excites of its chains."""
        gates = [gate for chain in chains for gate in chain.gates]
        makers, readers = [*producers, *(g.up for g in gates)], [*consumers, *(g.down for g in gates)]
        own = Planted(
            tuple(map(weight, makers)), tuple(map(weight, readers)), self.step.width if width is None else width
        )
        inside = [Planted((weight(g.down),), (weight(g.up),), 3) for g in gates]
        return [own, *inside]

    def planted(self) -> list[Planted]:
        """Return the blocks that must be found if every part of this block is expected to be rewritten."""
        return []

    def constant(self) -> list[nn.Parameter]:
        """Return weights that read no data, whose outputs must not be narrowed to meet a budget."""
        return []

    def inside(self) -> list[nn.Parameter]:
        """Return weights inside a module that tracing does not enter; each must be in a block or refused by name."""
        return []

    def twins(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return the producers of blocks that are copies of each other, which must end up equally wide by symmetry."""
        return []

    def unseen(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return pairs of the producer and the only consumer of a block whose effect the consumer hides completely."""
        return []

    def settle(self) -> None:
        """Set weights that the block needs to be special, such as zeros or copies, after random initialisation."""


TEMPLATES: dict[str, type[Template]] = {}
FITS: dict[str, Callable[[Step, str, tuple[int, ...], int], bool]] = {}


def template(
    name: str, fits: Callable[[Step, str, tuple[int, ...], int], bool] = lambda *_: True
) -> Callable[[Any], Any]:
    """Register a template; ``fits`` says for which step, layout, positions and channels it is possible."""

    def enter(kind: type[Template]) -> type[Template]:
        TEMPLATES[name], FITS[name] = kind, fits
        return kind

    return enter


@template("plain")
class Plain(Template):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2, self.between = self.layer(0, inputs, width), self.layer(1, width, outputs), self.chain()

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc2(self.between(self.fc1(x), x))

    def planted(self) -> list[Planted]:
        return self.block([self.fc1], [self.fc2], self.between)


@template("gated")
class Gated(Template):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.gate, self.up, self.down = (
            self.layer(0, inputs, width),
            self.layer(0, inputs, width),
            self.layer(1, width, outputs),
        )
        self.first, self.second = self.chain(), self.chain(self.step.other)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.down(self.first(self.gate(x), x) * self.second(self.up(x), x))

    def planted(self) -> list[Planted]:
        return self.block([self.gate, self.up], [self.down], self.first, self.second)


@template("sum of producers")
class Summed(Gated):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.down(self.first(self.gate(x) + self.second(self.up(x.sin()), x), x))


@template("two consumers")
class TwoConsumers(Template):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc, self.a, self.b = (
            self.layer(0, inputs, width),
            self.layer(1, width, outputs),
            self.layer(1, width, outputs),
        )
        self.first, self.second = self.chain(), self.chain(self.step.other)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.fc(x)
        return self.a(self.first(h, x)) + self.b(self.second(h, x)).tanh()

    def planted(self) -> list[Planted]:
        if any(op.middle.in_place for chain in (self.first, self.second) for op in chain.ops):
            return []  # one branch changes in place what the other one reads
        return self.block([self.fc], [self.a, self.b], self.first, self.second)


@template("nested")
class Nested(Template):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2, self.fc3 = (
            self.layer(0, inputs, width),
            self.layer(1, width, width + 2),
            self.layer(0, width + 2, outputs),
        )
        self.first, self.second = self.chain(), self.chain(self.step.other, width + 2)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc3(self.second(self.fc2(self.first(self.fc1(x), x)), x))

    def planted(self) -> list[Planted]:
        first = self.block([self.fc1], [self.fc2], self.first)
        return [*first, *self.block([self.fc2], [self.fc3], self.second, width=self.step.width + 2)]


@template("token mixing", lambda step, layout, positions, channels: layout == "tokens" and step.outputs == channels)
class TokenMixing(Template):
    """The plain block with tokens and channels exchanged."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        (tokens,) = self.positions
        self.positions, self.channels = (inputs,), tokens
        self.fc1, self.fc2, self.between = self.layer(0, tokens, width), self.layer(1, width, tokens), self.chain()

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        x = x.transpose(1, 2)
        return self.fc2(self.between(self.fc1(x), x)).transpose(1, 2)

    def planted(self) -> list[Planted]:
        return self.block([self.fc1], [self.fc2], self.between)


@template("window", lambda step, layout, positions, channels: layout == "images" and min(positions) >= 2)
class Window(Template):
    """A padded convolution makes the hidden axis, an unpadded 2x2 one reads it, and the border is padded again."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=self.step.biased[0])
        self.conv2 = nn.Conv2d(width, outputs, 2, bias=self.step.biased[1])
        self.between = self.chain()

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return F.pad(self.conv2(self.between(self.conv1(x), x)), (0, 1, 0, 1))

    def planted(self) -> list[Planted]:
        return self.block([self.conv1], [self.conv2], self.between)


@template("padded window", lambda step, layout, positions, channels: layout == "images")
class PaddedWindow(Plain):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2, self.between = (
            self.layer(0, inputs, width),
            nn.Conv2d(width, outputs, 3, padding=1),
            self.chain(),
        )


@template("over a buffer")
class OverBuffer(Plain):
    """The layers read a table stored in the model and not the stream."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        size = {"flat": (1, inputs), "tokens": (1, *self.positions, inputs), "images": (1, inputs, *self.positions)}[
            self.layout
        ]
        self.register_buffer("table", torch.randn(size, dtype=torch.float64))

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return super().forward(self.table, taps).expand(x.shape[0], *(-1 for _ in range(len(self.positions) + 1)))

    def planted(self) -> list[Planted]:
        return []

    def constant(self) -> list[nn.Parameter]:
        return [weight(self.fc1)]


@template("called twice inside")
class CalledTwice(Plain):
    """Both layers are called on two values."""

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return super().forward(x, taps) + super().forward(x.sin(), taps)


@template("producer called twice")
class ProducerTwice(Plain):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc2(self.between(self.fc1(x), x) + self.fc1(x.cos()).tanh())


@template("consumer called twice")
class ConsumerTwice(Plain):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h.sin()) + self.fc2(self.between(h, x)).tanh()


class Packed(Template):
    """One producer makes both gate and value."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.packed, self.down, self.between = (
            self.layer(0, inputs, 2 * width),
            self.layer(1, width, outputs),
            self.chain(),
        )

    def parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and value."""
        raise NotImplementedError

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        gate, value = self.parts(self.packed(x))
        return self.down(self.between(gate, x) * value)

    def planted(self) -> list[Planted]:
        return self.block([self.packed], [self.down], self.between)


def _packed(name: str, parts: Callable[[Any, Tensor], Any], fits: Callable[..., bool] = lambda *_: True) -> None:
    template(name, fits)(type("Packed", (Packed,), {"parts": parts}))


def _narrow(m: Template, h: Tensor, start: int, length: int) -> Tensor:
    if m.layout == "images":
        return h[:, start : start + length]
    return h[..., start : start + length]


_packed("packed chunk", lambda m, h: h.chunk(2, dim=m.hidden.axis))
_packed("packed split", lambda m, h: h.split(m.step.width, m.hidden.axis))
_packed("packed split with sizes", lambda m, h: torch.split(h, [m.step.width, m.step.width], dim=m.hidden.axis))
_packed("packed slices", lambda m, h: (_narrow(m, h, 0, m.step.width), _narrow(m, h, m.step.width, m.step.width)))
_packed("packed unbind", lambda m, h: h.unflatten(m.hidden.axis, (2, m.step.width)).unbind(m.hidden.axis - 1))
_packed(
    "packed view",
    lambda m, h: (
        h.view(h.shape[0], *m.positions, 2, m.step.width).unbind(-2)
        if m.layout != "images"
        else h.view(h.shape[0], 2, m.step.width, *m.positions).unbind(1)
    ),
)
_packed("packed interleaved", lambda m, h: (h[..., ::2], h[..., 1::2]), lambda step, layout, *_: layout != "images")
_packed("packed interleaved view", lambda m, h: h.unflatten(m.hidden.axis, (-1, 2)).unbind(m.hidden.axis))
_packed("packed tensor_split", lambda m, h: h.tensor_split(2, m.hidden.axis))
_packed("packed tensor_split at", lambda m, h: torch.tensor_split(h, [m.step.width], m.hidden.axis))
_packed("packed unsafe_chunk", lambda m, h: torch.unsafe_chunk(h, 2, m.hidden.axis))
_packed("packed dsplit", lambda m, h: h.dsplit(2), lambda step, layout, *_: layout == "tokens")
_packed("packed hsplit", lambda m, h: h.hsplit(2), lambda step, layout, *_: layout != "tokens")


@template("packed glu")
class Glu(Packed):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.down(self.between(F.glu(self.packed(x), dim=self.hidden.axis), x))


@template("maxout")
class Maxout(Packed):
    """Maxout over pairs of neighbours or over two halves."""

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h, axis = self.packed(x), self.hidden.axis
        if self.step.biased[0]:
            return self.down(self.between(h.unflatten(axis, (-1, 2)).amax(axis), x))
        return self.down(self.between(h.unflatten(axis, (2, -1)).max(axis - 1)[0], x))


@template("packed halves crossed", lambda step, layout, positions, channels: step.width % 2 == 0)
class Crossed(Packed):
    """Two overlapping parts: one channel has different positions in them."""

    def parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        half = self.step.width // 2
        return _narrow(self, h, 0, self.step.width), _narrow(self, h, half, self.step.width)


@template("packed, one part tapped")
class PackedTapped(Packed):
    def parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = h.chunk(2, dim=self.hidden.axis)
        return gate, value

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        gate, value = self.parts(self.packed(x))
        taps.append(value)
        return self.down(self.between(gate, x) * value)

    def planted(self) -> list[Planted]:
        return []


@template("uneven split")
class Uneven(Template):
    """The output of one producer is split into two parts of unequal widths, each with its own consumer."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.packed = self.layer(0, inputs, width + 3)
        self.a, self.b = self.layer(1, width, outputs), self.layer(1, 3, outputs)
        self.between, self.second = self.chain(), self.chain(self.step.other, 3)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        first, second = self.packed(x).split([self.step.width, 3], dim=self.hidden.axis)
        return self.a(self.between(first, x)) + self.b(self.second(second, x))


@template("concatenated")
class Concatenated(Template):
    """Two hidden tensors are concatenated before one consumer."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.a, self.b = self.layer(0, inputs, width), self.layer(0, inputs, 3)
        self.first, self.second, self.behind = (
            self.chain(),
            self.chain(self.step.other, 3),
            self.chain(("F.gelu",), width + 3),
        )
        self.down = self.layer(1, width + 3, outputs)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        parts = [self.first(self.a(x), x), self.second(self.b(x), x)]
        return self.down(self.behind(torch.cat(parts, dim=self.hidden.axis), x))


@template("concatenated with the stream")
class WithStream(Template):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc, self.down, self.between = (
            self.layer(0, inputs, width),
            self.layer(1, width + inputs, outputs),
            self.chain(),
        )

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.down(torch.cat([x, self.between(self.fc(x), x)], self.hidden.axis))


@template("dense net")
class DenseNet(Template):
    """The second layer reads the first one, and the third layer reads both."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.a, self.b, self.down = (
            self.layer(0, inputs, width),
            self.layer(0, width, 3),
            self.layer(1, width + 3, outputs),
        )
        self.between = self.chain()

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.between(self.a(x), x)
        return self.down(torch.cat([h, self.b(h).sin()], self.hidden.axis))


@template("tapped")
class Tapped(Plain):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.between(self.fc1(x), x)
        taps.append(h)
        return self.fc2(h)

    def planted(self) -> list[Planted]:
        return []


@template("summed up and tapped")
class SummedUp(Tapped):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.between(self.fc1(x), x)
        taps.append(h.square().mean(self.hidden.axis))
        return self.fc2(h)


@template("weight read besides")
class WeightRead(Tapped):
    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        taps.append(weight(self.fc1).abs().sum() + weight(self.fc2).mean(0))
        return self.fc2(self.between(self.fc1(x), x))


@template("residual from hidden")
class HiddenStream(Tapped):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.q = self.layer(0, width, width)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h + self.between(self.q(h.sin()), x))


@template("tied weights")
class Tied(Tapped):
    """The consumer is the producer transposed."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.fc2 = self.layer(0, inputs, width), self.layer(1, inputs, outputs)
        self.between = self.chain()

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h, w, spelled = self.between(self.fc1(x), x), weight(self.fc1), self.step.spelled[0]
        if self.layout == "images":
            back = F.conv2d(h, w.reshape(self.step.width, -1).t()[:, :, None, None])
        elif spelled in ("addmm", "matmul"):
            back = F.linear(h, w)
        else:
            back = F.linear(h, (w.squeeze(-1) if spelled == "around" else w).t())
        return self.fc2(back)


@template("one weight twice", lambda step, layout, positions, channels: step.spelled[0] == step.spelled[1] == "layer")
class OneWeightTwice(Tapped):
    """Two blocks share the weight of their producers, and one bias belongs to two consumers."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.fc3, self.fc4 = self.layer(0, inputs, width), self.layer(1, width, outputs)
        self.fc3.weight = self.fc1.weight
        self.fc4.bias = self.fc2.bias

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc2(self.between(self.fc1(x), x)) + self.fc4(self.fc3(x).tanh())


@template("changed in place between consumers")
class ChangedBetween(Tapped):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.fc3 = self.layer(1, width, outputs)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.between(self.fc1(x), x)
        y = self.fc2(h)
        h.tanh_()
        return y + self.fc3(h)


@template("attention", lambda step, layout, positions, channels: layout == "tokens")
class Attention(Tapped):
    """Attention with one head of the hidden width: the values are a block; queries and keys are contracted together."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.q, self.k = self.layer(0, inputs, width), self.layer(0, inputs, width)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        mixed = (self.q(x) @ self.k(x).transpose(-2, -1)).tanh().softmax(-1)
        return self.fc2(mixed @ self.between(self.fc1(x), x))

    def planted(self) -> list[Planted]:
        return self.block([self.fc1], [self.fc2], self.between)


@template("heads", lambda step, layout, positions, channels: layout == "tokens" and step.width % 2 == 0)
class Heads(Tapped):
    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.qkv, self.proj = self.layer(0, inputs, 3 * width), self.layer(1, width, outputs)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, self.step.width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.step.width))


@template(
    "positions flattened into channels",
    lambda step, layout, positions, channels: layout != "flat" and prod(positions) > 1,
)
class Flattened(Tapped):
    """The consumer reads positions and channels as one axis, like a head behind a convolution."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        self.fc1, self.between = self.layer(0, inputs, width), self.chain()
        self.head = nn.Linear(prod(self.positions) * width, outputs)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        y = self.head(self.between(self.fc1(x), x).flatten(1))
        return (
            y[:, :, None, None].expand(-1, -1, *self.positions)
            if self.layout == "images"
            else y.unsqueeze(1).expand(-1, *self.positions, -1)
        )
