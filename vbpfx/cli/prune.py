"""``vbpfx prune``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from vbpfx.cli.conventions import (
    Color,
    Debug,
    Device,
    Frontend,
    Model,
    Tracing,
    Weights,
    busy,
    command_line,
    device_named,
    failing_in_one_line,
    note,
    note_random_weights,
    require_apart,
    save_with_onnx,
    shows_progress,
)
from vbpfx.cli.data_options import (
    DATA,
    Bad,
    BadImages,
    Batch,
    Crop,
    Limit,
    MaxLength,
    Mean,
    Shape,
    Std,
    Workers,
    reading,
)
from vbpfx.cli.group import among_ranks
from vbpfx.cli.plan_options import (
    CALIBRATION,
    Allocation,
    Compensation,
    Criterion,
    Exclude,
    FittedOn,
    Include,
    Latency,
    Macs,
    Mask,
    Memory,
    Method,
    MethodOption,
    MinWidth,
    Params,
    Place,
    Ratio,
    RoundTo,
    Runtime,
    Uniform,
    planning,
)

EXAMPLES = """\
[bold]Examples[/bold]

vbpfx prune timm:deit_small_patch16_224 --weights deit.safetensors --data photos/ --ratio 0.5 --out small

vbpfx prune my_package.models:build --data samples.npy --macs 0.7 --exclude 'head*' --out small

torchrun --nproc-per-node 2 -m vbpfx prune hf:folder --data texts.txt --params 0.8 --out small
"""


def prune(
    model: Model,
    data: Annotated[Path, typer.Option(help=f"Calibration samples without labels. {DATA}")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write: new, empty, or of an earlier result.")],
    ratio: Ratio = None,
    macs: Macs = None,
    params: Params = None,
    latency: Latency = None,
    weights: Weights = None,
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
    batch: Batch = 32,
    limit: Limit = None,
    bad_images: Bad = BadImages.refuse,
    workers: Workers = 0,
    shape: Shape = "",
    mean: Mean = "",
    std: Std = "",
    crop: Crop = None,
    max_length: MaxLength = None,
    mask: Mask = "",
    frontend: Tracing = Frontend.auto,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of what --limit chooses, and of random weights where none are given.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(rich_help_panel=CALIBRATION, metavar="DIR", help="Calibration goes on from there after a break."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=CALIBRATION,
            help="Calibrate with torch.compile, which pays for much data; with --method vbp.",
        ),
    ] = False,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Write no model.onnx.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Prune a model on unlabelled data and write DIR: plan, weights, graph, report.html, model.onnx."""
    if latency is not None and runtime == Place.none:
        raise typer.BadParameter("--latency is measured in a --runtime; none is not a runtime")
    if compiled and method != Method.vbp:
        raise typer.BadParameter(
            "--compile works only with --method vbp. The method auto also computes gradients, and gradients are not compiled. Pass --method vbp, or leave out --compile"
        )
    require_apart(checkpoint, out)
    options = planning(
        {"ratio": ratio, "macs": macs, "params": params, "latency": latency},
        method=method, criterion=criterion, allocation=allocation, compensation=compensation, runtime=runtime, round_to=round_to,
        mask=mask, min_width=min_width, include=include, exclude=exclude, uniform=uniform or None, samples=samples, memory=memory,
        frontend=frontend.value, checkpoint=checkpoint, compile=compiled or None,
    )  # fmt: skip
    source = reading(
        name=model, batch=batch, limit=limit, seed=seed, bad_images=bad_images, workers=workers,
        shape=shape, mean=mean, std=std, crop=crop, max_length=max_length,
    )  # fmt: skip
    with failing_in_one_line(debug), among_ranks(device, debug) as ranks, ExitStack() as stack:
        with busy(f"loading {model}", ranks.first):
            import torch

            from vbpfx.artifacts.folder import folder_for_artifact
            from vbpfx.data.sources import open_data
            from vbpfx.models.names import load_model
            from vbpfx.pipeline.model import prune as run_prune

            if ranks.first:
                stack.enter_context(folder_for_artifact(out))
            torch.manual_seed(seed)
            network = load_model(model, weights).to(device_named(device))
            calibration = open_data(data, network, **source)
        if ranks.first:
            note_random_weights(model, weights)
            note(str(calibration))
        pruned = run_prune(network, calibration, ranks=ranks, progress=shows_progress(), **options)
        with busy(f"writing {out}", ranks.first):
            command = command_line()
            save_with_onnx(
                lambda onnx: pruned.save(out, onnx=onnx, command=command), out, onnx=not no_onnx, first=ranks.first
            )
    if ranks.first:
        typer.echo(json.dumps(pruned.report.to_json()) if as_json else f"{pruned}written to {out}")
