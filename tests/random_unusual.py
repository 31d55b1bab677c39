"""Unusual blocks of random networks: they read no data, do not change the output, or are inside opaque modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from random_templates import Plain, Step, Tapped, template, weight
from torch import Tensor, nn


def _tokens(step: Step, layout: str, positions: tuple[int, ...], channels: int) -> bool:
    return layout == "tokens"


def _even_tokens(step: Step, layout: str, positions: tuple[int, ...], channels: int) -> bool:
    return layout == "tokens" and channels % 2 == 0


@template("positions from a table", _tokens)
class Positions(Plain):
    """An MLP over a fixed table makes a position bias, which is added to the stream before a plain block (Swin v2)."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, inputs)
        self.register_buffer("table", torch.randn(*self.positions, 2, dtype=torch.float64))

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return super().forward(x + self.second(self.first(self.table).relu()), taps)

    def constant(self) -> list[nn.Parameter]:
        return [self.first.weight]


@template("learned queries", _tokens)
class Queries(Plain):
    """An MLP over learned vectors makes queries that attend to the stream."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, inputs)
        self.queries = nn.Parameter(torch.randn(*self.positions, inputs))

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        queries = self.second(self.first(self.queries).tanh()).expand(x.shape[0], -1, -1)
        return super().forward((queries @ x.transpose(1, 2)).softmax(-1) @ x, taps)

    def constant(self) -> list[nn.Parameter]:
        return [self.first.weight]


@template("consumer of zeros")
class ZeroConsumer(Plain):
    """A newly initialised branch whose last layer has zero weights."""

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return super().forward(x, taps) + x.mean() * 0.1

    def settle(self) -> None:
        nn.init.zeros_(weight(self.fc2))

    def unseen(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(weight(self.fc1), weight(self.fc2))]


@template("gate that is shut")
class ShutGate(Plain):
    """A saturated gate, which is exactly zero for any input."""

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return super().forward(x, taps) * F.hardsigmoid(x.mean().tanh() - 9) + x.mean() * 0.1


@template("hidden gate that is shut")
class ShutHiddenGate(Plain):
    """A squeeze-and-excite whose scale is exactly zero for every channel."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.gate = self.layer(0, inputs, width)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        h = self.between(self.fc1(x), x)
        return self.fc2(h * F.hardsigmoid(self.gate(x).tanh() - 9))

    def unseen(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(weight(self.fc1), weight(self.fc2))]


@template("twins", lambda step, *_: not step.middle)
class Twins(Plain):
    """Two parallel copies of one block, which must get the same importance by symmetry."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.again1, self.again2 = copy.deepcopy(self.fc1), copy.deepcopy(self.fc2)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc2(self.fc1(x).tanh()) + self.again2(self.again1(x).tanh())

    def settle(self) -> None:
        self.again1.load_state_dict(self.fc1.state_dict())
        self.again2.load_state_dict(self.fc2.state_dict())

    def twins(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(weight(self.fc1), weight(self.again1))]


class Hidden(Tapped):
    """A plain block beside a module of torch.nn that symbolic tracing does not enter."""

    inner: Any

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        return self.fc2(self.between(self.fc1(x), x)) + self.fc3(self.within(x))

    def make(self, width: int, inputs: int, outputs: int) -> None:
        super().make(width, inputs, outputs)
        self.fc3 = self.layer(1, inputs, outputs)
        self.enter(width, inputs)

    def enter(self, width: int, inputs: int) -> None:
        raise NotImplementedError

    def within(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inside(self) -> list[nn.Parameter]:
        return [p for p in self.inner.parameters() if p.ndim > 1]


@template("GRU", _tokens)
class Gru(Hidden):
    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.GRU(inputs, width, batch_first=True)
        self.fc3 = self.layer(1, width, self.step.outputs)

    def within(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


@template("attention of torch", _even_tokens)
class TorchAttention(Hidden):
    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.MultiheadAttention(inputs, 2, batch_first=True)

    def within(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


@template("encoder layer of torch", _even_tokens)
class TorchEncoderLayer(Hidden):
    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.TransformerEncoderLayer(inputs, 2, width, batch_first=True)


@template("transformer of torch", _even_tokens)
class TorchTransformer(Hidden):
    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.Transformer(inputs, 2, 1, 1, width, batch_first=True)

    def within(self, x: Tensor) -> Tensor:
        return self.inner(x, x.sin())


@template("bilinear", lambda step, layout, *_: layout != "images")
class Bilinear(Hidden):
    """A layer with weights that has no row in the operator table."""

    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.Bilinear(inputs, inputs, inputs)

    def within(self, x: Tensor) -> Tensor:
        return self.inner(x, x.sin())


@template("layers in DataParallel")
class Parallel(Hidden):
    """A wrapper of torch.nn around the model's own layers."""

    def enter(self, width: int, inputs: int) -> None:
        self.inner = nn.DataParallel(
            nn.Sequential(self.layer(0, inputs, width), nn.GELU(), self.layer(1, width, inputs))
        )


@template("loop over positions", _tokens)
class OverPositions(Plain):
    """The block is called on one position after the other, with a state carried to the next."""

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        made, state = [], x[:, :1]
        for token in x.split(1, dim=1):
            made.append(self.fc2(self.fc1(token + state).tanh()))
            state = token.sin()
        return torch.cat(made, dim=1)

    def planted(self) -> list[Any]:
        return []
