"""Inspect a model: list its blocks, what cannot be pruned and why, and what pruning would save."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vbpfx.analysis.blocks import Analysis, find_blocks
from vbpfx.data.sources import sample_inputs
from vbpfx.display.figures import kept
from vbpfx.display.tables import counted, table
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.graph.capture import Frontend, capture, named_tensors
from vbpfx.inspection.kinds import calls, kinds
from vbpfx.models.names import load_model, typical_inputs
from vbpfx.onnx_graph.data import data_for_file
from vbpfx.pipeline.onnx_opened import open_onnx, typical_batch
from vbpfx.planning.budget import Budget, choose_widths, floors, mac_cost, parameter_cost
from vbpfx.plans.records import Block, Refusal

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class BlockFacts:
    """The figures of a block.

    Attributes:
        name, width: the name and the width of the block.
        kind: the kind of block, by its structure (:mod:`vbpfx.inspection.kinds`).
        layers: module paths of its producers and consumers.
        calls: how often the network runs it.
        macs: multiply-accumulates per sample that depend on its width: as many as would be saved by a width of zero.
        params: the number of parameters in its layers that depend on its width.
    """

    name: str
    kind: str
    width: int
    layers: tuple[str, ...]
    calls: int
    macs: int
    params: int


@dataclass(frozen=True)
class Step:
    """What is left of the model if every block gives up the same share ``ratio`` of its neurons, without rounding."""

    ratio: float
    neurons: int
    params: int
    macs: int


@dataclass(frozen=True)
class Inspection:
    """What can be pruned of a model. Printing it shows tables.

    Attributes:
        model: the name of the model.
        params, macs, neurons: the parameters, the MACs per sample and the hidden neurons of the whole model.
        blocks: the blocks that can be narrowed.
        refusals: the axes that cannot be narrowed, with the reasons.
        steps: what is left at ratios 0.1, 0.2, ..., up to the first ratio that the floors do not allow.
        analysis: the analysis that the figures come from.
    """

    model: str
    params: int
    macs: int
    neurons: int
    blocks: tuple[BlockFacts, ...]
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...]
    analysis: Analysis = dataclasses.field(repr=False)

    @property
    def sample(self) -> str:
        """The sizes of one sample, such as 3x224x224, with the names of the arguments if there are several."""
        return self.analysis.captured.inputs.sample

    def to_json(self) -> dict[str, Any]:
        """Return the figures as dictionaries that can be written as JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "analysis"]
        of_records = {
            name: [dataclasses.asdict(r) for r in getattr(self, name)] for name in ("blocks", "refusals", "steps")
        }
        return {name: getattr(self, name) for name in names} | {"sample": self.sample} | of_records

    def __str__(self) -> str:
        calls = any(block.calls > 1 for block in self.blocks)
        others = len(self.blocks) - len(self.analysis.usual)
        columns = ("block", "kind", "width", *(["calls"] if calls else []), "MACs", "parameters")
        rows = [
            (
                b.name,
                b.kind,
                b.width,
                *([b.calls] if calls else []),
                kept(self.macs, b.macs),
                kept(self.params, b.params),
            )
            for b in self.blocks
        ]
        text = f"{self.model}: {self.params:,} parameters, {self.macs:,} MACs per sample ({self.sample or 'of several tensors'})\n"
        beside = f"; {counted(others, 'block')} of attention, narrowed if kinds asks for them" if others else ""
        text += table(
            f"{counted(len(rows) - others, 'block')}, {counted(self.neurons, 'hidden neuron')}"
            f"{beside}; shares of all the model",
            columns,
            rows,
        )
        if self.refusals:
            text += table(
                f"{counted(len(self.refusals), 'axis', 'axes')} refused",
                ("axis of", "width", "at node", "because"),
                [(r.label, r.width, r.node, r.reason) for r in self.refusals],
            )
        if self.steps:
            text += table(
                "what ratios give: the same share of every block, exact widths",
                ("ratio", "hidden neurons", "parameters", "kept", "MACs per sample", "kept"),
                [(s.ratio, s.neurons, s.params, kept(self.params, s.params), s.macs, kept(self.macs, s.macs))
                 for s in self.steps],
            )  # fmt: skip
        if self.analysis.usual and len(self.steps) < len(RATIOS):
            text += f"ratio={RATIOS[len(self.steps)]:g} and more: the floors (min_width) forbid it\n"
        return text


