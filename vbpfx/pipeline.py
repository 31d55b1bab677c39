"""The whole way through: prune() is the visible list of stages."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis, find_blocks
from vbpfx.artifact import plan_digest, save_network
from vbpfx.calibration.calibrate import calibrate
from vbpfx.calibration.compiled import Compile, compiling, forward_passes
from vbpfx.calibration.passes import Forward
from vbpfx.calibration.prepare import Statistics, prepare, statistics
from vbpfx.data.inputs import Inputs, as_inputs, reader
from vbpfx.distributed.ranks import ALONE, Ranks, Sharing, joining
from vbpfx.errors import CalibrationError
from vbpfx.export.exported_program import export_program
from vbpfx.export.onnx import export_onnx, onnx_writer
from vbpfx.graph.capture import Captured, Frontend, capture, require_module
from vbpfx.graph.fake import has_fixed_batch
from vbpfx.measurement.bench_result import BenchResult
from vbpfx.measurement.latency import measure_latencies, measure_result
from vbpfx.measurement.sensitivity import MOST_SAMPLES, sensitivities
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.planning.plan import make_plan
from vbpfx.planning.select import select_blocks, select_layers
from vbpfx.reconstruction.influence import Gradients, is_differentiable
from vbpfx.reconstruction.kept import Keeping
from vbpfx.reconstruction.reconstruct import chosen_on_the_way, layers_beside, layers_to_fit, samples_that_fit
from vbpfx.reconstruction.reconstruct import reconstruct as reconstruct_plan
from vbpfx.records import Plan
from vbpfx.report.page import notebook_view, report_files
from vbpfx.report.report import Report, make_report
from vbpfx.rewrite.convert import convert
from vbpfx.rewrite.own_class import apply_plan
from vbpfx.rewrite.verify import Verification
from vbpfx.rewrite.verify import verify as check
from vbpfx.runtimes.table import DEFAULT, best_multiple
from vbpfx.storage.checkpoint import digest

# Tracing looks at shapes alone; the oracle runs three networks, and a few samples are enough for it.
EXAMPLE_SAMPLES = 4
# What covariances may cost, as a share of the network's own products, where they only say how wide blocks stay.
_WIDTHS_COVARIANCE_SHARE = 0.25


# Runs one batch for the observers of a prepared graph.
Run = Callable[[Inputs], None]


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune`. Printing it shows the report.

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

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        parts = (f"{name} {dense:,} -> {pruned:,}" for name, (dense, pruned) in self.report.costs.items())
        return f"<Pruned {self.report.network}: {', '.join(parts)}>"

    def _repr_html_(self) -> str:
        return notebook_view(self.report)

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
            assert frontend != "onnx"  # what comes from a file is no Pruned
            check(capture(model, self.captured.inputs, frontend=frontend), small, self.plan)
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
            folder: where to; made if need be (:mod:`vbpfx.artifact`).
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


@joining
def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    mask: str | None = None,
    reconstruct: bool | None = None,
    refit: bool | None = None,
    samples: int | None = None,
    memory: float = 8.0,
    progress: bool = True,
    verify: bool = True,
    compile: Compile = False,
    ranks: Sharing | Ranks = "share",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    runtime: str | None = None,
    runtime_batch: int = 1,
    runtime_threads: int | None = None,
    **options: Unpack[PlanArguments],
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
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        example_inputs: one batch to trace with; the first of ``calibration`` by default.
        frontend: see :func:`vbpfx.capture`.
        mask: the argument that is the padding mask; ``attention_mask`` is found by itself (see :func:`vbpfx.prepare`).
        reconstruct: fit the layers block after block (:mod:`vbpfx.reconstruction.reconstruct`); by default where ``method="auto"`` is taken
            with its own compensation.
        refit: fit layers beside the blocks, too, that write to the residual stream (attention's output projection);
            their shapes stay. By default as ``reconstruct``. The plan and the report name them.
        samples: how many calibration samples the reconstruction takes, the first ones; by default as many as its two streams
            can hold in ``memory``.
        memory: GiB that the streams may hold, 8 by default.
        progress: show a bar on standard error.
        verify: run the substitution oracle on the result.
        compile: calibrate with ``torch.compile`` (see :func:`vbpfx.calibrate`), where plain forward passes are all that
            calibration does: ``method="vbp"``, or ``reconstruct=False``, whose sensitivities are measured as ever.
        ranks: where ``torch.distributed`` is initialised: the processes share the work and all end with the same plan (see
            :func:`vbpfx.calibrate` and docs/many_processes.md).
        checkpoint, checkpoint_every: a folder, and after how many of a process's batches what calibration has gathered is
            written there (statistics, and gradients of ``method="auto"``). Called again with the same arguments and data, prune
            goes on behind those batches, and ends with the same plan bit for bit; what comes behind calibration is done
            again.
        runtime: where the network will run, a name of :data:`vbpfx.runtimes.table.NAMES`: ``latency=`` is measured there (in
            ONNX Runtime by default), and widths are multiples of what it is fast at, unless ``round_to`` says otherwise.
        runtime_batch, runtime_threads: with ``latency=``: samples at once there, and threads; by default the runtime's choice.
        options: the budget and the method, as :func:`vbpfx.make_plan` takes them: exactly one of ``ratio``
            (fraction of the hidden neurons to remove), ``macs``, ``params``, ``latency`` (fraction to keep), and
            ``method``, ``criterion``, ``compensation``, ``round_to``, ``min_width``, ``include``, ``exclude``.

    Raises:
        VbpfxError: one of its kinds, with what was found, where, and what to do.
    """
    assert isinstance(ranks, Ranks)  # joined
    require_module(model)
    ranks.require_whole(calibration)
    if ranks.count > 1:
        ranks.meet("model", digest(model))
        ranks.meet("choice of options", _in_words(options))
    chosen = PlanOptions.of(**options)  # a mistake here should not cost a capture
    if compile is not False and (chosen.reconstructs if reconstruct is None else reconstruct):
        raise CalibrationError(
            "compile= is for forward passes alone; the reconstruction takes gradients and runs layers one by one, "
            "which is not compiled: pass reconstruct=False or method='vbp' with it, or leave compile out"
        )
    read = reader(model, inputs)
    data: Iterable[Any] = require_batches(calibration)
    if example_inputs is None:
        first, data = first_batch(data)
        example_inputs = read(first)
    example = as_inputs(example_inputs, model)
    few = example if has_fixed_batch(model, example) else example.first(EXAMPLE_SAMPLES)
    captured = capture(model, few, frontend=frontend)
    return prune_captured(
        captured, data, read=read, mask=mask, reconstruct=reconstruct, refit=refit, samples=samples, memory=memory,
        total=length_hint(calibration) or None, progress=progress, verify=verify,
        compile=compile, ranks=ranks, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
        runtime=runtime, runtime_batch=runtime_batch, runtime_threads=runtime_threads, **options,
    )  # fmt: skip


