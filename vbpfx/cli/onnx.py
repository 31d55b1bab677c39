"""``vbpfx onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vbpfx.cli.conventions import Debug, Method, busy, failing_in_one_line, fraction, shows_progress


def onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX file.")],
    data: Annotated[Path, typer.Option(help=".npy, or .npz with one array for each input, samples first.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    ratio: Annotated[
        float | None, typer.Option(callback=fraction, help="Fraction of the hidden neurons to remove.")
    ] = None,
    macs: Annotated[float | None, typer.Option(callback=fraction, help="Fraction of the MACs to keep.")] = None,
    params: Annotated[float | None, typer.Option(callback=fraction, help="Fraction of the parameters to keep.")] = None,
    method: Annotated[Method, typer.Option(help="vbp: the paper to the letter.")] = Method.auto,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch; files of a fixed batch size say it.")] = 32,
    debug: Debug = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    if sum(budget is not None for budget in (ratio, macs, params)) != 1:
        raise typer.BadParameter("state one of --ratio, --macs and --params")
    with failing_in_one_line(debug):
        with busy(f"loading {source}"):
            from vbpfx.onnx_pipeline import calibration_file, prune_onnx

            calibration = calibration_file(source, data, batch)
        pruned = prune_onnx(source, calibration, out, ratio=ratio, macs=macs, params=params, method=method.value,
                            progress=shows_progress())  # fmt: skip
    typer.echo(str(pruned), nl=False)
