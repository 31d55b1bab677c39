"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vbpfx import __version__
from vbpfx.errors import VbpfxError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained networks smaller and faster without retraining them."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files, the artifact and the plot.")] = Path(
        "demo-output"
    ),
    debug: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False,
) -> None:
    """Prune a really trained network on real data that need no download; about a minute on two cores."""
    from vbpfx.demo.run import run_demo  # its extras (timm, scikit-learn, matplotlib) are wanted by this command alone

    try:
        run_demo(out, Console())
    except (VbpfxError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True).print(f"vbpfx: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point: exit status 0 done, 1 failed with a one-line reason, 2 wrong usage."""
    app()
