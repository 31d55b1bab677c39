"""prune_onnx(): ONNX in, ONNX out, without the PyTorch model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import fx
from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.prepare import Statistics
from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_logging
from vbpfx.display.tables import counted
from vbpfx.errors import ExportError, first_line
from vbpfx.graph.capture import Captured
from vbpfx.graph.run import outputs_of
from vbpfx.onnx_graph.file import (
    has_external_data,
    release_pages,
    require_writable,
    stored_bytes,
    write_model,
)
from vbpfx.onnx_graph.importer import Imported
from vbpfx.onnx_graph.rewrite import rewrite, round_as_stored
from vbpfx.onnx_graph.session import Tally, batch_reader, observe_in_runtime
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import require_close
from vbpfx.pipeline.calibration import Calibration, Run, first_batch
from vbpfx.pipeline.in_memory import InMemory
from vbpfx.pipeline.onnx_opened import allowed_difference, open_onnx
from vbpfx.pipeline.stages import Made, Result, run_stages
from vbpfx.pipeline.strategy import Fitting, Target
from vbpfx.planning.options import METHODS, PlanArguments, PlanOptions
from vbpfx.plans.records import Plan
from vbpfx.report.report import Report
from vbpfx.rewrite.verify import Verification
from vbpfx.runtimes.adapters import DEFAULT


@dataclass(frozen=True)
class PrunedOnnx(Result):
    """The result of :func:`prune_onnx`. Printing it shows the report.

    Attributes:
        path: the file that was written.
        plan, statistics, analysis, report, verification: what the stages made; ``verification.capture`` is the difference
            between the graph that the file was read as and the file in ONNX Runtime.
        observed_by: what ran for the statistics: ``"ONNX Runtime"``, ``"torch"`` where gradients were taken on all samples, or a
            value has no name in the file, or ``"ONNX Runtime and torch"``.
        parity: the largest relative difference between the written file in ONNX Runtime and the narrowed graph.
        left_alone: the operators that are in no table, and how many nodes each is: what they read and make stays as it is.
        graph_module: the narrowed graph, as a ``torch.fx.GraphModule``; it computes in float32 what the file does in float16.
        captured: the dense graph.
    """

    path: Path
    plan: Plan = field(repr=False)
    statistics: Statistics = field(repr=False)
    analysis: Analysis = field(repr=False)
    report: Report
    verification: Verification | None
    observed_by: str
    parity: float
    left_alone: Mapping[str, int]
    graph_module: fx.GraphModule = field(repr=False)
    captured: Captured = field(repr=False)

    def __str__(self) -> str:
        text = f"{super().__str__()}{self.path}: statistics by {self.observed_by}, differs from the narrowed graph by {self.parity:.1e}\n"
        if self.left_alone:
            names = ", ".join(f"{name} ({counted(nodes, 'node')})" for name, nodes in self.left_alone.items())
            text += f"not in the operator tables, so nothing that they read or make was narrowed: {names}\n"
        return text


def prune_onnx(
    path: str | Path,
    calibration: Iterable[Any],
    out: str | Path,
    *,
    mask: MaskArgument | None = None,
    reconstruct: bool | None = None,
    refit: bool | None = None,
    samples: int | None = None,
    memory: float = 8.0,
    progress: bool = True,
    verify: bool = True,
    runtime: str | None = None,
    runtime_batch: int = 1,
    runtime_threads: int | None = None,
    **options: Unpack[PlanArguments],
) -> PrunedOnnx:
    """Make the network in an ONNX file smaller, without the model that it was exported from.

    The file is read as a torch.fx graph (:mod:`vbpfx.onnx_graph`) that shares its weights' memory and is held against ONNX
    Runtime first. Blocks, plan and the substitution oracle are those of :func:`vbpfx.prune`, and so are the methods:
    ``method="auto"`` reconstructs block after block on that graph. Where nothing is fitted (``method="vbp"``, or
    ``reconstruct=False``), ONNX Runtime runs the calibration data. The narrowed tensors go back under their names; operators,
    opset, metadata, inputs, outputs and open axes stay. Local functions are inlined. External data stays external, in one file
    ``<out>.data``.

    Args:
        path: the file: opset 7 or newer, not quantized; what is older than opset 13 is converted to that. What it stores and computes in float16 stays float16.
        calibration: batches without labels: arrays or tensors (where the file has one input), mappings by the names of its
            inputs, or sequences in their order.
        out: the file to write; it takes its name when everything has been checked. It may be ``path`` where that keeps its
            weights in itself.
        runtime: where the file will run, a name of :data:`vbpfx.runtimes.adapters.NAMES`: widths are multiples of what is fast there. By
            default ONNX Runtime where the method rounds at all (``"auto"``); ``"vbp"`` rounds where a runtime is named.
            ``round_to=1`` gives exact widths.
        mask, reconstruct, refit, samples, memory, progress, verify, runtime_batch, runtime_threads, options: as
            :func:`vbpfx.prune` takes them.

    Raises:
        VbpfxError: one of its kinds. :class:`~vbpfx.ArtifactError`: a file cannot be read or written;
            :class:`~vbpfx.CaptureError`: an operator is not supported; :class:`~vbpfx.AnalysisError`: there is no block;
            :class:`~vbpfx.CalibrationError`: the data does not fit; :class:`~vbpfx.ExportError`: the written file would
            not compute what it should. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    # a mistake in these should not cost a calibration
    rounds = METHODS[PlanOptions.of(**options).method].round_to is None
    fitting = Fitting(reconstruct, refit, samples, memory)
    target = Target(runtime or (DEFAULT if rounds else None), runtime_batch, runtime_threads)
    require_writable(path, out)
    first, data = first_batch(calibration)
    gone_through = Calibration(data, length_hint(calibration) or None, mask, progress)
    return run_stages(_OnnxFile(path, out, first, gone_through), options, fitting=fitting, target=target, verify=verify)


