"""Random networks: a specification that prints itself, a strategy that draws one, a network built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from exactness import randomize
from hypothesis import strategies as st
from random_middles import ACROSS, MIDDLES, PLAIN, TRAPS, Hidden
from random_templates import FITS, SPELLED, TEMPLATES, Planted, Step, Template
from torch import Tensor, nn

# Whose blocks must be found: templates, middle operators and spellings that the analysis covers today. A block is planted
# where all of its parts stand here; every other one may be found or refused, and must be exact where it is found.
EXPECTED = (
    PLAIN
    | {"LayerNorm", "F.layer_norm", "RMSNorm", "LayerNorm, channels last", "RMS by hand", "GRN", "centred across"}
    | {"over its sum", "flattened batch"}
    | {"plain", "gated", "sum of producers", "two consumers", "nested", "token mixing", "window", "attention"}
    | {"packed chunk", "packed split", "packed slices", "packed glu", "packed view", "packed unbind"}
    | {"layer", "functional", "around", "addmm", "matmul"}
)


@dataclass(frozen=True)
class Spec:
    """All of a random network and of what is done to it; :func:`build` makes the same network of it every time.

    Attributes:
        layout: of the stream: ``flat`` (B, C), ``tokens`` (B, T, C) or ``images`` (B, C, H, W).
        positions: T or (H, W).
        channels: C.
        steps: the blocks, one behind the other.
        takes: how the input comes: ``tensor``, ``two`` tensors, ``keywords`` or ``mapping``.
        returns: how the output goes: ``tensor`` (where nothing is tapped), ``tuple`` or ``mapping``.
        head: a pooled layer at the end.
        batch, calibrated, other: samples in the batch that is captured, in those for calibration, in the one for verification.
        training: the mode in which the model is handed over.
        frontend: ``symbolic`` or ``export``.
        options: of ``make_plan``.
        seed: of weights and data.
    """

    layout: str
    positions: tuple[int, ...]
    channels: int
    steps: tuple[Step, ...]
    takes: str = "tensor"
    returns: str = "tensor"
    head: bool = False
    batch: int = 2
    calibrated: tuple[int, ...] = (4,)
    other: int = 3
    training: bool = False
    frontend: str = "symbolic"
    options: tuple[tuple[str, Any], ...] = (("ratio", 0.5),)
    seed: int = 0


class Network(nn.Module):
    """The steps of a specification one behind the other."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = spec.channels
        for step in spec.steps:
            self.norms.append(_norm(step.norm, spec.layout, channels))
            self.blocks.append(TEMPLATES[step.template](step, spec.layout, spec.positions, channels))
            channels = step.outputs
        self.head = nn.Linear(channels, 3) if spec.head else None

    def run(self, x: Tensor) -> Any:
        """From the input to the output."""
        taps: list[Tensor] = []
        for step, norm, block in zip(self.spec.steps, self.norms, self.blocks, strict=True):
            for _ in range(step.calls):
                y = block(norm(x), taps)
                x = x + y if step.residual else y
        if self.head is not None:
            x = self.head(
                x.mean((2, 3)) if self.spec.layout == "images" else x.mean(1) if self.spec.layout == "tokens" else x
            )
        if self.spec.returns == "mapping":
            return {"out": x, "taps": taps}
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


