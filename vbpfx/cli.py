"""The command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vbpfx import __version__
from vbpfx.artifact import load
from vbpfx.bench import bench as run_bench
from vbpfx.bench import bench_files
from vbpfx.errors import VbpfxError
from vbpfx.files import json_writer, write_atomically
from vbpfx.model_names import file_inputs, load_model, typical_inputs

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


@contextmanager
def _failing_in_one_line(debug: bool) -> Iterator[None]:
    """What goes wrong on purpose is one line and exit status 1."""
    try:
        yield
    except (VbpfxError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"vbpfx: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


_Debug = Annotated[bool, typer.Option(help="Show the whole traceback of an error.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files, the artifact and the plot.")] = Path(
        "demo-output"
    ),
    debug: _Debug = False,
) -> None:
    """Prune a really trained network on real data that need no download; about a minute on two cores."""
    from vbpfx.demo.run import run_demo  # its extras (timm, scikit-learn, matplotlib) are wanted by this command alone

    with _failing_in_one_line(debug):
        run_demo(out, Console())


@app.command()
def bench(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder of the pruned network, as vbpfx.save wrote it.")
    ] = None,
    dense: Annotated[
        str,
        typer.Option(
            help="The dense model: timm:NAME, torchvision:NAME, hf:NAME-or-folder, module:callable; or FILE.onnx."
        ),
    ] = "",
    weights: Annotated[Path | None, typer.Option(help="State dict of the dense model; speed does not need it.")] = None,
    pruned: Annotated[Path | None, typer.Option(help="FILE.onnx of the pruned network, in place of DIR.")] = None,
    runtimes: Annotated[list[str], typer.Option("--runtime", help="Once for each runtime.")] = ["onnxruntime"],  # noqa: B006
    batches: Annotated[list[int], typer.Option("--batch", min=1, help="Once for each batch size.")] = [1, 8],  # noqa: B006
    threads: Annotated[list[int], typer.Option(min=1, help="Once for each number of threads.")] = [1],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 15,
    shape: Annotated[str, typer.Option(help="Of one sample, such as 3x224x224, where the model does not say.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Of open axes of ONNX files behind the batch.")] = 128,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
    debug: _Debug = False,
) -> None:
    """Measure dense against pruned in one run, interleaved: latency, throughput, parity, size; per runtime."""
    if not dense or (folder is None) == (pruned is None):
        raise typer.BadParameter("pass DIR and --dense MODEL, or --dense FILE.onnx and --pruned FILE.onnx")
    try:
        one = tuple(int(size) for size in shape.split("x")) if shape else None
    except ValueError as error:
        raise typer.BadParameter(f"--shape {shape}: expected numbers such as 3x224x224") from error
    with _failing_in_one_line(debug):
        if folder is not None:
            model = load_model(dense, weights)
            result = run_bench(model, load(folder), typical_inputs(model, one),
                               runtimes=runtimes, batches=batches, threads=threads, rounds=rounds)  # fmt: skip
        else:
            assert pruned is not None
            result = bench_files(dense, pruned, file_inputs(Path(dense), length),
                                 runtimes=runtimes, batches=batches, threads=threads, rounds=rounds)  # fmt: skip
        if out is not None:
            write_atomically({out: json_writer(result.to_json())})
    typer.echo(str(result), nl=False)
    if result.problems:
        raise typer.Exit(1)


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
    debug: _Debug = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    from vbpfx.onnx_pipeline import calibration_file, prune_onnx  # torch takes seconds, which --help need not

    if sum(budget is not None for budget in (ratio, macs, params)) != 1:
        raise typer.BadParameter("state one of --ratio, --macs and --params")
    with _failing_in_one_line(debug):
        pruned = prune_onnx(
            source, calibration_file(source, data, batch), out, ratio=ratio, macs=macs, params=params, method=method
        )
    Console().print(str(pruned), markup=False, highlight=False)


def main() -> None:
    """Entry point: exit status 0 done, 1 failed with a one-line reason, 2 wrong usage."""
    app()