class _OnnxFile(InMemory[PrunedOnnx]):
    """An ONNX file whose narrowed copy is written beside it.

    Args:
        path: the file; ``out`` is where the narrowed one goes.
        first: one batch of its inputs.
    """

    share = True

    def __init__(self, path: Path, out: Path, first: Any, calibration: Calibration) -> None:
        super().__init__(calibration)
        self._path, self._out, self._first = path, out, first
        self._tally: Tally | None = None

    def capture(self) -> Captured:
        """The file as a graph, held against the file in ONNX Runtime."""
        self._opened = open_onnx(self._path, self._first)
        self._read = batch_reader(self._opened.model, self._opened.imported.arguments)
        return self._opened.captured

    def read(self, batch: Any) -> Inputs:
        """A batch of the file's inputs as arguments of its graph."""
        return self._read(batch).along(self._opened.example)

    def forward(self, observed: fx.GraphModule) -> Run | None:
        """ONNX Runtime, where every value that is observed has a name in the file."""
        run = observe_in_runtime(self._opened.model, self._path.parent, self._opened.imported, observed)
        self._tally = run.tally if run else None
        return run

    def verify(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Verification:
        """The substitution oracle; what was captured was held against the file."""
        return dataclasses.replace(super().verify(captured, small, plan), capture=self._opened.fidelity)

    def result(self, made: Made) -> PrunedOnnx:
        """Write the narrowed file, and hold it against the narrowed graph before it takes its name."""
        opened, small = self._opened, made.graph_module
        model, imported = opened.model, opened.imported
        external, dense_bytes = has_external_data(model), stored_bytes(model)
        release_pages(model)
        round_as_stored(imported, made.plan, small)
        with quiet_logging():
            rewrite(model, imported, made.captured, made.plan, small)
        parity = [0.0]

        def compare(staged: Path) -> None:
            parity[0] = _parity(staged, external, imported, opened.batches, small)

        write_model(model, self._out, source=self._path, external=external, check=compare)
        return PrunedOnnx(
            path=self._out,
            plan=made.plan,
            statistics=made.statistics,
            analysis=made.analysis,
            report=dataclasses.replace(made.report, size=(dense_bytes, stored_bytes(model))),
            verification=made.verification,
            observed_by=str(self._tally or "torch"),
            parity=parity[0],
            left_alone={name: len(nodes) for name, nodes in imported.strange.items()},
            graph_module=small,
            captured=made.captured,
        )


def _parity(
    staged: Path, external: bool, imported: Imported, batches: Sequence[Inputs], small: fx.GraphModule
) -> float:
    """The written file in ONNX Runtime against the narrowed graph."""
    try:
        session = open_session(staged, folder=staged.parent if external else None)
        ran = [(run_session(session, inputs, imported.arguments), outputs_of(small, inputs)) for inputs in batches]
    except Exception as error:  # ONNX Runtime has many kinds
        raise ExportError(f"the narrowed file does not run: {first_line(error)}; nothing was written") from error
    allowed = allowed_difference(imported)
    return max(
        require_close(
            found,
            expected,
            allowed,
            lambda error: ExportError(
                f"the narrowed file differs from the narrowed graph by {error:.2e} of the output's size (allowed "
                f"{allowed:.0e}); nothing was written"
            ),
        )
        for found, expected in ran
    )
