"""The command ``vbpfx bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import Debug, Json, Samples, Shape, failing_in_one_line, one_of_shape_and_data
from vbpfx.cli.measured import InReport, add_to_report


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
    memory: Annotated[bool, typer.Option(help="Measure memory, too, in processes of their own.")] = True,
    shape: Shape = "",
    data: Samples = None,
    length: Annotated[
        int, typer.Option(min=1, help="Length of open axes of ONNX files, other than the batch axis.")
    ] = 128,
    report: InReport = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure dense against pruned in one run, interleaved: latency, throughput, parity, size, memory; per runtime."""
    if not dense or (folder is None) == (pruned is None):
        raise typer.BadParameter("pass DIR and --dense MODEL, or --dense FILE.onnx and --pruned FILE.onnx")
    one = one_of_shape_and_data(shape, data)
    if pruned is not None and (one or data):
        raise typer.BadParameter(
            "--shape and --data work only with DIR. The inputs of ONNX files are known, except for open axes (--length)"
        )
    with failing_in_one_line(debug):
        from vbpfx.artifacts.folder import load_beside
        from vbpfx.data.sources import sample_inputs
        from vbpfx.measurement.bench import bench as run_bench
        from vbpfx.measurement.bench import bench_files
        from vbpfx.models.names import load_model, typical_inputs
        from vbpfx.onnx_session.file_inputs import file_inputs

        how: dict[str, Any] = {
            "runtimes": runtimes, "batches": batches, "threads": threads, "rounds": rounds, "memory": memory
        }  # fmt: skip
        if folder is not None:
            model = load_model(dense, weights)
            inputs = sample_inputs(data, model, name=dense, batch=max(batches)) if data else typical_inputs(model, one)
            result = run_bench(model, load_beside(folder, model), inputs, **how)
            if report:
                add_to_report(folder, bench=result)
        else:
            assert pruned is not None
            result = bench_files(dense, pruned, file_inputs(Path(dense), length), **how)
    typer.echo(json.dumps(result.to_json(), indent=1) if as_json else str(result).rstrip("\n"))
    if result.problems:
        raise typer.Exit(1)
