"""The result of pruning, and what can be done with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from vbpfx.analysis.blocks import Analysis
from vbpfx.artifacts.folder import save_network
from vbpfx.calibration.prepare import Statistics
from vbpfx.distributed.ranks import ALONE, Ranks
from vbpfx.export.exported_program import export_program
from vbpfx.export.onnx import export_onnx, onnx_writer
from vbpfx.graph.capture import Captured, capture
from vbpfx.measurement.bench_result import BenchResult
from vbpfx.pipeline.stages import Result
from vbpfx.plans.records import Plan
from vbpfx.report.page import report_files
from vbpfx.report.report import Report
from vbpfx.rewrite.own_class import apply_plan
from vbpfx.rewrite.verify import Verification, verify


@dataclass(frozen=True)
class Pruned(Result):
    """The result of :func:`vbpfx.prune`. Printing it shows the report.

    Attributes:
        graph_module: the pruned network as a ``torch.fx.GraphModule``, in eval mode, trainable, with the
            model's call signature and output structure.
        plan, statistics, analysis, report, verification: what the stages made.
        captured: the dense graph.
        ranks: the processes that it was made on; all hold the same, and rank 0 alone writes files.
    """

    graph_module: fx.GraphModule
    plan: Plan
    statistics: Statistics
    analysis: Analysis
    report: Report
    verification: Verification | None
    captured: Captured
    ranks: Ranks = ALONE

    def __repr__(self) -> str:
        return f"Pruned({self.report!r})"

    def apply_to(self, model: nn.Module) -> nn.Module:
        """A narrowed copy of the model in its own class, checked by the substitution oracle where it was on.

        Args:
            model: the model that was pruned, or another of its class and sizes.

        Raises:
            ArtifactError: the model is not of the structure that was pruned.
            VerificationError: the class computes something else when narrowed.
        """
        small = apply_plan(model, self.plan)
        if self.verification is not None:
            frontend = self.captured.frontend
            assert frontend != "onnx"  # what comes from a file is not a Pruned
            verify(capture(model, self.captured.inputs, frontend=frontend), small, self.plan)
        return small

    def save(
        self,
        folder: str | Path,
        *,
        onnx: bool = False,
        evaluation: Mapping[str, Any] | None = None,
        bench: BenchResult | None = None,
        command: str = "",
    ) -> Path:
        """Write ``plan.json``, ``model.safetensors``, ``graph.json``, ``report.json`` and ``report.html``, all or none.

        Args:
            folder: where to; made if need be (:mod:`vbpfx.artifacts.folder`).
            onnx: write ``model.onnx``, too, checked as :meth:`to_onnx` checks it.
            evaluation, bench, command: what else the report shall hold; see :meth:`vbpfx.Report.measured`.

        Raises:
            ArtifactError: a file cannot be written; what was there stays.
            ExportError: with ``onnx=True``: the network cannot be exported, or the file does not compute what it does.
        """
        report = self.report.measured(evaluation=evaluation, bench=bench, command=command)

        def write() -> Path:
            beside = report_files(report)
            if onnx:
                beside["model.onnx"] = onnx_writer(self.graph_module, self.captured.inputs, plan=self.plan)
            return save_network(self.graph_module, self.captured.reference, self.plan, beside, folder)

        return self.ranks.write(write, Path(folder))

    def to_onnx(self, path: str | Path) -> Path:
        """Write an ONNX file with a dynamic batch axis, checked in ONNX Runtime; see :mod:`vbpfx.export.onnx`.

        Warns where convolutions have widths that ONNX Runtime is slow at.

        Args:
            path: of the file; it takes its name when everything has been checked.

        Raises:
            ExportError: the network cannot be exported, or the file does not compute what it should.
            ArtifactError: it cannot be written.
        """
        if self.report.uneven:
            warnings.warn(self.report.advice, stacklevel=2)
        parts = self.graph_module, self.captured.inputs, path
        return self.ranks.write(lambda: export_onnx(*parts, plan=self.plan), Path(path))

    def to_exported_program(self, *, like: ExportedProgram | None = None) -> ExportedProgram:
        """An ``ExportedProgram`` with a dynamic batch axis; see :mod:`vbpfx.export.exported_program`.

        Args:
            like: the program whose inputs, open sizes and ranges it shall have, where the model was pruned as its module.

        Raises:
            ExportError: torch.export cannot take the network.
        """
        return export_program(self.graph_module, self.captured.inputs, like=like)


def save(pruned: Pruned, folder: str | Path) -> Path:
    """Write a pruned network to a folder, without pickle; :func:`vbpfx.load` reads it.

    Args:
        pruned: what :func:`vbpfx.prune` returned.
        folder: where to; made if need be.

    Raises:
        ArtifactError: the folder cannot be written, or the network has no graph that can be stored.
    """
    return pruned.save(folder)
