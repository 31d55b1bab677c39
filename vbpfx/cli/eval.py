"""``vbpfx eval``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vbpfx.cli.conventions import (
    Color,
    Debug,
    Device,
    busy,
    device_named,
    failing_in_one_line,
    note,
    note_random_weights,
    shows_progress,
)
from vbpfx.cli.data_options import (
    DATA,
    Bad,
    BadImages,
    Batch,
    Classes,
    Crop,
    Labels,
    Limit,
    MaxLength,
    Mean,
    Shape,
    Std,
    Workers,
    reading,
)
from vbpfx.cli.measured import InReport, add_to_report


class Compared(str, Enum):
    """The names of :data:`vbpfx.outputs.watched.OutputKind`."""

    logits = "logits"
    values = "values"


EXAMPLES = """\
[bold]Examples[/bold]

vbpfx eval small/ --dense timm:deit_small_patch16_224 --weights deit.safetensors --data val/

vbpfx eval timm:deit_small_patch16_224 --weights deit.safetensors --data val/ --labels val.csv
"""


def evaluate(
    network: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            help="Folder of the pruned network, to compare with --dense; or a model, alone or to compare likewise.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(help=f"Samples, with labels or without: then agreement (or the cosine) alone. {DATA}")
    ],
    dense: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="The dense model: timm:NAME, torchvision:NAME, hf:NAME-or-folder, module:callable."
        ),
    ] = "",
    weights: Annotated[Path | None, typer.Option(help="State dict of the dense model.")] = None,
    labels: Labels = None,
    classes: Classes = None,
    batch: Batch = 32,
    limit: Limit = None,
    bad_images: Bad = BadImages.refuse,
    workers: Workers = 0,
    shape: Shape = "",
    mean: Mean = "",
    std: Std = "",
    crop: Crop = None,
    max_length: MaxLength = None,
    compare: Annotated[
        Compared | None,
        typer.Option(
            help="What the outputs are: logits, or values such as embeddings, of which the cosine is taken. By default logits, where the "
            "output is one tensor or has logits."
        ),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="So many of the worst-hurt classes.")] = 10,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of what --limit chooses.")] = 0,
    report: InReport = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Compare a pruned network with the dense one on data: accuracy, agreement, divergence, worst-hurt classes."""
    is_folder = (Path(network) / "plan.json").is_file()
    if is_folder and not dense:
        raise typer.BadParameter(
            f"{network} is a pruned network: say what to compare it with, --dense MODEL --weights FILE"
        )
    source = reading(
        name=dense or network, batch=batch, limit=limit, seed=seed, bad_images=bad_images, workers=workers, labels=labels, classes=classes,
        shape=shape, mean=mean, std=std, crop=crop, max_length=max_length,
    )  # fmt: skip
    with failing_in_one_line(debug):
        with busy(f"loading {dense or network}"):
            from vbpfx.artifacts.folder import load_beside
            from vbpfx.data.sources import open_data
            from vbpfx.evaluation.evaluate import evaluate as run_evaluate
            from vbpfx.models.names import load_model
            from vbpfx.outputs.watched import OutputKind

            place = device_named(device)
            original = load_model(dense or network, weights).to(place)
            pruned = None
            if dense:
                pruned = (load_beside(Path(network), original) if is_folder else load_model(network)).to(place)
            samples = open_data(data, original, **source)
        note_random_weights(dense or network, weights)
        if dense and not is_folder:
            note_random_weights(network, None)
        note(str(samples))
        how: OutputKind | None = compare.value if compare else None
        found = run_evaluate(original, pruned, samples, classes=samples.classes, compare=how, progress=shows_progress())
        if is_folder and report:
            add_to_report(Path(network), evaluation=found.for_report() | {"data": str(data)})
    if as_json:
        read = {"data": str(data), "about": samples.about, "skipped": samples.skipped}
        typer.echo(json.dumps(read | found.to_json(), indent=1))
    else:
        typer.echo(found.text(worst), nl=False)
