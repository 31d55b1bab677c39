"""The command ``vbpfx prune``."""

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
    Json,
    Model,
    NoOnnx,
    OutFolder,
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
from vbpfx.cli.data_options import DATA, ModelReading
from vbpfx.cli.option_groups import with_groups
from vbpfx.cli.plan_options import ModelPlanning
from vbpfx.cli.ranks import among_ranks

EXAMPLES = """\
[bold]Examples[/bold]

vbpfx prune timm:deit_small_patch16_224 --weights deit.safetensors --data photos/ --ratio 0.5 --out small

vbpfx prune my_package.models:build --data samples.npy --macs 0.7 --exclude 'head*' --out small

torchrun --nproc-per-node 2 -m vbpfx prune hf:folder --data texts.txt --params 0.8 --out small
"""


@with_groups
def prune(
    model: Model,
    data: Annotated[Path, typer.Option(help=f"Calibration samples without labels. {DATA}")],
    out: OutFolder,
    weights: Weights = None,
    *,
    planning: ModelPlanning,
    reading: ModelReading,
    device: Device = "cpu",
    no_onnx: NoOnnx = False,
    as_json: Json = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Prune a model on unlabelled data and write DIR: plan, weights, graph, report.html, model.onnx."""
    require_apart(planning.checkpoint, out)
    options, read = planning.arguments(), reading.arguments()
    with failing_in_one_line(debug), among_ranks(device, debug) as ranks, ExitStack() as stack:
        with busy(f"loading {model}", ranks.first):
            import torch

            from vbpfx.artifacts.folder import folder_for_artifact
            from vbpfx.data.sources import open_data
            from vbpfx.models.names import load_model
            from vbpfx.pipeline.model import prune as run_prune

            if ranks.first:
                stack.enter_context(folder_for_artifact(out))
            torch.manual_seed(reading.seed)
            network = load_model(model, weights).to(device_named(device))
            calibration = open_data(data, network, name=model, **read)
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