def prune_captured(
    captured: Captured,
    data: Iterable[Any],
    *,
    read: Callable[[Any], Inputs],
    forward: Callable[[fx.GraphModule], Run | None] | None = None,
    mask: str | None = None,
    reconstruct: bool | None = None,
    refit: bool | None = None,
    samples: int | None = None,
    memory: float = 8.0,
    total: int | None = None,
    share: bool = False,
    progress: bool = True,
    verify: bool = True,
    compile: Compile = False,
    ranks: Ranks = ALONE,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    runtime: str | None = None,
    runtime_batch: int = 1,
    runtime_threads: int | None = None,
    **options: Unpack[PlanArguments],
) -> Pruned:
    """The stages behind the capture, in order; arguments as :func:`prune` takes them.

    Args:
        data: batches, gone through once; ``read`` makes arguments of them, ``total`` is how many there are.
        forward: from the prepared graph to what runs a batch for its observers; the graph itself where it is left out, or
            gives None.
        share: see :func:`vbpfx.convert`.
    """
    arguments = _given(
        options, mask=mask, reconstruct=reconstruct, refit=refit, samples=samples, memory=memory, compile=compile,
        runtime=runtime, runtime_batch=runtime_batch, runtime_threads=runtime_threads,
        frontend="export" if captured.frontend == "export" else "auto",
    )  # fmt: skip
    place = runtime or DEFAULT
    if runtime is not None or options.get("latency") is not None:
        options.setdefault("round_to", best_multiple(place))
    chosen = PlanOptions.of(**options)
    analysis = find_blocks(captured)
    blocks = select_blocks(analysis, chosen.include, chosen.exclude)
    fitting = chosen.reconstructs if reconstruct is None else reconstruct
    beside = select_layers(layers_beside(analysis), chosen.include, chosen.exclude) if refit or refit is None else ()
    choosing = fitting and chosen.chooses_on_the_way
    measuring = chosen.allocation == "sensitivity"
    widths_alone = choosing and all(
        chosen_on_the_way(analysis, block) for block in blocks
    )  # is what is taken from the plan
    if widths_alone and not measuring:
        options |= {"criterion": "variance", "compensation": "mean"}
    covariance = PlanOptions.of(**options).needs_covariance and (_WIDTHS_COVARIANCE_SHARE if widths_alone else True)
    observed = prepare(captured, analysis, blocks=blocks, mask=mask, covariance=covariance)
    latencies = None
    if chosen.budget.kind == "latency":
        latencies = ranks.of_first(
            lambda: measure_latencies(
                analysis,
                chosen.budget.value,
                blocks=blocks,
                runtime=place,
                batch=runtime_batch,
                threads=runtime_threads,
                round_to=chosen.round_to,
            )
        )
    wanted = (samples or samples_that_fit(analysis, memory)) if fitting else MOST_SAMPLES if measuring else 0
    layers = layers_to_fit(analysis, blocks, beside) if fitting else []
    reading = {consumer.node for block in blocks for consumer in block.consumers}  # where neurons are chosen
    gradients = None
    if layers and is_differentiable(captured, layers):
        gradients = Gradients(captured, layers, observed, metrics=reading)
    run = forward(observed) if forward else None
    passes = Forward(run) if run else forward_passes(observed, compile)
    keeping = Keeping(passes, wanted, gradients, divisible=captured.batch is not None)
    calibrate(
        observed,
        data,
        read=read,
        work=keeping,
        total=total,
        progress=progress,
        ranks=ranks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        settings={
            "options": _in_words(options),
            "samples": wanted,
            "gradients": sorted(c.node for c in layers) if gradients else None,
            **compiling(compile),
        },
    )
    gathered, kept = statistics(observed), keeping.samples(ranks)
    del run, passes, keeping, observed  # a runtime may hold the whole network in memory
    plan = make_plan(
        analysis,
        gathered,
        sensitivity=lambda alike: sensitivities(analysis, alike, kept, progress=progress),
        latencies=latencies,
        **options,
    )
    if fitting:
        influence = gradients.influences(ranks=ranks) if gradients else {}
        plan = reconstruct_plan(
            analysis, plan, kept, influence, beside=beside, choose=choosing, mask=mask, progress=progress
        )  # fmt: skip
    if ranks.count > 1:
        ranks.meet("plan", plan_digest(plan))
    small = convert(captured, plan, share=share)
    verification = check(captured, small, plan) if verify else None
    latency = ranks.of_first(lambda: measure_result(small, captured, plan, latencies)) if latencies else None
    report = make_report(
        captured, small, analysis, plan, verification, latency, statistics=gathered, arguments=arguments
    )
    return Pruned(small, plan, gathered, analysis, report, verification, captured, ranks)


