"""Calibrate: run the user's batches through a prepared graph to gather its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from vbpfx.calibration.checkpoint import CalibrationFile, Work
from vbpfx.calibration.compiled import Compile, compiling, forward_passes
from vbpfx.calibration.gathered import over_all_ranks
from vbpfx.calibration.moments import answers_at_once
from vbpfx.calibration.prepare import observers
from vbpfx.data.inputs import Inputs, as_inputs, model_device
from vbpfx.display.progress import progress_bar
from vbpfx.distributed.ranks import Ranks, Sharing, joining
from vbpfx.errors import CalibrationError, first_line

ReadBatch = Callable[[Any], Inputs]


@joining
def calibrate(
    observed: fx.GraphModule,
    data: Iterable[Any],
    *,
    read: ReadBatch | None = None,
    work: Work | None = None,
    compile: Compile = False,
    total: int | None = None,
    progress: bool = False,
    ranks: Sharing | Ranks = "share",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run every batch through the prepared graph, without gradients.

    If ``torch.distributed`` is initialised, every rank runs its share of the data. At the end all ranks have the
    statistics of all data, as one process would have gathered them (up to the rounding of float64 sums).

    Args:
        observed: what :func:`vbpfx.prepare` returned.
        data: an iterable of batches; it is iterated once.
        read: a function from a batch to the arguments of the forward call; :func:`vbpfx.data.inputs.as_inputs` by
            default.
        work: what to do with every batch in place of a plain forward pass, if more than the statistics is wanted.
        compile: run the parts of the graph between the observers compiled by ``torch.compile``. A mapping holds
            arguments of ``torch.compile``, such as ``{"mode": "reduce-overhead"}``, which uses CUDA graphs. Code is
            compiled when the shapes of a batch occur for the second time, and for any size once two different shapes
            were compiled. It pays for large data sets only: see docs/performance.md. The prepared graph is not changed.
        total: number of batches, if it is known.
        progress: show a bar on standard error, with the time left if ``total`` is known.
        ranks: how N processes divide the data. With ``"share"`` all of them get the same data in the same order, and
            rank r runs batches r, r + N, r + 2N, ... With ``"own"`` every rank gets data of its own (from a
            ``DistributedSampler``) and runs all of it. With ``"alone"`` this process works independently of others.
        checkpoint, checkpoint_every: a folder for checkpoints. The statistics so far are written there every
            ``checkpoint_every`` batches of a rank, and at the end. If there is a checkpoint already, the batches that
            it covers are read again but not run, and the final statistics are bit for bit the same as without an
            interruption. The data must come in the same order; some of its values are compared to check this.
        settings: other settings of this run; a checkpoint is used only if they are the same.

    Raises:
        CalibrationError: the model's weights have no values, there is no batch, a batch does not fit the model, or a
            batch causes activations that are not finite. The message counts batches from 1 and names the block. On a
            GPU activations are checked only at checkpoints and at the end, because checking every batch would delay the
            next one. Or ``torch.compile`` cannot compile the network, or does not accept the arguments.
        ArtifactError: the checkpoint is damaged, belongs to another model, other settings or other data, or cannot be
            written.
        RankError: another rank has failed or died.
    """
    assert isinstance(ranks, Ranks)  # joined
    ranks.require_whole(data)
    device, watching = model_device(observed), observers(observed)
    if device.type == "meta":
        raise CalibrationError(
            "the model is on the meta device, where its weights have no values: load them, or prune from files to files "
            "(vbpfx.prune_files)"
        )
    if work is not None and compile is not False:
        raise CalibrationError("work= runs the batches its own way, which compile= cannot change: pass one of them")
    work = work or forward_passes(observed, compile)
    settings = compiling(compile) | dict(settings or {})
    earlier, numbered = [o.moments for o in watching], [o.rows for o in watching]
    for observer in watching:
        observer.moments = None
    file = CalibrationFile.of(checkpoint, checkpoint_every, observed, ranks, settings)
    done = file.load(watching, work, device) if file else 0
    called: list[int] = [o.calls for o in watching]
    ran: list[int] = []
    first: Inputs | None = None
    start = seen = own = 0
    share = None if total is None else ranks.share_of(total)
    try:
        with torch.no_grad(), progress_bar("calibrating", share, progress and ranks.first, done) as advance:
            for seen, batch in enumerate(data, start=1):
                ranks.watch()
                inputs = read(batch) if read is not None else as_inputs(batch, observed)
                if inputs.is_empty:
                    continue
                samples = inputs.batch_size or 1
                number = start * ranks.count + ranks.rank * samples if ranks.own else start
                start += samples
                if not ranks.takes(seen - 1):
                    continue
                own += 1
                if file:
                    file.note(inputs, own)
                if own <= done:
                    work.run_before(inputs.to(device), number)
                    continue
                inputs = inputs.to(device)
                for observer, rows in zip(watching, numbered, strict=True):
                    observer.rows = rows + number * observer.rows_a_sample
                try:
                    work.run(inputs, number)
                except CalibrationError:
                    raise
                except Exception as error:  # the model's own operators raise whatever they raise
                    raise CalibrationError(misfit(seen, inputs, first, observed, error)) from error
                ran += [seen] * (watching[0].calls - called[0] - len(ran))
                if answers_at_once(device):
                    _require_finite(observed, called, ran, inputs)
                first = first or inputs
                advance()
                if file and own % file.every == 0:
                    _require_finite(observed, called, ran)
                    file.save(watching, work, own)
        _require_finite(observed, called, ran)
        if file:
            file.finish(watching, work, own)
        if not (ranks.sums([start])[0] if ranks.own else start):
            raise CalibrationError(
                "the calibration data is empty: pass at least one batch with a sample (an iterator that was used up yields nothing)"
            )
        if ranks.count > 1:
            everyones = over_all_ranks([o.moments for o in watching], [o.width for o in watching], device, ranks)
            for observer, moments in zip(watching, everyones, strict=True):
                observer.moments = moments
    finally:
        for observer, before, rows in zip(watching, earlier, numbered, strict=True):
            observer.moments = before | observer.moments if before and observer.moments else observer.moments or before
            observer.rows = rows + start * observer.rows_a_sample


