"""Calibrate: run the user's batches through a prepared graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import fx

from vbpfx.errors import CalibrationError, first_line
from vbpfx.inputs import Inputs, as_inputs, model_device
from vbpfx.prepare import observers

ReadBatch = Callable[[Any], Inputs]


def calibrate(
    observed: fx.GraphModule,
    data: Iterable[Any],
    *,
    read: ReadBatch | None = None,
    run: Callable[[Inputs], None] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> None:
    """Run every batch through the prepared graph, without gradients.

    Args:
        observed: what :func:`vbpfx.prepare` returned.
        data: batches; gone through once.
        read: from a batch to the arguments of the forward call; :func:`vbpfx.inputs.as_inputs` by default.
        run: runs a batch instead, where more is wanted than the statistics; it leaves the batch as it is.
        total: number of batches, where it is known.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: there is no batch, one does not fit the model, or one makes activations that are
            not finite. The message counts batches from 1 and names the block.
    """
    device, watching = model_device(observed), observers(observed)
    first: Inputs | None = None
    seen = 0
    run = run or functools.partial(run_forward, observed)
    with torch.no_grad(), progress_bar("calibrating", total, progress) as advance:
        for seen, batch in enumerate(data, start=1):
            inputs = (read(batch) if read is not None else as_inputs(batch, observed)).to(device)
            try:
                run(inputs)
            except Exception as error:  # the model's own operators raise whatever they raise
                raise CalibrationError(_misfit(seen, inputs, first, observed, error)) from error
            bad = next((o for o in watching if o.bad_call is not None), None)
            if bad is not None:
                raise CalibrationError(
                    f"batch {seen} (counted from 1) makes NaN or infinite activations in block {bad.name}; "
                    + _input_is_finite(inputs)
                )
            first = first or inputs
            advance()
    if not seen:
        raise CalibrationError(
            "the calibration data is empty: pass at least one batch (an iterator that was used up yields nothing)"
        )


def run_forward(observed: fx.GraphModule, inputs: Inputs) -> None:
    """One batch through the graph, without gradients."""
    with torch.inference_mode():
        inputs.run(observed)


def _misfit(seen: int, inputs: Inputs, first: Inputs | None, observed: fx.GraphModule, error: Exception) -> str:
    dtype = next((p.dtype for p in observed.parameters() if p.is_floating_point()), None)
    given = {t.dtype for t in inputs.tensors if t.is_floating_point()}
    cast = f"; the model computes in {dtype}: cast the batch to it" if dtype and given - {dtype} else ""
    fitted = f"\n  a batch that did: {first.describe()}" if first is not None else ""
    return f"batch {seen} (counted from 1) does not fit the model: {first_line(error)}\n  this batch: {inputs.describe()}{fitted}{cast}"


def _input_is_finite(inputs: Inputs) -> str:
    finite = all(bool(t.isfinite().all()) for t in inputs.tensors if t.is_floating_point())
    if finite:
        return "its input is finite: the model itself overflows, run it in a wider dtype"
    return "its input holds NaN or infinity already: leave that batch out"


@contextmanager
def progress_bar(title: str, total: int | None, progress: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if asked for; what is yielded moves it on by one."""
    if not progress:
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
