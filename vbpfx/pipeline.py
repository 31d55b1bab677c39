"""The whole way through: prune() is the visible list of stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from vbpfx.artifact import save_network
from vbpfx.blocks import Analysis, find_blocks
from vbpfx.budget import Budget
from vbpfx.calibrate import calibrate
from vbpfx.capture import Captured, Frontend, capture
from vbpfx.convert import apply_plan, convert
from vbpfx.errors import CalibrationError
from vbpfx.export.onnx import export_onnx
from vbpfx.inputs import Inputs, as_inputs
from vbpfx.plan import make_plan
from vbpfx.prepare import Statistics, prepare, statistics
from vbpfx.records import Plan
from vbpfx.report import Report, make_report
from vbpfx.select import select_blocks
from vbpfx.verify import Verification
from vbpfx.verify import verify as check

# Tracing looks at shapes alone; the oracle runs three networks, and a few samples are enough for it.
_EXAMPLE_SAMPLES = 4


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune`. Printing it shows the report.

    Attributes:
        graph_module: the pruned network as a ``torch.fx.GraphModule``, in eval mode, trainable, with the
            model's call signature and output structure.
        plan, statistics, analysis, report, verification: what the stages made.
        captured: the dense graph.
    """

    graph_module: fx.GraphModule = field(repr=False)
    plan: Plan = field(repr=False)
    statistics: Statistics = field(repr=False)
    analysis: Analysis = field(repr=False)
    report: Report
    verification: Verification | None
    captured: Captured = field(repr=False)

    def __str__(self) -> str:
        return str(self.report)

    def apply_to(self, model: nn.Module) -> nn.Module:
        """A narrowed copy of the model in its own class, checked by the substitution oracle where it was on.

        Raises:
            ArtifactError: the model is not of the structure that was pruned.
            VerificationError: the class computes something else when narrowed.
        """
        small = apply_plan(model, self.plan)
        if self.verification is not None:
            check(capture(model, self.captured.inputs, frontend=self.captured.frontend), small, self.plan)
        return small

    def save(self, folder: str | Path) -> Path:
        """Write ``plan.json``, ``model.safetensors``, ``graph.json`` and ``report.json``; see :mod:`vbpfx.artifact`."""
        return save_network(self.graph_module, self.plan, self.report.to_json(), folder)

    def to_onnx(self, path: str | Path) -> Path:
        """Write an ONNX file with a dynamic batch axis, checked in ONNX Runtime; see :mod:`vbpfx.export.onnx`."""
        return export_onnx(self.graph_module, self.captured.inputs, path, plan=self.plan)


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    method: str = "auto",
    criterion: str | None = None,
    compensation: str | None = None,
    round_to: int = 1,
    min_width: int | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    progress: bool = True,
    verify: bool = True,
) -> Pruned:
    """Make a trained network smaller: narrower hidden layers, the removed neurons folded into the next bias.

    >>> import torch, vbpfx
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    >>> pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, progress=False)
    >>> pruned.graph_module(torch.randn(3, 8)).shape, pruned.plan.widths
    (torch.Size([3, 4]), {'0->2': 16})

    Args:
        model: any module on any device; it is left exactly as it was.
        calibration: batches without labels: tensors, mappings of keyword arguments, or sequences.
            ``(inputs, labels)`` works: the labels are left out.
        ratio: fraction of all hidden neurons to remove; or
        macs, params: fraction of the dense model's to keep. Exactly one of the three.
        method: ``"auto"``, or ``"vbp"`` for the paper's method to the letter.
        criterion, compensation, round_to, min_width, include, exclude: see :func:`vbpfx.make_plan`.
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        example_inputs: one batch to trace with; the first of ``calibration`` by default.
        frontend: see :func:`vbpfx.capture`.
        progress: show a bar on standard error.
        verify: run the substitution oracle on the result.

    Raises:
        VbpfxError: one of its kinds, with what was found, where, and what to do.
    """
    Budget.of(ratio=ratio, macs=macs, params=params)  # a mistake here should not cost a calibration
    first, data = _peek(calibration)

    def read(batch: Any) -> Inputs:
        return Inputs(*inputs(batch)) if inputs is not None else as_inputs(batch, model)

    example = read(first) if example_inputs is None else as_inputs(example_inputs, model)
    captured = capture(model, example.first(_EXAMPLE_SAMPLES), frontend=frontend)
    analysis = find_blocks(captured)
    blocks = select_blocks(analysis, include, exclude)
    observed = prepare(captured, analysis, blocks=blocks)
    calibrate(observed, data, read, captured.inputs, progress=progress)
    gathered = statistics(observed)
    plan = make_plan(
        analysis,
        gathered,
        ratio=ratio,
        macs=macs,
        params=params,
        method=method,
        criterion=criterion,
        compensation=compensation,
        round_to=round_to,
        min_width=min_width,
        include=include,
        exclude=exclude,
    )
    small = convert(captured, plan)
    verification = check(captured, small, plan) if verify else None
    report = make_report(captured, small, analysis, plan, verification)
    return Pruned(small, plan, gathered, analysis, report, verification, captured)


def save(pruned: Pruned, folder: str | Path) -> Path:
    """Write a pruned network to a folder, without pickle; :func:`vbpfx.load` reads it."""
    return pruned.save(folder)


def _peek(calibration: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the data with that batch still in it."""
    try:
        iterator = iter(calibration)
    except TypeError as error:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, expected an iterable of batches"
        ) from error
    missing = object()
    first = next(iterator, missing)
    if first is missing:
        raise CalibrationError("the calibration data is empty: pass at least one batch")
    return first, (calibration if iterator is not calibration else itertools.chain([first], iterator))