def inspect_model(
    name: str,
    weights: str | Path | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    data: str | Path | None = None,
    frontend: Frontend = "auto",
    min_width: int | None = None,
) -> Inspection:
    """Find out what can be pruned of a model, and what that would save.

    Data is needed only if the model does not state the shape of its input. An ONNX file (``name`` ends in .onnx) is
    read as in :func:`vbpfx.prune_onnx`. Other models are made without values for their weights if possible (on torch's
    meta device), which saves memory and time.

    Args:
        name, weights: as for :func:`vbpfx.models.names.load_model`.
        shape: the shape of one sample, if the model does not state it.
        data: samples that show the input's shape, in place of ``shape``. They are read as in :func:`vbpfx.open_data`;
            for an ONNX file they are a .npy or .npz file, or a folder of images.
        frontend: see :func:`vbpfx.capture`.
        min_width: smallest width of every block; by default a sixteenth of its width.

    Raises:
        VbpfxError: the model cannot be made, does not state its input's shape, or cannot be traced.
    """
    file = Path(name)
    is_onnx = file.suffix == ".onnx"
    if is_onnx and (weights is not None or shape is not None or frontend != "auto"):
        raise CalibrationError(
            f"{name} is an ONNX file: it has its weights, states its shapes, and is not traced; leave --weights, --shape and "
            f"--frontend out"
        )
    analysis = _analysed_file(file, data) if is_onnx else _analysed(name, weights, shape, data, frontend)
    captured, blocks = analysis.captured, analysis.blocks
    macs, params = mac_cost(captured, blocks), parameter_cost(captured.reference, blocks)
    full = {block.name: block.width for block in blocks}
    tensors, named = named_tensors(captured.reference), kinds(analysis)
    facts = tuple(
        BlockFacts(
            block.name, named[block.name], block.width, block.layers, calls(block, analysis),
            macs(full) - macs(full | {block.name: 0}),
            sum(tensors[p.name].numel() // tensors[p.name].shape[p.axis] * block.width
                for p in block.parameters if isinstance(tensors[p.name], torch.nn.Parameter)),
        )
        for block in blocks
    )  # fmt: skip
    steps = []
    for ratio in RATIOS if analysis.usual else ():
        try:
            widths = _widths(analysis.usual, ratio, min_width)
        except BudgetError:
            break
        steps.append(Step(ratio, sum(widths.values()), params(full | widths), macs(full | widths)))
    return Inspection(
        name, params(full), macs(full), analysis.neurons, facts, analysis.refusals, tuple(steps), analysis
    )  # fmt: skip


def _analysed_file(path: Path, data: str | Path | None) -> Analysis:
    batch = typical_batch(path) if data is None else next(iter(data_for_file(path, data, batch=2)))
    return find_blocks(open_onnx(path, batch).captured)


def _analysed(
    name: str,
    weights: str | Path | None,
    shape: tuple[int, ...] | None,
    data: str | Path | None,
    frontend: Frontend,
) -> Analysis:
    def analysed(model: nn.Module) -> Analysis:
        inputs = typical_inputs(model, shape) if data is None else sample_inputs(data, model, name=name)
        return find_blocks(capture(model, inputs, frontend=frontend))

    if weights is None:
        try:
            with torch.device("meta"):
                model = load_model(name)
            return analysed(model)
        except (
            Exception
        ):  # some models compute with their weights while they are made or traced; other errors will occur again below
            pass
    return analysed(load_model(name, weights))


def _widths(blocks: tuple[Block, ...], ratio: float, min_width: int | None) -> dict[str, int]:
    """Return the widths at which every block gives up the same share of its neurons."""
    ranks = {block.name: torch.arange(1, block.width + 1, dtype=torch.float64) / block.width for block in blocks}
    floor, steps = floors(blocks, min_width), dict.fromkeys((block.name for block in blocks), 1)
    budget = Budget("ratio", ratio)
    return choose_widths([[block] for block in blocks], ranks, budget, floor=floor, steps=steps, cost=None)
