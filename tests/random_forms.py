"""Forms of input and output of random networks: one class for each signature of ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from random_templates import TEMPLATES, Step
from torch import Tensor, nn


class InPlace(nn.Module):
    """Apply ReLU in place to a copy of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu_(x + 0.1)


def norm(kind: str, layout: str, channels: int) -> nn.Module:
    """Return the norm or activation that the stream passes in front of a block."""
    if kind == "layer" and channels > 1:  # GroupNorm does not accept a single value
        return nn.GroupNorm(1, channels, 1e-2) if layout == "images" else nn.LayerNorm(channels, 1e-2)
    if kind == "batch" and layout != "tokens":
        return nn.BatchNorm2d(channels) if layout == "images" else nn.BatchNorm1d(channels)
    return {"relu": nn.GELU(), "relu_": InPlace()}.get(kind, nn.Identity())


class Network(nn.Module):
    """The steps of a specification (:class:`random_networks.Spec`) in sequence."""

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
        """Run all steps from the input to the output."""
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
        """Return the output in the form that the specification asks for."""
        match self.spec.returns:
            case "mapping":
                return {"out": x, "taps": taps}
            case "nested":
                return ({"first": x.sin(), "rest": [x, *taps]}, x.cos())
            case "chunks":  # these parts share the memory of one value
                parts = x.chunk(2, dim=-1)
                return (parts[0], parts[-1], *taps)
        return (x, *taps) if taps or self.spec.returns == "tuple" else x

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class OfTwo(Network):
    """Two arguments, which are tensors of one shape; the second is optional."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.run(x if y is None else x + y.sin())


class OfMapping(Network):
    """One argument, a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.run(batch["x"] + batch["y"])


class OfAny(Network):
    """Any number of tensors as ``*args``, as wrappers around a model take them."""

    def forward(self, *xs: Tensor) -> Any:
        return self.run(sum((x.sin() for x in xs[1:]), xs[0]))


class TimeFirst(Network):
    """Time is the first axis and samples the second, the default of nn.Transformer and recurrent layers."""

    def forward(self, x: Tensor) -> Any:
        return self.run(x.transpose(0, 1))


class OverTime(Network):
    """A loop over time steps, which are the first axis, with a state carried from step to step."""

    def forward(self, x: Tensor) -> Any:
        state, seen = torch.zeros_like(x[0]), []
        for step in range(x.shape[0]):
            state = (state + x[step]).tanh()
            seen.append(state)
        return self.run(torch.stack(seen, dim=1))


class OverSamples(Network):
    """A loop over the samples of a batch; its graph has as many steps as the example batch has samples."""

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
# Forms whose graph holds only for the sizes of the example, or that cannot be captured. They only must not give wrong results.
UNROLLED = frozenset({"over time", "over samples"})
