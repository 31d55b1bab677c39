"""``vbpfx onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import Debug, Method, Place, busy, failing_in_one_line, fraction, shows_progress


def onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX file.")],
    data: Annotated[
        Path,
        typer.Option(
            help=".npy, or .npz with one array for each input, under its name; samples stand where the file has them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    ratio: Annotated[
        float | None, typer.Option(callback=fraction, help="Fraction of the hidden neurons to remove.")
    ] = None,
    macs: Annotated[float | None, typer.Option(callback=fraction, help="Fraction of the MACs to keep.")] = None,
    params: Annotated[float | None, typer.Option(callback=fraction, help="Fraction of the parameters to keep.")] = None,
    method: Annotated[Method, typer.Option(help="vbp: the paper to the letter.")] = Method.auto,
    runtime: Annotated[
        Place | None,
        typer.Option(
            help="Where the file will run: widths are multiples of what is fast there. By default onnxruntime; "
            "none for exact widths, as with --method vbp.",
            show_default=False,
        ),
    ] = None,
    round_to: Annotated[int | None, typer.Option(min=1, help="Widths are multiples of it; 1 for exact ones.")] = None,
    min_width: Annotated[int | None, typer.Option(min=1, help="No block becomes narrower.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Blocks that match, such as 'blocks.*'; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="All blocks but those that match; repeatable.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples that layers are fitted on; by default what --memory holds.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that calibration may hold beside the model.")] = 8.0,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch; files of a fixed batch size say it.")] = 32,
    debug: Debug = False,
) -> None:
    """Prune the network in an ONNX file, without the PyTorch model."""
    if sum(budget is not None for budget in (ratio, macs, params)) != 1:
        raise typer.BadParameter("state one of --ratio, --macs and --params")
    if runtime == Place.none and round_to is None:
        round_to = 1
    options: dict[str, Any] = {
        "ratio": ratio, "macs": macs, "params": params, "method": method.value, "round_to": round_to,
        "runtime": runtime.value if runtime not in (None, Place.none) else None, "min_width": min_width,
        "include": include, "exclude": exclude, "samples": samples,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value not in (None, [])}
    with failing_in_one_line(debug):
        with busy(f"loading {source}"):
            from vbpfx.onnx_pipeline import calibration_file, prune_onnx

            calibration = calibration_file(source, data, batch)
        pruned = prune_onnx(source, calibration, out, memory=memory, progress=shows_progress(), **options)
    typer.echo(str(pruned), nl=False)
