"""Pruned: the result of pruning a model in memory, with the methods that save and export it."""

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
        ranks: the processes that made it. All of them hold the same result, and only rank 0 writes files.
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
        """Return a narrowed copy of the model in its own class.

        The substitution oracle checks it, unless the network was pruned with ``verify=False``.

        Args:
            model: the model that was pruned, or another of its class and sizes.

        Raises:
            ArtifactError: the model does not have the structure of the one that was pruned.
            VerificationError: the narrowed class computes something else.
        """
        small = apply_plan(model, self.plan)
        if self.verification is not None:
            frontend = self.captured.frontend
            assert frontend != "onnx"  # the result for an ONNX file is a PrunedOnnx
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
            folder: the folder to write to. It is created if it does not exist (:mod:`vbpfx.artifacts.folder`).
            onnx: also write ``model.onnx``, with the checks of :meth:`to_onnx`.
            evaluation, bench, command: further contents of the report; see :meth:`vbpfx.Report.measured`.

        Raises:
            ArtifactError: a file cannot be written. The folder stays as it was.
            ExportError: with ``onnx=True``, the network cannot be exported, or the file computes something else.
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

        Warn if convolutions have widths at which ONNX Runtime is slow.

        Args:
            path: the file to write. It appears under this name after all checks.

        Raises:
            ExportError: the network cannot be exported, or the file computes something else.
            ArtifactError: the file cannot be written.
        """
        if self.report.uneven:
            warnings.warn(self.report.advice, stacklevel=2)
        parts = self.graph_module, self.captured.inputs, path
        return self.ranks.write(lambda: export_onnx(*parts, plan=self.plan), Path(path))

    def to_exported_program(self, *, like: ExportedProgram | None = None) -> ExportedProgram:
        """Return an ``ExportedProgram`` with a dynamic batch axis; see :mod:`vbpfx.export.exported_program`.

        Args:
            like: the program whose module was pruned. The result has its inputs, open sizes and ranges.

        Raises:
            ExportError: torch.export cannot export the network.
        """
        return export_program(self.graph_module, self.captured.inputs, like=like)


def save(pruned: Pruned, folder: str | Path) -> Path:
    """Write a pruned network to a folder, without pickle; :func:`vbpfx.load` reads it.

    Args:
        pruned: the result of :func:`vbpfx.prune`.
        folder: the folder to write to. It is created if it does not exist.

    Raises:
        ArtifactError: the folder cannot be written, or the network has no graph that can be stored.
    """
    return pruned.save(folder)
