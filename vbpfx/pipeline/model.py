"""The whole way through: prune() is the visible list of stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import fx, nn
from typing_extensions import Unpack

from vbpfx.analysis.blocks import find_blocks
from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.compiled import Compile
from vbpfx.calibration.prepare import prepare
from vbpfx.data.inputs import Inputs, all_axes, as_inputs, reader, unlike_axes
from vbpfx.distributed.ranks import Ranks, Sharing, joining
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured, Frontend, capture, require_code_and_numbers, require_module
from vbpfx.measurement.latency import measure_result
from vbpfx.measurement.sensitivity import sensitivities
from vbpfx.pipeline.gathering import Calibration, Run, first_batch, gather, require_batches
from vbpfx.pipeline.result import Pruned
from vbpfx.pipeline.strategy import Fitting, Strategy, Target
from vbpfx.planning.options import PlanArguments, PlanOptions, in_words
from vbpfx.planning.plan import make_plan
from vbpfx.planning.scores import name_of
from vbpfx.plans.files import plan_digest
from vbpfx.reconstruction.reconstruct import reconstruct as reconstruct_plan
from vbpfx.report.make import make_report
from vbpfx.rewrite.convert import convert
from vbpfx.rewrite.fidelity import capture_faithfully, warn_of_what_is_left_out
from vbpfx.rewrite.verify import verify as check
from vbpfx.storage.checkpoint import digest

# Tracing looks at shapes alone; the oracle runs three networks, and a few samples are enough for it.
EXAMPLE_SAMPLES = 4
# So many batches of a list are looked at to see which sizes differ.
_LOOKED_AT = 64


@joining
def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    open_sizes: bool = False,
    mask: MaskArgument | None = None,
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
        open_sizes: where ``torch.export`` traces the model, leave all sizes of the inputs open that the model allows (lengths, image
            sizes), rather than those alone in which the first batches of a list differ. Sizes that stay fixed though the model
            takes others are in ``captured.fixed``.
        mask: the argument that is the padding mask; ``attention_mask`` is found by itself (see :func:`vbpfx.prepare`).
        reconstruct: fit the layers block after block (:mod:`vbpfx.reconstruction.reconstruct`); by default where ``method="auto"`` is taken
            with its own compensation.
        refit: fit layers beside the blocks, too, that write to the residual stream (attention's output projection);
            their shapes stay. By default as ``reconstruct``. The plan and the report name them.
        samples: how many calibration samples the reconstruction takes, the first ones; by default as many as its two streams
            can hold in three quarters of ``memory``, and at least 8.
        memory: GiB that calibration may hold beside the model and its covariances, 8 by default: the samples that are kept, the
            streams, and what a pass makes on its way; batches that are larger run in parts (docs/method.md, "What it costs").
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
    require_code_and_numbers(model)
    ranks.require_whole(calibration)
    if ranks.count > 1:
        ranks.meet("model", digest(model))
        ranks.meet("choice of options", in_words(options))
    # a mistake in these should not cost a capture
    chosen = PlanOptions.of(**options)
    fitting, target = Fitting(reconstruct, refit, samples, memory), Target(runtime, runtime_batch, runtime_threads)
    if compile is not False and fitting.fits(chosen):
        raise CalibrationError(
            "compile= is for forward passes alone; the reconstruction takes gradients and runs layers one by one, "
            "which is not compiled: pass reconstruct=False or method='vbp' with it, or leave compile out"
        )
    read = reader(model, inputs)
    data: Iterable[Any] = require_batches(calibration)
    if example_inputs is None:
        first, data = first_batch(data)
        example_inputs = read(first)
        if inputs is None:
            warn_of_what_is_left_out(model, first)
    example = as_inputs(example_inputs, model)
    if example.is_empty:
        raise CalibrationError("the batch to trace with (the first one) holds no sample; pass example_inputs= with one")
    others = _batches_at_hand(calibration, read, ranks) if verify else []
    example = replace(example, open=all_axes(example) if open_sizes else unlike_axes([example, *others]))
    captured = (
        capture_faithfully(model, example, others, frontend=frontend, samples=EXAMPLE_SAMPLES)
        if verify
        else capture(model, example, frontend=frontend, samples=EXAMPLE_SAMPLES)
    )

    def read_alike(batch: Any) -> Inputs:
        found = read(batch).along(captured.inputs)
        captured.require_sizes(found)
        return found

    total = length_hint(calibration) or None
    return prune_captured(
        captured,
        Calibration(
            data,
            read_alike,
            total,
            mask,
            progress,
            ranks,
            checkpoint,
            checkpoint_every,
            compile,
        ),
        options,
        fitting=fitting,
        target=target,
        verify=verify,
    )


def _batches_at_hand(calibration: Iterable[Any], read: Callable[[Any], Inputs], ranks: Ranks) -> list[Inputs]:
    """The first batches where they can be looked at without going through the data, and all ranks have the same."""
    if ranks.own or not isinstance(calibration, (list, tuple)):
        return []
    return [read(batch) for batch in calibration[:_LOOKED_AT]]


def prune_captured(
    captured: Captured,
    calibration: Calibration,
    options: PlanArguments,
    *,
    fitting: Fitting,
    target: Target,
    forward: Callable[[fx.GraphModule], Run | None] | None = None,
    share: bool = False,
    verify: bool = True,
) -> Pruned:
    """The stages behind the capture, in order.

    Args:
        forward: from the prepared graph to what runs a batch for its observers; the graph itself where it is left out, or
            gives None.
        share: see :func:`vbpfx.convert`.
        verify: see :func:`prune`.
    """
    ranks, progress = calibration.ranks, calibration.progress
    analysis = find_blocks(captured)
    strategy = Strategy.of(analysis, fitting, **target.rounded(options, analysis))
    observed = prepare(
        captured, analysis, blocks=strategy.blocks, mask=calibration.mask, covariance=strategy.covariance
    )
    by_latency = strategy.chosen.budget.kind == "latency"
    latencies = ranks.of_first(lambda: target.latencies(analysis, strategy)) if by_latency else None
    run = forward(observed) if forward else None
    gathered = gather(captured, observed, run, calibration, strategy)
    del run, observed  # a runtime may hold the whole network in memory
    plan = make_plan(
        analysis,
        gathered.statistics,
        sensitivity=lambda alike: sensitivities(analysis, alike, gathered.samples, progress=progress),
        latencies=latencies,
        **strategy.options,
    )
    if strategy.fits:
        plan = reconstruct_plan(
            analysis, plan, gathered.samples, gathered.influence,
            beside=strategy.beside, choose=strategy.chooses, mask=calibration.mask, progress=progress,
        )  # fmt: skip
    if ranks.count > 1:
        ranks.meet("plan", plan_digest(plan))
    small = convert(captured, plan, share=share)
    verification = check(captured, small, plan) if verify else None
    latency = ranks.of_first(lambda: measure_result(small, captured, plan, latencies)) if latencies else None
    report = make_report(
        captured, small, analysis, plan, verification, latency,
        statistics=gathered.statistics, arguments=_given(captured, calibration, options, fitting, target),
    )  # fmt: skip
    return Pruned(small, plan, gathered.statistics, analysis, report, verification, captured, ranks)


def _given(
    captured: Captured, calibration: Calibration, options: PlanArguments, fitting: Fitting, target: Target
) -> dict[str, Any]:
    """What differs from the defaults of :func:`prune`, JSON-ready; a function goes by its name."""
    frontend = "export" if captured.frontend == "export" else "auto"
    others = {
        "mask": calibration.mask,
        "compile": calibration.compile,
        **vars(fitting),
        **vars(target),
        "frontend": frontend,
        "open_sizes": bool(captured.inputs.open) and captured.inputs.open == all_axes(captured.inputs),
    }
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
    return name_of(value)
