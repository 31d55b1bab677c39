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
        raise _failure(error) from error


@app.command()
def onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX file.")],
    data: Annotated[Path, typer.Option(help=".npy, or .npz with one array for each input, samples first.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    ratio: Annotated[float | None, typer.Option(help="Fraction of the hidden neurons to remove.")] = None,
    macs: Annotated[float | None, typer.Option(help="Fraction of the MACs to keep.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the parameters to keep.")] = None,
    method: Annotated[str, typer.Option(help="auto or vbp.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch; files of a fixed batch size say it.")] = 32,
    debug: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    from vbpfx.onnx_pipeline import calibration_file, prune_onnx  # torch takes seconds, which --help need not

    if sum(budget is not None for budget in (ratio, macs, params)) != 1:
        raise typer.BadParameter("state one of --ratio, --macs and --params")
    try:
        pruned = prune_onnx(
            source, calibration_file(source, data, batch), out, ratio=ratio, macs=macs, params=params, method=method
        )
    except VbpfxError as error:
        if debug:
            raise
        raise _failure(error) from error
    Console().print(str(pruned), markup=False, highlight=False)


def _failure(error: Exception) -> typer.Exit:
    """Exit status 1, with the reason on standard error."""
    Console(stderr=True).print(f"vbpfx: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def main() -> None:
    """Entry point: exit status 0 done, 1 failed with a one-line reason, 2 wrong usage."""
    app()
