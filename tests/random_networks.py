"""Random networks: a printable specification, a strategy that draws one, and the network built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import random_convolutions
import random_experts
import random_unusual  # noqa: F401  its templates enter the table
import torch
from exactness import randomize
from hypothesis import strategies as st
from random_forms import KINDS
from random_middles import ACROSS, MIDDLES, PLAIN, TRAPS, Hidden
from random_templates import FITS, SPELLED, TEMPLATES, Planted, Step, Template
from torch import nn

# Templates, middle operators and spellings that the analysis covers today. A block must be found if all of its parts are
# listed here. Any other block may be found or refused, and must be exact if it is found.
EXPECTED = (
    PLAIN
    | {"LayerNorm", "F.layer_norm", "RMSNorm", "LayerNorm, channels last", "RMS by hand", "GRN", "centred across"}
    | {"over its sum", "flattened batch"}
    | {"plain", "gated", "sum of producers", "two consumers", "nested", "token mixing", "window", "attention"}
    | {"packed chunk", "packed split", "packed slices", "packed glu", "packed view", "packed unbind"}
    | {"packed interleaved", "packed interleaved view", "maxout", "packed tensor_split", "packed tensor_split at"}
    | {"packed unsafe_chunk", "packed dsplit", "packed hsplit"}
    | {"layer", "functional", "around", "addmm", "matmul", "convolutions"}
    | {"shuffled with the stream", "channels into pixels"}
)


@dataclass(frozen=True)
class Spec:
    """A complete description of a random network and its test; :func:`build` always makes the same network from it.

    Attributes:
        layout: layout of the stream: ``flat`` (B, C), ``tokens`` (B, T, C) or ``images`` (B, C, H, W).
        positions: T or (H, W).
        channels: C.
        steps: the blocks in sequence.
        takes: form of the input, a key of :data:`random_forms.KINDS`.
        returns: form of the output: ``tensor`` (if nothing is tapped), ``tuple``, ``mapping``, ``nested`` or ``chunks``.
        head: a pooled layer at the end: ``layer``, ``zeros`` for a layer with zero weights, or none.
        batch, calibrated, other: numbers of samples in the captured batch, in each calibration batch, in the batch for
            verification.
        training: whether the model is handed over in training mode.
        frontend: ``auto``, ``symbolic`` or ``export``.
        options: options of ``make_plan``.
        whole: whether to call :func:`vbpfx.prune` with its default method instead of stage by stage.
        seed: seed of weights and data.
    """

    layout: str
    positions: tuple[int, ...]
    channels: int
    steps: tuple[Step, ...]
    takes: str = "tensor"
    returns: str = "tensor"
    head: str = ""
    batch: int = 2
    calibrated: tuple[int, ...] = (4,)
    other: int = 3
    training: bool = False
    frontend: str = "auto"
    options: tuple[tuple[str, Any], ...] = (("ratio", 0.5),)
    whole: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Expected:
    """A block that must be found: the names of its weights, and its width."""

    producers: frozenset[str]
    consumers: frozenset[str]
    width: int


def build(spec: Spec) -> tuple[nn.Module, tuple[Expected, ...]]:
    """Return the network in float64 with weights of natural size, and the blocks that must be found in it."""
    torch.manual_seed(spec.seed)
    model = randomize(KINDS[spec.takes](spec).double()).train(spec.training)
    for block in model.blocks:
        block.settle()
    if spec.head == "zeros":
        nn.init.zeros_(model.head.weight)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    planted: list[Planted] = []
    for step, block in zip(spec.steps, model.blocks, strict=True):
        if step.template == "over a buffer" and not step.residual:
            break  # no later step reads data
        planted += _planted(block) if must_be_found(step) else []
    return model, tuple(
        Expected(
            frozenset(names[id(p)] for p in plant.producers),
            frozenset(names[id(p)] for p in plant.consumers),
            plant.width,
        )
        for plant in planted
        if plant.width > 1  # an axis of length one broadcasts, and no channel of it can be removed
    )


def _planted(block: nn.Module) -> list[Planted]:
    assert isinstance(block, Template)
    return block.planted()


def must_be_found(step: Step) -> bool:
    """Return whether every part of a step is expected to be rewritten."""
    if step.template in ("packed slices", "packed interleaved") and any(
        MIDDLES[name].in_place for name in (*step.middle, *step.other)
    ):
        return False  # the analysis does not check whether two slices share memory
    return step.calls == 1 and {step.template, *step.middle, *step.other, *step.spelled} <= EXPECTED


def batch(spec: Spec, samples: int, seed: int) -> Any:
    """Return a batch for the network."""
    shape = {
        "flat": (spec.channels,),
        "tokens": (*spec.positions, spec.channels),
        "images": (spec.channels, *spec.positions),
    }[spec.layout]
    generator = torch.Generator().manual_seed(1000 * spec.seed + seed)
    x, y = torch.randn(2, samples, *shape, generator=generator, dtype=torch.float64).unbind()
    if spec.takes in ("time first", "over time"):
        return x.transpose(0, 1).contiguous()
    return {"two": ((x, y), {}), "any": ((x, y), {}), "keywords": {"x": x, "y": y}, "mapping": {"x": x, "y": y}}.get(
        spec.takes, x
    )


SIZES = (8, 12, 3, 5, 2, 7, 16, 1)
_SPELLED_ACROSS = tuple(sorted(ACROSS))
_SPELLED_TRAPS = tuple(sorted(TRAPS))
_WINDOWS = st.sampled_from(sorted(random_convolutions.WINDOWS))


@st.composite
def middles(draw: st.DrawFn, hidden: Hidden, most: int) -> tuple[str, ...]:
    """Draw at most ``most`` operators that fit: mostly plain ones, sometimes a norm across the axis or a trap."""
    chosen: list[str] = []
    for place in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(["plain"] * 12 + ["across", "trap"]))
        pool = {"plain": sorted(PLAIN), "across": _SPELLED_ACROSS, "trap": _SPELLED_TRAPS}[kind]
        names = [n for n in pool if MIDDLES[n].fits(hidden) and not (place and MIDDLES[n].jumps)]
        chosen.append(draw(st.sampled_from(names)))
    return tuple(chosen)


@st.composite
def steps(draw: st.DrawFn, layout: str, positions: tuple[int, ...], channels: int, samples: int) -> Step:
    """Draw a block that fits a stream of ``channels`` channels."""
    residual = draw(st.booleans())
    outputs = channels if residual else draw(st.sampled_from([channels, 4, 6, 3]))
    width = draw(st.sampled_from([*SIZES, channels, max(1, samples), *positions]))
    spelled = st.sampled_from(["layer", "layer", *SPELLED[layout]])
    step = Step("plain", width, outputs, spelled=(draw(spelled), draw(spelled)), residual=residual)
    fitting = [name for name in TEMPLATES if FITS[name](step, layout, positions, channels)]
    plain = [name for name in fitting if name in EXPECTED]
    name = draw(st.sampled_from(plain) | st.sampled_from(fitting))
    windows, inside, shuffle = ("", ""), positions, ""
    kind = TEMPLATES[name]
    if issubclass(kind, random_convolutions.Shuffled):
        shuffle = draw(st.sampled_from(kind.ways))
    if issubclass(kind, random_convolutions.Convolved):
        windows = (draw(_WINDOWS), draw(_WINDOWS))
        inside = random_convolutions.positions_behind(windows[0], positions)
    hidden = (
        Hidden(layout, (channels,), positions[0], width)
        if name == "token mixing"
        else Hidden(layout, inside, channels, width)
    )
    other = _OTHER.get(name, lambda width: width)(width)
    return Step(
        name,
        width,
        outputs,
        draw(middles(hidden, 4)),
        draw(middles(Hidden(layout, inside, channels, other), 2)) if name in _OF_TWO_CHAINS else (),
        step.spelled,
        (draw(st.booleans()), draw(st.booleans())),
        draw(st.sampled_from(["", "layer", "batch", "relu", "relu_"])),
        residual,
        draw(st.sampled_from([1] * 9 + [2])) if outputs == channels else 1,
        windows,
        shuffle,
        draw(st.sampled_from(random_experts.RUNS)) if issubclass(kind, random_experts.Experts) else "",
    )


_OF_TWO_CHAINS = (
    "gated", "sum of producers", "two consumers", "nested", "uneven split", "concatenated", "gated convolutions",
    "convolutions with two readers", "convolutions that read all before", "convolutions in a row",
    "shuffled between groups",
)  # fmt: skip
# Template -> the width behind its second chain, as a function of the hidden width.
_OTHER: dict[str, Callable[[int], int]] = {
    "nested": lambda width: width + 2,
    "uneven split": lambda width: 3,
    "concatenated": lambda width: 3,
    "convolutions that read all before": lambda width: 3,
    "convolutions in a row": lambda width: width + 2,
}


@st.composite
def specs(draw: st.DrawFn, exported: float = 0.02) -> Spec:
    """Draw a random network; ``exported`` is the share of networks that torch.export captures."""
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
    forms = ["tensor"] * 8 + ["two", "keywords", "mapping", "any"] * 2
    if samples:
        forms += ["over samples"] * (samples > 1)  # torch.export traces two samples instead of a single one
        forms += ["time first", "over time"] * (layout == "tokens")
    return Spec(
        layout,
        positions,
        channels,
        tuple(chosen),
        takes=draw(st.sampled_from(forms)),
        returns=draw(st.sampled_from(["tensor"] * 4 + ["tuple", "mapping", "nested", "chunks"])),
        head=draw(st.sampled_from(["", "layer"] * 4 + ["zeros"])),
        batch=samples,
        calibrated=draw(st.sampled_from([(4,), (3, 2), (1, 5)])),
        other=draw(st.sampled_from([3, 1, 2, 6])),
        training=draw(st.booleans()),
        frontend="export" if draw(st.integers(1, 1000)) > 1000 * (1 - exported) else "auto",
        options=tuple(options.items()),
        whole=draw(st.integers(1, 100)) > 90,
        seed=draw(st.integers(0, 9999)),
    )
