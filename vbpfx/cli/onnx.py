"""``vbpfx onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vbpfx.cli.conventions import Debug, busy, failing_in_one_line, shows_progress
from vbpfx.cli.plan_options import (
    Allocation,
    Compensation,
    Criterion,
    Exclude,
    FittedOn,
    Include,
    Macs,
    Mask,
    Memory,
    Method,
    MethodOption,
    MinWidth,
    Params,
    Ratio,
    RoundTo,
    Runtime,
    Uniform,
    planning,
)


def onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX file.")],
    data: Annotated[
        Path,
        typer.Option(
            help=".npy, or .npz with one array for each input, under its name; samples stand where the file has them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    ratio: Ratio = None,
    macs: Macs = None,
    params: Params = None,
    method: MethodOption = Method.auto,
    criterion: Criterion = None,
    allocation: Allocation = None,
    compensation: Compensation = None,
    runtime: Runtime = None,
    round_to: RoundTo = None,
    min_width: MinWidth = None,
    include: Include = None,
    exclude: Exclude = None,
    uniform: Uniform = False,
    samples: FittedOn = None,
    memory: Memory = 8.0,
    mask: Mask = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch; files of a fixed batch size say it.")] = 32,
    debug: Debug = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    options = planning(
        {"ratio": ratio, "macs": macs, "params": params},
        method=method, criterion=criterion, allocation=allocation, compensation=compensation, runtime=runtime, round_to=round_to,
        mask=mask, min_width=min_width, include=include, exclude=exclude, uniform=uniform or None, samples=samples, memory=memory,
    )  # fmt: skip
    with failing_in_one_line(debug):
        with busy(f"loading {source}"):
            from vbpfx.onnx_graph.data import data_for_file
            from vbpfx.pipeline.onnx_file import prune_onnx

            calibration = data_for_file(source, data, batch=batch)
        pruned = prune_onnx(source, calibration, out, progress=shows_progress(), **options)
    typer.echo(str(pruned), nl=False)
