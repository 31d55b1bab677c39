"""The command ``vbpfx eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.choices import OUTPUT_KINDS, choice
from vbpfx.cli.conventions import (
    Color,
    Debug,
    DenseWeights,
    Device,
    Json,
    busy,
    device_named,
    failing_in_one_line,
    note,
    note_random_weights,
    shows_progress,
)
from vbpfx.cli.data_options import DATA, PANEL, LabelledReading
from vbpfx.cli.measured import InReport, add_to_report
from vbpfx.cli.option_groups import with_groups

EXAMPLES = """\
[bold]Examples[/bold]

vbpfx eval small/ --dense timm:deit_small_patch16_224 --weights deit.safetensors --data val/

vbpfx eval timm:deit_small_patch16_224 --weights deit.safetensors --data val/ --labels val.csv
"""


@with_groups
def evaluate(
    network: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            help="Folder of a pruned network, or a model. Compared with --dense; a model may also be evaluated alone.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(help=f"Samples. Without labels, only agreement (or the cosine) is measured. {DATA}")
    ],
    dense: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="The dense model: timm:NAME, torchvision:NAME, hf:NAME-or-folder, module:callable."
        ),
    ] = "",
    weights: DenseWeights = None,
    *,
    reading: LabelledReading,
    classes: Annotated[
        Path | None,
        typer.Option(rich_help_panel=PANEL, help="Text file with the name of a class on each line, class 0 first."),
    ] = None,
    compare: Annotated[
        str | None,
        choice(
            OUTPUT_KINDS,
            help="What the outputs are: logits, or values such as embeddings, of which the cosine is taken. By default logits, where the "
            "output is one tensor or has logits.",
        ),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst-hurt classes to list.")] = 10,
    device: Device = "cpu",
    report: InReport = True,
    as_json: Json = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Compare a pruned network with the dense one on data: accuracy, agreement, divergence, worst-hurt classes."""
    is_folder = (Path(network) / "plan.json").is_file()
    if is_folder and not dense:
        raise typer.BadParameter(
            f"{network} is a pruned network: say what to compare it with, --dense MODEL --weights FILE"
        )
    read = reading.arguments()
    with failing_in_one_line(debug):
        with busy(f"loading {dense or network}"):
            from vbpfx.artifacts.folder import load_beside
            from vbpfx.data.sources import open_data
            from vbpfx.evaluation.evaluate import evaluate as run_evaluate
            from vbpfx.models.names import load_model

            place = device_named(device)
            original = load_model(dense or network, weights).to(place)
            pruned = None
            if dense:
                pruned = (load_beside(Path(network), original) if is_folder else load_model(network)).to(place)
            samples = open_data(data, original, name=dense or network, classes=classes, **read)
        note_random_weights(dense or network, weights)
        if dense and not is_folder:
            note_random_weights(network, None)
        note(str(samples))
        how: Any = compare  # one of the names that evaluate takes
        found = run_evaluate(original, pruned, samples, classes=samples.classes, compare=how, progress=shows_progress())
        if is_folder and report:
            add_to_report(Path(network), evaluation=found.for_report() | {"data": str(data)})
    if as_json:
        about = {"data": str(data), "about": samples.about, "skipped": samples.skipped}
        typer.echo(json.dumps(about | found.to_json(), indent=1))
    else:
        typer.echo(found.text(worst), nl=False)