def misfit(seen: int, inputs: Inputs, first: Inputs | None, observed: fx.GraphModule, error: Exception) -> str:
    """Return the message for a batch that the graph does not run on; ``first`` is a batch that it did run on."""
    dtype = next((p.dtype for p in observed.parameters() if p.is_floating_point()), None)
    given = {t.dtype for t in inputs.tensors if t.is_floating_point() or t.dtype == torch.uint8}  # uint8: stored images
    cast = f"; the model computes in {dtype}: cast the batch to it" if dtype and given - {dtype} else ""
    fitted = f"\n  a batch that did: {first.describe()}" if first is not None else ""
    return f"batch {seen} (counted from 1) does not fit the model: {first_line(error)}\n  this batch: {inputs.describe()}{fitted}{cast}"


def _require_finite(
    observed: fx.GraphModule, called: Sequence[int], ran: Sequence[int], last: Inputs | None = None
) -> None:
    """Raise a CalibrationError if activations are not finite. It names the first such batch, and the first block in it.

    Args:
        called: how often every observer had been called before this run.
        ran: the batch number of every call in this run.
        last: the last batch, if only its activations need the check.
    """
    watching = zip(observers(observed), called, strict=True)
    found = [(o.bad_call - before, o.name) for o, before in watching if o.bad_call is not None]
    if not found or not ran:
        return
    call, name = min(found, key=lambda entry: entry[0])
    raise CalibrationError(not_finite(ran[max(0, call)], name, last, observed))


def not_finite(seen: int, block: str, inputs: Inputs | None, observed: fx.GraphModule) -> str:
    """Return the message for a batch that causes NaN or infinite activations.

    Args:
        inputs: the batch, if it is still there.
    """
    parameters = ((name, p) for name, p in observed.named_parameters() if not p.is_meta)
    bad = next((name for name, parameter in parameters if not bool(parameter.isfinite().all())), None)
    if bad is not None:
        advice = f"parameter {bad} of the model holds NaN or infinity: load or train its weights again"
    elif inputs is None:
        advice = "leave it out if its input is not finite, or run the model in a wider dtype"
    elif all(bool(t.isfinite().all()) for t in inputs.tensors if t.is_floating_point()):
        advice = "its input is finite: the model itself overflows, run it in a wider dtype"
    else:
        advice = "its input holds NaN or infinity already: leave that batch out"
    return f"batch {seen} (counted from 1) makes NaN or infinite activations in block {block}; {advice}"
