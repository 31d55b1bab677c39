"""The ``vbpfx`` command: its sub-commands and its version."""

from __future__ import annotations

from typing import Annotated

import typer

from vbpfx import __version__
from vbpfx.cli.bench import bench
from vbpfx.cli.conventions import INTERRUPTED, Color, say
from vbpfx.cli.demo import demo
from vbpfx.cli.eval import EXAMPLES as OF_EVAL
from vbpfx.cli.eval import evaluate
from vbpfx.cli.finetune import EXAMPLES as OF_FINETUNE
from vbpfx.cli.finetune import finetune
from vbpfx.cli.inspect import EXAMPLES as OF_INSPECT
from vbpfx.cli.inspect import inspect
from vbpfx.cli.onnx import onnx
from vbpfx.cli.prune import EXAMPLES as OF_PRUNE
from vbpfx.cli.prune import prune

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
app.command(epilog=OF_INSPECT)(inspect)
app.command(epilog=OF_PRUNE)(prune)
app.command(epilog=OF_FINETUNE)(finetune)
app.command("eval", epilog=OF_EVAL)(evaluate)
app.command()(bench)
app.command()(onnx)


def main() -> None:
    """Run the command line. The exit status is 0 for success, 1 for an error, 2 for wrong usage, and 130 for Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from None
