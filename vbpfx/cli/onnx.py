"""The command ``vbpfx onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vbpfx.cli.conventions import Debug, busy, failing_in_one_line, note, shows_progress
from vbpfx.cli.data_options import Reading
from vbpfx.cli.option_groups import with_groups
from vbpfx.cli.plan_options import Planning


@with_groups
def onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX file.")],
    data: Annotated[
        Path,
        typer.Option(
            help=".npy, or .npz with one array for each input, under its name, with samples along the file's batch axis. Or a folder of "
            "images, where the file takes images. A file of a fixed batch size is given batches of that size.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    planning: Planning,
    reading: Reading,
    debug: Debug = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    options, read = planning.arguments(), reading.arguments()
    with failing_in_one_line(debug):
        with busy(f"loading {source}"):
            from vbpfx.onnx_graph.data import data_for_file
            from vbpfx.pipeline.onnx_file import prune_onnx

            calibration = data_for_file(source, data, **read)
        note(str(calibration))
        pruned = prune_onnx(source, calibration, out, progress=shows_progress(), **options)
    typer.echo(str(pruned), nl=False)