def save(pruned: Pruned, folder: str | Path) -> Path:
    """Write a pruned network to a folder, without pickle; :func:`vbpfx.load` reads it.

    Args:
        pruned: what :func:`prune` returned.
        folder: where to; made if need be.

    Raises:
        ArtifactError: the folder cannot be written, or the network has no graph that can be stored.
    """
    return pruned.save(folder)


def require_batches(calibration: Iterable[Any]) -> Iterator[Any]:
    """The batches one after the other; a CalibrationError for what holds none."""
    if isinstance(calibration, (Tensor, Mapping)):
        raise CalibrationError(f"calibration is one {type(calibration).__name__}; pass an iterable of batches: [batch]")
    try:
        return iter(calibration)
    except TypeError as error:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, expected an iterable of batches"
        ) from error


def _given(options: PlanArguments, **others: Any) -> dict[str, Any]:
    """What differs from the defaults of :func:`prune`, JSON-ready; a function goes by its name."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(prune).parameters.items()}
    given = {**options, **{name: value for name, value in others.items() if value != defaults[name]}}
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return getattr(value, "__qualname__", str(value))


def _in_words(options: PlanArguments) -> str:
    """The budget and the method, so that runs can be compared."""
    given = {key: getattr(value, "__qualname__", value) for key, value in sorted(options.items()) if value is not None}
    return ", ".join(f"{key}={value!r}" for key, value in given.items())


def first_batch(calibration: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the data with that batch still in it; the data is gone through once."""
    iterator = require_batches(calibration)
    missing = object()
    first = next(iterator, missing)
    if first is missing:
        raise CalibrationError("the calibration data is empty: pass at least one batch")
    return first, itertools.chain([first], iterator)
