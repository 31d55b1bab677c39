"""prune_onnx(): prune the network in an ONNX file, without the PyTorch model."""

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
from vbpfx.onnx_graph.observing import Tally, batch_reader, observe_in_runtime
from vbpfx.onnx_graph.rewrite import rewrite, round_as_stored
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
        plan, statistics, analysis, report, verification: what the stages made. ``verification.capture`` is the difference
            between the original file in ONNX Runtime and the graph that was read from it.
        observed_by: what ran the calibration data: ``"ONNX Runtime"``, ``"torch"``, or ``"ONNX Runtime and torch"``. It is
            torch for the samples on which gradients were taken, and for all samples if an observed value has no name in the file.
        parity: the largest relative difference between the written file in ONNX Runtime and the narrowed graph.
        left_alone: operator that is in no operator table -> its number of nodes. The inputs and outputs of these nodes are
            not narrowed.
        graph_module: the narrowed graph, as a ``torch.fx.GraphModule``. It computes in float32 where the file uses float16.
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

    The file is read as a torch.fx graph (:mod:`vbpfx.onnx_graph`), which shares the memory of the file's weights. First the
    graph is compared with the file in ONNX Runtime. Blocks, plan, methods and the substitution oracle are those of
    :func:`vbpfx.prune`; ``method="auto"`` reconstructs block after block on that graph. If no layer is fitted
    (``method="vbp"``, or ``reconstruct=False``), ONNX Runtime runs the calibration data. The narrowed tensors are stored under
    their old names. Operators, opset, metadata, inputs, outputs and open axes stay. Local functions are inlined. External data
    stays external, in one file ``<out>.data``.

    Args:
        path: the file, of opset 7 or newer and not quantized. A file older than opset 13 is converted to opset 13. Tensors
            stored in float16 stay so, and nodes that compute in float16 still do.
        calibration: batches without labels: arrays or tensors (if the file has one input), mappings from input names to
            arrays, or sequences in the order of the inputs.
        out: the file to write. It appears under this name after all checks. It may be ``path``, unless ``path`` has external
            data.
        runtime: where the file will run, a name in :data:`vbpfx.runtimes.adapters.NAMES`. Widths are multiples of a number
            that is fast there. The default is ONNX Runtime for ``method="auto"``. ``method="vbp"`` rounds widths only if a
            runtime is given. ``round_to=1`` gives exact widths.
        mask, reconstruct, refit, samples, memory, progress, verify, runtime_batch, runtime_threads, options: as
            :func:`vbpfx.prune` takes them.

    Raises:
        VbpfxError: one of its subclasses. :class:`~vbpfx.ArtifactError`: a file cannot be read or written;
            :class:`~vbpfx.CaptureError`: an operator is not supported; :class:`~vbpfx.AnalysisError`: there is no block;
            :class:`~vbpfx.CalibrationError`: the data does not fit; :class:`~vbpfx.ExportError`: the written file would
            compute something else. No file is written in any of these cases.
    """
    path, out = Path(path), Path(out)
    # a mistake in these should not cost a calibration
    rounds = METHODS[PlanOptions.of(**options).method].round_to is None
    fitting = Fitting(reconstruct, refit, samples, memory)
    target = Target(runtime or (DEFAULT if rounds else None), runtime_batch, runtime_threads)
    require_writable(path, out)
    first, data = first_batch(calibration)
    settings = Calibration(data, length_hint(calibration) or None, mask, progress)
    return run_stages(_OnnxFile(path, out, first, settings), options, fitting=fitting, target=target, verify=verify)


class _OnnxFile(InMemory[PrunedOnnx]):
    """An ONNX file to prune.

    Args:
        path: the file.
        out: the narrowed file to write.
        first: one batch of the file's inputs.
    """

    share = True

    def __init__(self, path: Path, out: Path, first: Any, calibration: Calibration) -> None:
        super().__init__(calibration)
        self._path, self._out, self._first = path, out, first
        self._tally: Tally | None = None

    def capture(self) -> Captured:
        """Return the file as a graph, after a comparison with the file in ONNX Runtime."""
        self._opened = open_onnx(self._path, self._first)
        self._read = batch_reader(self._opened.model, self._opened.imported.arguments)
        return self._opened.captured

    def read(self, batch: Any) -> Inputs:
        """Return a batch of the file's inputs as arguments of its graph."""
        return self._read(batch).along(self._opened.example)

    def forward(self, observed: fx.GraphModule) -> Run | None:
        """Return a function that runs ONNX Runtime, or None if an observed value has no name in the file."""
        run = observe_in_runtime(self._opened.model, self._path.parent, self._opened.imported, observed)
        self._tally = run.tally if run else None
        return run

    def verify(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Verification:
        """Run the substitution oracle, and add the difference between the graph and the file to its result."""
        return dataclasses.replace(super().verify(captured, small, plan), capture=self._opened.fidelity)

    def result(self, made: Made) -> PrunedOnnx:
        """Write the narrowed file. It gets its final name after a comparison with the narrowed graph."""
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
    """Return the largest relative difference between the written file in ONNX Runtime and the narrowed graph.

    Raises:
        ExportError: the file does not run, or the difference is too large.
    """
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
