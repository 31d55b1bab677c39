"""prune(): prune a model that is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.compiled import Compile
from vbpfx.data.inputs import Inputs, all_axes, as_inputs, reader, unlike_axes
from vbpfx.distributed.ranks import Ranks, Sharing, joining
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured, Frontend, capture, require_code_and_numbers, require_module
from vbpfx.pipeline.calibration import Calibration, first_batch, require_batches
from vbpfx.pipeline.in_memory import InMemory
from vbpfx.pipeline.result import Pruned
from vbpfx.pipeline.stages import EXAMPLE_SAMPLES, Made, run_stages
from vbpfx.pipeline.strategy import Fitting, Target
from vbpfx.planning.options import PlanArguments, PlanOptions, in_words
from vbpfx.rewrite.fidelity import capture_faithfully, warn_of_what_is_left_out
from vbpfx.storage.checkpoint import digest

# The number of batches of a list that are compared to see which sizes differ.
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
    """Make a trained network smaller: its hidden layers become narrower, and the next layer makes up for the removed neurons.

    >>> import torch, vbpfx
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    >>> pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, progress=False)
    >>> pruned.graph_module(torch.randn(3, 8)).shape, pruned.plan.widths
    (torch.Size([3, 4]), {'0->2': 16})

    Args:
        model: any module on any device. It is not changed.
        calibration: batches without labels: tensors, mappings of keyword arguments, or sequences. The labels of batches
            ``(inputs, labels)`` are ignored.
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        example_inputs: one batch to trace with. The default is the first batch of ``calibration``.
        frontend: see :func:`vbpfx.capture`.
        open_sizes: if ``torch.export`` traces the model, leave every input size open that the model allows to vary (lengths,
            image sizes). By default only the sizes in which the first batches of a list differ are open. ``captured.fixed``
            lists the sizes that stay fixed although the model takes others.
        mask: the argument that is the padding mask. ``attention_mask`` is found without it (see :func:`vbpfx.prepare`).
        reconstruct: fit the layers block after block (:mod:`vbpfx.reconstruction.reconstruct`). This is the default for
            ``method="auto"`` with its own compensation.
        refit: also fit the layers outside the blocks that write to the residual stream (attention's output projection), and
            convolutions outside the blocks.
            Their shapes stay. The default is the value of ``reconstruct``. The plan and the report name these layers.
        samples: how many calibration samples the reconstruction uses. It takes the first ones. By default it uses as many
            as its two streams can hold in three quarters of ``memory``, and at least 8.
        memory: GiB that calibration may hold beside the model and its covariances, 8 by default. They are for the samples
            that are kept, the two streams, and the activations of a pass. Larger batches run in parts (docs/method.md,
            "What it costs").
        progress: show a bar on standard error.
        verify: run the substitution oracle on the result.
        compile: calibrate with ``torch.compile`` (see :func:`vbpfx.calibrate`). This is possible if calibration consists of
            plain forward passes: with ``method="vbp"``, or with ``reconstruct=False``, whose sensitivities are measured
            without it.
        ranks: how the processes work together if ``torch.distributed`` is initialised. They share the work, and all end with
            the same plan (see :func:`vbpfx.calibrate` and docs/many_processes.md).
        checkpoint, checkpoint_every: a folder for what calibration has gathered (statistics, and gradients of
            ``method="auto"``), and the number of a process's batches after which it is written there. If prune is called again
            with the same arguments and data, it continues after those batches and ends with the same plan bit for bit. The
            steps after calibration are done again.
        runtime: where the network will run, a name in :data:`vbpfx.runtimes.adapters.NAMES`. ``latency=`` is measured there
            (in ONNX Runtime by default), and widths are multiples of a number that is fast there, unless ``round_to`` is
            given.
        runtime_batch, runtime_threads: the batch size and the number of threads with which ``latency=`` is measured. The
            runtime chooses the number of threads by default.
        options: the budget and the method, as :func:`vbpfx.make_plan` takes them: exactly one of ``ratio``
            (fraction of the hidden neurons to remove), ``macs``, ``params``, ``latency`` (fraction to keep), and
            ``method``, ``criterion``, ``compensation``, ``round_to``, ``min_width``, ``include``, ``exclude``.

    Raises:
        VbpfxError: one of its subclasses. The message says what was found, where, and what to do.
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
            "compile= works only for plain forward passes, and the reconstruction takes gradients and runs single layers. "
            "Pass reconstruct=False or method='vbp', or leave out compile="
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
    total = length_hint(calibration) or None
    settings = Calibration(data, total, mask, progress, ranks, checkpoint, checkpoint_every, compile)
    source = _Model(model, example, others, read, settings, frontend=frontend, faithfully=verify)
    return run_stages(source, options, fitting=fitting, target=target, verify=verify)


class _Model(InMemory[Pruned]):
    """A module in memory, with the calibration batches that it takes.

    Args:
        example: the inputs to trace with.
        others: further batches on which the graph is compared with the model.
        read: turns a batch into the arguments of a forward call.
        faithfully: whether to compare the outputs of the graph with those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        others: Sequence[Inputs],
        read: Callable[[Any], Inputs],
        calibration: Calibration,
        *,
        frontend: Frontend,
        faithfully: bool,
    ) -> None:
        super().__init__(calibration)
        self._model, self._example, self._others, self._read = model, example, others, read
        self._frontend, self._faithfully = frontend, faithfully

    def capture(self) -> Captured:
        """Return the model as a graph. Compare their outputs first if that was asked for."""
        model, example, frontend = self._model, self._example, self._frontend
        if self._faithfully:
            found = capture_faithfully(model, example, self._others, frontend=frontend, samples=EXAMPLE_SAMPLES)
        else:
            found = capture(model, example, frontend=frontend, samples=EXAMPLE_SAMPLES)
        self._captured = found
        return found

    def read(self, batch: Any) -> Inputs:
        """Return a batch as arguments of the graph, after a check that the graph takes their sizes."""
        found = self._read(batch).along(self._captured.inputs)
        self._captured.require_sizes(found)
        return found

    def result(self, made: Made) -> Pruned:
        """Return the narrowed graph and what belongs to it. Nothing is written; the caller may do so."""
        return Pruned(
            made.graph_module, made.plan, made.statistics, made.analysis, made.report, made.verification, made.captured,
            self.ranks,
        )  # fmt: skip


def _batches_at_hand(calibration: Iterable[Any], read: Callable[[Any], Inputs], ranks: Ranks) -> list[Inputs]:
    """Return the first batches if they are in a list that all ranks share, otherwise nothing. No iterator is used up."""
    if ranks.own or not isinstance(calibration, (list, tuple)):
        return []
    return [read(batch) for batch in calibration[:_LOOKED_AT]]
