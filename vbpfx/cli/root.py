"""The command itself: its sub-commands and its version."""

from __future__ import annotations

from typing import Annotated

import typer

from vbpfx import __version__
from vbpfx.cli import eval as evaluation
from vbpfx.cli import finetune as tuning
from vbpfx.cli import inspect as inspecting
from vbpfx.cli import prune as pruning
from vbpfx.cli.bench import bench
from vbpfx.cli.conventions import INTERRUPTED, Color, say
from vbpfx.cli.demo import demo
from vbpfx.cli.onnx import onnx

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    color: Color = False,
) -> None:
    """Make trained networks smaller and faster without retraining them."""


app.command()(demo)
app.command(epilog=inspecting.EXAMPLES)(inspecting.inspect)
app.command(epilog=pruning.EXAMPLES)(pruning.prune)
app.command(epilog=tuning.EXAMPLES)(tuning.finetune)
app.command("eval", epilog=evaluation.EXAMPLES)(evaluation.evaluate)
app.command()(bench)
app.command()(onnx)


def main() -> None:
    """Entry point: exit status 0 done, 1 failed with a one-line reason, 2 wrong usage, 130 interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from None
