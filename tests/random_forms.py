"""How the input of a random network comes and how its output goes: one class a form of ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from random_templates import TEMPLATES, Step
from torch import Tensor, nn


class InPlace(nn.Module):
    """ReLU of the stream, in place on a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu_(x + 0.1)


def norm(kind: str, layout: str, channels: int) -> nn.Module:
    """What the stream passes in front of a block."""
    if kind == "layer" and channels > 1:  # GroupNorm refuses a single value
        return nn.GroupNorm(1, channels, 1e-2) if layout == "images" else nn.LayerNorm(channels, 1e-2)
    if kind == "batch" and layout != "tokens":
        return nn.BatchNorm2d(channels) if layout == "images" else nn.BatchNorm1d(channels)
    return {"relu": nn.GELU(), "relu_": InPlace()}.get(kind, nn.Identity())


class Network(nn.Module):
    """The steps of a specification (:class:`random_networks.Spec`) one behind the other."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.blocks, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = spec.channels
        step: Step
        for step in spec.steps:
            self.norms.append(norm(step.norm, spec.layout, channels))
            self.blocks.append(TEMPLATES[step.template](step, spec.layout, spec.positions, channels))
            channels = step.outputs
        self.head = nn.Linear(channels, 3) if spec.head else None

    def run(self, x: Tensor) -> Any:
        """From the input to the output."""
        taps: list[Tensor] = []
        for step, before, block in zip(self.spec.steps, self.norms, self.blocks, strict=True):
            for _ in range(step.calls):
                y = block(before(x), taps)
                x = x + y if step.residual else y
        if self.head is not None:
            x = self.head(
                x.mean((2, 3)) if self.spec.layout == "images" else x.mean(1) if self.spec.layout == "tokens" else x
            )
        return self.returned(x, taps)

    def returned(self, x: Tensor, taps: list[Tensor]) -> Any:
        """The output in the form that the specification has it in."""
        match self.spec.returns:
            case "mapping":
                return {"out": x, "taps": taps}
            case "nested":
                return ({"first": x.sin(), "rest": [x, *taps]}, x.cos())
            case "chunks":  # parts of one value, which share its memory
                parts = x.chunk(2, dim=-1)
                return (parts[0], parts[-1], *taps)
        return (x, *taps) if taps or self.spec.returns == "tuple" else x

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class OfTwo(Network):
    """Two arguments, tensors of one shape; the second is optional."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.run(x if y is None else x + y.sin())


class OfMapping(Network):
    """One argument, a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.run(batch["x"] + batch["y"])


class OfAny(Network):
    """Any number of tensors, as wrappers around a model take them."""

    def forward(self, *xs: Tensor) -> Any:
        return self.run(sum((x.sin() for x in xs[1:]), xs[0]))


class TimeFirst(Network):
    """Time on the first axis, samples on the second, as nn.Transformer and recurrent layers take them by default."""

    def forward(self, x: Tensor) -> Any:
        return self.run(x.transpose(0, 1))


class OverTime(Network):
    """A loop over the steps of time, which stand on the first axis, with a state that goes on."""

    def forward(self, x: Tensor) -> Any:
        state, seen = torch.zeros_like(x[0]), []
        for step in range(x.shape[0]):
            state = (state + x[step]).tanh()
            seen.append(state)
        return self.run(torch.stack(seen, dim=1))


class OverSamples(Network):
    """A loop over the samples of a batch: a graph of it has as many steps as the example has samples."""

    def forward(self, x: Tensor) -> Any:
        return self.run(torch.stack([sample.tanh() for sample in x]))


KINDS: dict[str, type[Network]] = {
    "tensor": Network,
    "two": OfTwo,
    "keywords": OfTwo,
    "mapping": OfMapping,
    "any": OfAny,
    "time first": TimeFirst,
    "over time": OverTime,
    "over samples": OverSamples,
}
# Whose graph is right for the sizes of the example alone, or that are not captured: what is asked of these is not to be wrong.
UNROLLED = frozenset({"over time", "over samples"})