class InPlace(nn.Module):
    """ReLU of the stream, in place on a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x + 0.1)


def _norm(kind: str, layout: str, channels: int) -> nn.Module:
    if kind == "layer" and channels > 1:  # GroupNorm refuses a single value
        return nn.GroupNorm(1, channels, 1e-2) if layout == "images" else nn.LayerNorm(channels, 1e-2)
    if kind == "batch" and layout != "tokens":
        return nn.BatchNorm2d(channels) if layout == "images" else nn.BatchNorm1d(channels)
    return {"relu": nn.GELU(), "relu_": InPlace()}.get(kind, nn.Identity())


@dataclass(frozen=True)
class Expected:
    """A block that must be found: the names of its weights, and its width."""

    producers: frozenset[str]
    consumers: frozenset[str]
    width: int


def build(spec: Spec) -> tuple[nn.Module, tuple[Expected, ...]]:
    """The network in float64 with weights of natural size, and the blocks that must be found in it."""
    torch.manual_seed(spec.seed)
    kind = {"two": OfTwo, "keywords": OfTwo, "mapping": OfMapping}.get(spec.takes, Network)
    model = randomize(kind(spec).double()).train(spec.training)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    planted = [
        p for step, block in zip(spec.steps, model.blocks, strict=True) if must_be_found(step) for p in _planted(block)
    ]
    return model, tuple(
        Expected(
            frozenset(names[id(p)] for p in plant.producers),
            frozenset(names[id(p)] for p in plant.consumers),
            plant.width,
        )
        for plant in planted
        if plant.width > 1  # at a width of one the axis is lost in broadcasting, and there is nothing to remove
    )


def _planted(block: nn.Module) -> list[Planted]:
    assert isinstance(block, Template)
    return block.planted()


def must_be_found(step: Step) -> bool:
    """Whether every part of a step is expected to be rewritten."""
    if step.template == "packed slices" and any(MIDDLES[name].in_place for name in (*step.middle, *step.other)):
        return False  # that two slices share no memory is not looked at
    return step.calls == 1 and {step.template, *step.middle, *step.other, *step.spelled} <= EXPECTED


def batch(spec: Spec, samples: int, seed: int) -> Any:
    """A batch for the network."""
    shape = {
        "flat": (spec.channels,),
        "tokens": (*spec.positions, spec.channels),
        "images": (spec.channels, *spec.positions),
    }[spec.layout]
    generator = torch.Generator().manual_seed(1000 * spec.seed + seed)
    x, y = torch.randn(2, samples, *shape, generator=generator, dtype=torch.float64).unbind()
    return {"two": (x, y), "keywords": {"x": x, "y": y}, "mapping": {"x": x, "y": y}}.get(spec.takes, x)


SIZES = (8, 12, 3, 5, 2, 7, 16, 1)
_SPELLED_ACROSS = tuple(sorted(ACROSS))
_SPELLED_TRAPS = tuple(sorted(TRAPS))


@st.composite
def middles(draw: st.DrawFn, hidden: Hidden, most: int) -> tuple[str, ...]:
    """Up to so many operators that fit; mostly plain ones, sometimes a norm across the axis, sometimes a trap."""
    chosen: list[str] = []
    for place in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(["plain"] * 12 + ["across", "trap"]))
        pool = {"plain": sorted(PLAIN), "across": _SPELLED_ACROSS, "trap": _SPELLED_TRAPS}[kind]
        names = [n for n in pool if MIDDLES[n].fits(hidden) and not (place and MIDDLES[n].jumps)]
        chosen.append(draw(st.sampled_from(names)))
    return tuple(chosen)


@st.composite
def steps(draw: st.DrawFn, layout: str, positions: tuple[int, ...], channels: int, samples: int) -> Step:
    """A block that fits behind so many channels."""
    residual = draw(st.booleans())
    outputs = channels if residual else draw(st.sampled_from([channels, 4, 6, 3]))
    width = draw(st.sampled_from([*SIZES, channels, max(1, samples), *positions]))
    spelled = st.sampled_from(["layer", "layer", *SPELLED[layout]])
    step = Step("plain", width, outputs, spelled=(draw(spelled), draw(spelled)), residual=residual)
    fitting = [name for name in TEMPLATES if FITS[name](step, layout, positions, channels)]
    plain = [name for name in fitting if name in EXPECTED]
    name = draw(st.sampled_from(plain) | st.sampled_from(fitting))
    hidden = (
        Hidden(layout, (channels,), positions[0], width)
        if name == "token mixing"
        else Hidden(layout, positions, channels, width)
    )
    other = {"nested": width + 2, "uneven split": 3, "concatenated": 3}.get(name, width)
    return Step(
        name,
        width,
        outputs,
        draw(middles(hidden, 4)),
        draw(middles(Hidden(layout, positions, channels, other), 2)) if name in _OF_TWO_CHAINS else (),
        step.spelled,
        (draw(st.booleans()), draw(st.booleans())),
        draw(st.sampled_from(["", "layer", "batch", "relu", "relu_"])),
        residual,
        draw(st.sampled_from([1] * 9 + [2])) if outputs == channels else 1,
    )


_OF_TWO_CHAINS = ("gated", "sum of producers", "two consumers", "nested", "uneven split", "concatenated")


@st.composite
def specs(draw: st.DrawFn, exported: float = 0.02) -> Spec:
    """A random network; ``exported`` is the share that torch.export captures."""
    layout = draw(st.sampled_from(["tokens", "images", "flat"]))
    channels = draw(st.sampled_from([4, 8, 6, 5, 3, 2, 1]))
    samples = draw(st.sampled_from([2, 3, 1, 5, 4, 0, channels]))
    side = st.sampled_from([3, 2, 4, 1])
    positions = {
        "flat": lambda: (),
        "tokens": lambda: (draw(st.sampled_from([5, 3, 2, 8, 1, channels, max(1, samples)])),),
        "images": lambda: (draw(side), draw(side)),
    }[layout]()
    chosen: list[Step] = []
    behind = channels
    for _ in range(draw(st.integers(1, 4))):
        chosen.append(draw(steps(layout, positions, behind, samples)))
        behind = chosen[-1].outputs
    budget = draw(st.sampled_from(["ratio", "macs", "params"]))
    options: dict[str, Any] = {
        budget: draw(st.sampled_from([0.5, 0.3, 0.7] if budget == "ratio" else [0.9, 0.95, 0.8]))
    }
    options["method"] = draw(st.sampled_from(["vbp", "auto"]))
    if draw(st.booleans()):
        options["criterion"] = draw(st.sampled_from(["random", "magnitude", "variance"]))
    if draw(st.integers(0, 3)) == 3:
        options["compensation"] = "none"
    if draw(st.integers(0, 3)) == 3:
        options["round_to"] = draw(st.sampled_from([2, 4]))
    if draw(st.integers(0, 3)) == 3:
        options["min_width"] = draw(st.sampled_from([1, 2, 3]))
    return Spec(
        layout,
        positions,
        channels,
        tuple(chosen),
        takes=draw(st.sampled_from(["tensor", "tensor", "two", "keywords", "mapping"])),
        returns=draw(st.sampled_from(["tensor", "tensor", "tuple", "mapping"])),
        head=draw(st.booleans()),
        batch=samples,
        calibrated=draw(st.sampled_from([(4,), (3, 2), (1, 5)])),
        other=draw(st.sampled_from([3, 1, 2, 6])),
        training=draw(st.booleans()),
        frontend="export" if draw(st.integers(1, 1000)) > 1000 * (1 - exported) else "symbolic",
        options=tuple(options.items()),
        seed=draw(st.integers(0, 9999)),
    )
