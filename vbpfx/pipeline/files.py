"""prune_files(): prune a model that does not fit in memory, from weight files to weight files.

The model is captured on the meta device, where its weights take no memory. Calibration goes through the graph piece by piece
(:mod:`vbpfx.pipeline.loading`): the weights of a piece are read just before it runs. Then the tensors are narrowed one by one
(:class:`vbpfx.rewrite.narrow.Changes`) and written shard by shard. The substitution oracle again reads the weights of both
networks piece by piece, those of the pruned network from the written files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import MaskArgument
from vbpfx.artifacts.folder import save_beside_weights
from vbpfx.calibration.prepare import Statistics
from vbpfx.data.inputs import Inputs, as_inputs, reader, unlike_axes
from vbpfx.errors import ArtifactError, CalibrationError, VerificationError, first_line
from vbpfx.graph.capture import Captured, Frontend, capture, share_parameters
from vbpfx.graph.precision import full_float32
from vbpfx.models.weightless import Weightless
from vbpfx.outputs.differences import tolerance_of
from vbpfx.pipeline.calibration import first_batch
from vbpfx.pipeline.loading import Loading, Loans, run_by_module, runnable
from vbpfx.pipeline.stages import EXAMPLE_SAMPLES, Made, Result, Source, run_stages
from vbpfx.pipeline.strategy import Fitting, Strategy, Target
from vbpfx.pipeline.streamed import Scored, Streaming, require_streamable, samples_of
from vbpfx.planning.budget import require_memory
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.plans.records import Plan
from vbpfx.report.make import count_bytes
from vbpfx.report.page import report_files
from vbpfx.report.report import Report
from vbpfx.rewrite.model_config import describe_widths, has_config
from vbpfx.rewrite.narrow import Changes
from vbpfx.rewrite.own_class import apply_plan
from vbpfx.rewrite.substitute import reference_graph
from vbpfx.rewrite.verify import Outputs, Verification, judge
from vbpfx.storage.files import require_new, whole_folder
from vbpfx.storage.tensors import INDEX, Stored, byte_count, write_shards

_CPU = torch.device("cpu")
_LARGEST_SHARD = 5 * 10**9  # for years the shard size of transformers
# The other files of a Hugging Face folder that belong to a model, such as its tokenizer and generation settings.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".md")


@dataclass(frozen=True)
class PrunedFiles(Result):
    """The result of :func:`prune_files`. Printing it shows the report.

    Attributes:
        folder: the folder of the pruned network. :func:`vbpfx.load` reads it; so does ``from_pretrained`` if
            ``hugging_face`` is true.
        plan, statistics, analysis, report, verification: what the stages made. The statistics hold no covariances.
        hugging_face: whether the folder has a ``config.json`` that describes the narrowed model.
    """

    folder: Path
    plan: Plan = field(repr=False)
    statistics: Statistics = field(repr=False)
    analysis: Analysis = field(repr=False)
    report: Report
    verification: Verification | None
    hugging_face: bool


def prune_files(
    model: str | Path | nn.Module,
    calibration: Iterable[Any],
    out: str | Path,
    *,
    weights: str | Path | Iterable[str | Path] | None = None,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    mask: MaskArgument | None = None,
    memory: float = 4.0,
    shard_size: int | str | None = None,
    progress: bool = True,
    verify: bool = True,
    **options: Unpack[PlanArguments],
) -> PrunedFiles:
    """Prune a model that does not fit in memory: :func:`vbpfx.prune` from files to files.

    The result is the same as that of :func:`vbpfx.prune` with the same options. Everything is computed on the CPU, in the
    precision that the model was built in. For a Hugging Face folder this is float32, whatever the precision of its files.
    The weights are written in the precision of the files.

    Args:
        model: a Hugging Face folder (``config.json`` and safetensors, in one file or sharded), or a module that was
            built under :func:`vbpfx.without_weights`.
        calibration: batches as :func:`vbpfx.prune` takes them. They are held in memory.
        out: the folder to write, which must not exist yet. It gets ``model.safetensors``, or shards and their index, and the
            files that :func:`vbpfx.load` needs. If a Hugging Face configuration can describe the result (``uniform=True``),
            it also gets the narrowed ``config.json`` and the other small files of the model's folder. The folder appears
            when all files are complete.
        weights: the safetensors files that hold the state dict of a module, or a folder of them.
        inputs, example_inputs, frontend, mask: see :func:`vbpfx.prune`.
        memory: GiB, half of them for weights and half for the values that the batches hold between two pieces of the graph.
            PyTorch itself, one batch's activations, the plan, and a block's covariance if the options need it come on top.
            If the batches do not fit, there are several passes through the graph.
        shard_size: bytes of a shard, or text such as ``"500MB"``. A shard is held in memory while it is written. The default
            is half of ``memory``, and 5 GB at most.
        progress: show bars on standard error.
        verify: run the substitution oracle on the written weights.
        options: as for :func:`vbpfx.make_plan`. The default of ``method`` is ``"vbp"``. Options that need the whole model are
            refused: reconstruction (``method="auto"`` with its own compensation), ``allocation="sensitivity"``, ``latency=``.

    Raises:
        VbpfxError: one of its subclasses. The message says what was found, where, and what to do. ``out`` is not created.
    """
    options.setdefault("method", "vbp")
    folder = Path(out)
    require_streamable(PlanOptions.of(**options))
    limit = _shard_limit(shard_size, memory)
    require_new(folder)
    hollow = Weightless.of(model, weights)
    read = reader(hollow.model, inputs)
    _, data = first_batch(calibration)
    batches = [found for batch in data if not (found := read(batch).to(_CPU)).is_empty]
    if not batches:
        raise CalibrationError("the calibration data is empty: no batch holds a sample")
    example = batches[0] if example_inputs is None else as_inputs(example_inputs, hollow.model).to(_CPU)
    example = replace(example, open=unlike_axes([example, *batches]))
    source = _WeightFiles(
        hollow, example, batches, folder, frontend=frontend, mask=mask, memory=memory, limit=limit, progress=progress
    )
    return run_stages(source, options, fitting=Fitting(), target=Target(), verify=verify)


class _WeightFiles(Source[Scored, PrunedFiles]):
    """A model on the meta device with its weights in files.

    Args:
        hollow: the model.
        example: the inputs to trace with.
        batches: the calibration data.
        out: the folder to write.
        memory: GiB, half of them for weights.
        limit: the largest size of a shard, in bytes.
    """

    def __init__(
        self,
        hollow: Weightless,
        example: Inputs,
        batches: Sequence[Inputs],
        out: Path,
        *,
        frontend: Frontend,
        mask: MaskArgument | None,
        memory: float,
        limit: int,
        progress: bool,
    ) -> None:
        self._hollow, self._example, self._batches, self._out = hollow, example, batches, out
        self._frontend: Frontend = frontend
        self._mask, self._memory, self._limit, self._progress = mask, memory * 2**30 / 2, limit, progress
        self._loans = Loans(hollow.stored, hollow.names, hollow.buffers)

    def capture(self) -> Captured:
        """Return the model as a graph on the meta device."""
        captured = capture(self._hollow.model, self._example, frontend=self._frontend, samples=EXAMPLE_SAMPLES)
        example, *self._batches = [batch.along(captured.inputs) for batch in (self._example, *self._batches)]
        self._example = example.first(captured.inputs.batch_size or 0)
        return captured

    def observe(self, analysis: Analysis, strategy: Strategy) -> Scored:
        """Run all batches through the graph piece by piece. Score every block as soon as its statistics are complete."""
        self._streaming = Streaming(
            analysis, strategy.chosen, self._loans, self._batches,
            mask=self._mask, memory=self._memory, progress=self._progress,
        )  # fmt: skip
        return self._streaming.score()

    def plan(self, analysis: Analysis, strategy: Strategy, observed: Scored, latencies: Latencies | None) -> Plan:
        """Make the plan. If its compensation needs covariances, this takes a second pass through the graph."""
        return self._streaming.plan(observed)

    @contextmanager
    def writing(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Iterator[None]:
        """Write the narrowed weights to a temporary folder, which is renamed to ``out`` when everything is in it."""
        self._own = _own_class(self._hollow, plan, self._loans)
        with whole_folder(self._out) as self._temporary:
            self._written = _write_weights(self._hollow, plan, self._own, self._temporary, self._limit)
            yield

    def verify(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Verification:
        """Run the substitution oracle on the written weights."""
        written = Loans(Stored.of(self._temporary), self._written, self._hollow.buffers)
        return _verify(captured, small, plan, self._example, self._loans, written, self._memory)

    def result(self, made: Made) -> PrunedFiles:
        """Write the report, the plan, the graph and the configuration beside the weights."""
        hollow, folder = self._hollow, self._temporary
        dense, narrow = _stored_bytes(hollow, hollow.stored), _stored_bytes(hollow, Stored.of(folder))
        report = replace(made.report, size=(dense, narrow))
        if self._own is not None:
            _write_configuration(hollow, self._own, folder)
        network = runnable(share_parameters(made.graph_module))
        files = report_files(report)
        save_beside_weights(network, made.plan, files, folder, stored=self._written, others=hollow.buffers)
        return PrunedFiles(
            self._out, made.plan, made.statistics, made.analysis, report, made.verification, self._own is not None
        )


def _shard_limit(shard_size: int | str | None, memory: float) -> int:
    require_memory(memory)
    limit = byte_count(shard_size) if shard_size is not None else min(_LARGEST_SHARD, int(memory * 2**29))
    if limit > memory * 2**30:
        raise ArtifactError(
            f"a shard of {limit / 2**30:.1f} GiB does not fit in memory={memory:g} (GiB), and a shard is held in memory while it "
            f"is written: raise memory=, or lower shard_size="
        )
    return limit


def _own_class(hollow: Weightless, plan: Plan, loans: Loans) -> nn.Module | None:
    """Return the narrowed model in its own class, without weights, or None if no configuration describes it.

    Raises:
        ArtifactError: ``uniform=True`` was asked for, and the configuration cannot describe the result.
    """
    if hollow.folder is None or not has_config(hollow.model):
        return None
    norms = {reduction.module for entry in plan.blocks for reduction in entry.block.reductions if reduction.module}
    tried = [f"{path}.{name}" for path in norms for name, _ in hollow.model.get_submodule(path).named_parameters()]
    try:
        with loans.lent(hollow.model, tried):  # apply_plan runs norms on numbers, which needs their weights
            own = apply_plan(hollow.model, plan)
    except ArtifactError:
        if plan.settings["uniform"]:
            raise
        return None
    return None if describe_widths(own, plan) else own


def _write_weights(
    hollow: Weightless, plan: Plan, own: nn.Module | None, folder: Path, limit: int
) -> Mapping[str, str]:
    """Write the narrowed weights. Return name in the model -> stored name."""
    stored, changes = hollow.stored, Changes(plan)
    # a tied tensor may be stored under several names, or under another name than in the plan: it is written once
    changed = {hollow.names[name]: name for name in changes.names if name not in changes.made}
    further_names = {name for name, source in hollow.names.items() if name != source}
    shapes = {
        name: changes.of(changed[name], lambda n: stored.shapes[hollow.names[n]]) if name in changed else shape
        for name, shape in stored.shapes.items()
        if name not in further_names
    }
    shapes |= {name: changes.of(name, lambda n: stored.shapes[hollow.names[n]]) for name in changes.made}
    dense = {name: stored.shapes[source].dtype for name, source in hollow.names.items()}
    further: dict[str, Tensor] = {}
    for name, tensor in own.named_parameters() if own is not None else ():
        if (
            name not in shapes and name not in hollow.names
        ):  # a bias of zeros, because the configuration puts biases on all layers or on none
            weight = f"{name.rpartition('.')[0]}.weight"
            further[name] = tensor.to(dense.get(weight, tensor.dtype))

    def make(name: str) -> Tensor:
        if name in further:
            return torch.zeros(further[name].shape, dtype=further[name].dtype)
        if name in changed or name in changes.made:
            return changes.of(changed.get(name, name), lambda n: stored.read(hollow.names[n]))
        return stored.read(name)

    write_shards(shapes | further, make, folder, limit)
    return {name: name for name in shapes | further} | dict(hollow.names)


def _stored_bytes(hollow: Weightless, stored: Stored) -> int:
    """Return the bytes of a network: its tensors in the files, and the buffers that no file holds."""
    further_names = {name for name, source in hollow.names.items() if name != source}
    own = {name: shape for name, shape in stored.shapes.items() if name not in further_names}
    return count_bytes({**own, **hollow.buffers})


@full_float32()
def _verify(
    captured: Captured, small: fx.GraphModule, plan: Plan, example: Inputs, dense: Loans, pruned: Loans, memory: float
) -> Verification:
    """Run the substitution oracle. Only one network has its weights in memory at a time."""

    def run(network: fx.GraphModule, loans: Loans) -> list[Tensor]:
        return Loading(runnable(network), loans, samples_of(captured), memory).run([example])[0]

    try:
        own = run_by_module(captured.reference, dense, example)
    except Exception as failure:  # the model's own code may raise any exception
        raise VerificationError(
            f"{type(captured.reference).__name__} does not run if each module has its weights only while its forward runs "
            f"({first_line(failure)}): it reads the weights of modules that it does not call. Pass verify=False to leave out the "
            f"substitution oracle"
        ) from failure
    outputs = Outputs(
        dense=run(share_parameters(captured.graph_module), dense),
        model=own,
        substituted=run(reference_graph(captured, plan), dense),
        pruned=run(share_parameters(small), pruned),
    )
    stored = {shape.dtype for shape in pruned.stored.shapes.values() if shape.is_floating_point()}
    precisions = stored | {t.dtype for t in outputs.dense}
    return judge(outputs, plan, tolerance=tolerance_of(precisions) if precisions else None)


def _write_configuration(hollow: Weightless, own: Any, folder: Path) -> None:
    """Write ``config.json`` of the narrowed model, and copy the other files of its folder that are not weights."""
    assert hollow.folder is not None
    for name, value in hollow.restored.items():
        setattr(own.config, name, value)
    for path in hollow.folder.iterdir():
        if path.is_file() and path.suffix in _COMPANIONS and not path.name.endswith(INDEX.partition(".")[2]):
            shutil.copyfile(path, folder / path.name)
    own.config.save_pretrained(folder)
