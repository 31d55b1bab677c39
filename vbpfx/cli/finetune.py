"""The command ``vbpfx finetune``."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vbpfx.cli.choices import LOSSES, PRECISIONS, RECIPES, choice
from vbpfx.cli.conventions import (
    Color,
    Debug,
    DenseWeights,
    Json,
    NoOnnx,
    OutFolder,
    busy,
    command_line,
    failing_in_one_line,
    note,
    note_random_weights,
    require_apart,
    save_with_onnx,
    shows_progress,
)
from vbpfx.cli.data_options import DATA, LabelledReading
from vbpfx.cli.option_groups import with_groups
from vbpfx.cli.ranks import among_ranks

if TYPE_CHECKING:
    from vbpfx.finetuning.finetune import FineTuned

EXAMPLES = """\
[bold]Examples[/bold]

vbpfx finetune small/ --dense timm:deit_small_patch16_224 --weights deit.safetensors --data photos/ --out tuned

torchrun --nproc-per-node 2 -m vbpfx finetune small/ --dense hf:folder --data texts.txt --loss mse --shard --out tuned
"""

RECIPE = "Training"


@with_groups
def finetune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the pruned network.")],
    data: Annotated[Path, typer.Option(help=f"Samples to train on; labels are not needed. {DATA}")],
    dense: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The model that was pruned: timm:NAME, torchvision:NAME, hf:NAME-or-folder, module:callable.",
        ),
    ],
    out: OutFolder,
    weights: DenseWeights = None,
    recipe: Annotated[
        str, choice(RECIPES, rich_help_panel=RECIPE, help="few: for no more samples than pruning saw.")
    ] = "default",
    loss: Annotated[str, choice(LOSSES, rich_help_panel=RECIPE, help="kl for logits, mse for embeddings.")] = "kl",
    use_labels: Annotated[
        bool, typer.Option("--use-labels", rich_help_panel=RECIPE, help="Learn from the data's labels, too.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=RECIPE, help="Replaces the recipe's value.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(rich_help_panel=RECIPE, help="Replaces the recipe's value.", show_default=False)
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.99,
            rich_help_panel=RECIPE,
            help="Share of the samples that is not trained on and decides which epoch counts; 0 for none.",
        ),
    ] = 0.1,
    precision: Annotated[
        str, choice(PRECISIONS, rich_help_panel=RECIPE, help="Mixed precision; weights stay as they are.")
    ] = "no",
    accumulate: Annotated[
        int, typer.Option(min=1, rich_help_panel=RECIPE, help="Batches per optimizer step, in each process.")
    ] = 1,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", rich_help_panel=RECIPE, help="Divide both networks over the processes of torchrun (FSDP2)."
        ),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(rich_help_panel=RECIPE, help="Stop after this time, and keep the best weights so far."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(rich_help_panel=RECIPE, metavar="DIR", help="Folder from which interrupted training continues."),
    ] = None,
    *,
    reading: LabelledReading,
    no_onnx: NoOnnx = False,
    as_json: Json = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Train a pruned network to compute what the dense one computes, and write it to another folder."""
    require_apart(checkpoint, out)
    read = reading.arguments()
    training: dict[str, Any] = {
        "recipe": recipe, "loss": loss, "labels": use_labels, "epochs": epochs, "learning_rate": learning_rate,
        "held_out": held_out, "mixed_precision": precision, "accumulate": accumulate, "shard": shard, "max_seconds": max_seconds,
        "checkpoint": checkpoint, "seed": reading.seed,
    }  # fmt: skip
    with failing_in_one_line(debug), among_ranks(_device(), debug) as ranks:
        from vbpfx.artifacts.folder import folder_for_artifact
        from vbpfx.data.inputs import as_inputs
        from vbpfx.data.sources import open_data
        from vbpfx.finetuning.finetune import finetune as run_finetune
        from vbpfx.finetuning.tuned import open_tuning
        from vbpfx.models.names import load_model
        from vbpfx.pipeline.stages import EXAMPLE_SAMPLES

        with folder_for_artifact(out) if ranks.first else nullcontext():
            with busy(f"loading {dense}", ranks.first):
                model = load_model(dense, weights)
                samples = open_data(data, model, name=dense, **read)
                tuning = open_tuning(folder, model, as_inputs(next(iter(samples)), model).first(EXAMPLE_SAMPLES))
            if ranks.first:
                note_random_weights(dense, weights)
                note(str(samples))
                if tuning.as_graph:
                    note(f"trained as a graph, without dropout: {tuning.as_graph}")
            loader = samples.loader(shuffle=True)
            done = run_finetune(tuning.student, model, loader, progress=shows_progress(), **training)
            command = command_line()
            how = _in_words(done, samples.samples, recipe)

            def save(onnx: bool) -> Path:
                return ranks.write(lambda: tuning.save(done.model, out, onnx=onnx, how=how, command=command), out)

            save_with_onnx(save, out, onnx=not no_onnx, first=ranks.first)
        if ranks.first:
            if done.best.epoch == 0:
                note(f"no epoch was better on the held-out samples: {out} has the weights of {folder}; try smaller steps "
                     f"(--learning-rate, --recipe few) or more samples")  # fmt: skip
            typer.echo(json.dumps(_figures(done), indent=1) if as_json else f"{done}written to {out}")


def _device() -> str:
    """Return the device on which accelerate will compute."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"


def _in_words(done: FineTuned, samples: int, recipe: str) -> str:
    from vbpfx.display.tables import counted

    start, best = done.history[0].held_out_loss, done.best.held_out_loss
    losses = f", held-out loss {start:.4g} before, {best:.4g} after" if start is not None and best is not None else ""
    epochs = counted(done.history[-1].epoch, "epoch")
    return f"{counted(samples, 'sample')}, recipe {recipe}, {epochs}, the weights of epoch {done.best.epoch}{losses}"


def _figures(done: FineTuned) -> dict[str, Any]:
    from dataclasses import asdict

    return {"history": [asdict(epoch) for epoch in done.history], "best": done.best.epoch, "stopped": done.stopped}
