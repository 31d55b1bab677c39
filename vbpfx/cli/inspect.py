"""The command ``vbpfx inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import (
    Color,
    Debug,
    Json,
    Samples,
    Shape,
    Tracing,
    Weights,
    busy,
    failing_in_one_line,
    one_of_shape_and_data,
)

EXAMPLES = """\
[bold]Examples[/bold]

vbpfx inspect timm:vit_tiny_patch16_224

vbpfx inspect my_package.models:build --shape 3x64x64 --json

vbpfx inspect my_package.models:of_two_inputs --data samples.npz

vbpfx inspect model.onnx --data samples.npz

vbpfx inspect torchvision:mobilenet_v3_small --block features.4 --graph block.svg
"""


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm:NAME, torchvision:NAME, hf:NAME-or-folder, module:callable of your own, or an ONNX file.",
        ),
    ],
    weights: Weights = None,
    shape: Shape = "",
    data: Samples = None,
    frontend: Tracing = "auto",
    min_width: Annotated[int | None, typer.Option(min=1, help="Smallest width of a block.")] = None,
    graph: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the channel graph of --block.")] = None,
    block: Annotated[str, typer.Option(help="The block to draw.")] = "",
    as_json: Json = False,
    color: Color = False,
    debug: Debug = False,
) -> None:
    """Show what could be pruned of a model: blocks, their share of it, refusals with reasons, what ratios would give."""
    if bool(block) != (graph is not None):
        raise typer.BadParameter("--block and --graph go together: --block NAME --graph FILE.svg")
    one = one_of_shape_and_data(shape, data)
    tracing: Any = frontend  # one of the names that inspect_model takes
    with failing_in_one_line(debug):
        with busy(f"loading {model}"):
            from vbpfx.inspection.summary import inspect_model

            found = inspect_model(model, weights, shape=one, data=data, frontend=tracing, min_width=min_width)
        if graph is not None:
            from vbpfx.inspection.channel_graph import channel_graph
            from vbpfx.storage.files import text_writer, write_atomically

            write_atomically({graph: text_writer(channel_graph(found.analysis, block))})
    typer.echo(json.dumps(found.to_json()) if as_json else str(found), nl=as_json)
