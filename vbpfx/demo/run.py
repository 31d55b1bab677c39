"""Run the demo: prune a trained network and compare it with the dense one on real data, without a download."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.demo.digits import Split, accuracy, load_digits, load_trained
from vbpfx.display.tables import table
from vbpfx.export.onnx import export_onnx, initializer_shapes
from vbpfx.measurement.bench import bench_files
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.report.make import count_parameters
from vbpfx.storage.files import json_writer, make_folder, write_atomically

RATIOS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
CRITERIA = ("variance", "random", "magnitude")
CHOSEN = 0.5
CALIBRATION_BATCH = 100
LATENCY_BATCH = 64


@dataclass(frozen=True)
class Point:
    """One pruned network: its criterion and ratio, test accuracy, size, and the oracle's error."""

    criterion: str
    ratio: float
    accuracy: float
    params: int
    macs: int
    error: float


def run_demo(out: Path, console: Console) -> Path:
    """Prune the digits network in many ways, export one result, and show its accuracy, size and latency.

    Returns:
        The path of the pruned ONNX file. The same folder holds the dense file, the artifact with its ``report.html``,
        ``accuracy.png`` and ``demo.json``.
    """
    make_folder(out)
    split, model = load_digits(), load_trained()
    dense = accuracy(model, split.test_images, split.test_labels)
    console.print(
        f"[bold]A vision transformer trained on 8x8 digits[/bold]: {count_parameters(model):,} parameters, accuracy "
        f"{dense:.2%} on {len(split.test_labels)} test images.\n"
        f"Calibrated on {len(split.train_labels)} training images, without labels; nothing is retrained."
    )
    steps = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    with steps as bar:
        task = bar.add_task("gathering statistics", total=None)
        captured = vbpfx.capture(model, split.train_images[:4])
        analysis = vbpfx.find_blocks(captured)
        observed = vbpfx.prepare(captured, analysis)
        calibration = torch.split(split.train_images, CALIBRATION_BATCH)
        vbpfx.calibrate(observed, calibration)
        gathered = vbpfx.statistics(observed)
        points = []
        for criterion in CRITERIA:
            for ratio in RATIOS:
                bar.update(task, description=f"pruning {ratio:.0%} of the hidden neurons by {criterion}")
                plan = vbpfx.make_plan(analysis, gathered, ratio=ratio, method="vbp", criterion=criterion)
                points.append(_measure(captured, plan, split))
        bar.update(task, description="exporting to ONNX, dense and pruned, and checking both in ONNX Runtime")
        pruned = vbpfx.prune(model, calibration, ratio=CHOSEN, progress=False)
        small = pruned.to_onnx(out / "digits.onnx")
        large = export_onnx(model, pruned.captured.inputs, out / "digits-dense.onnx")
        bar.update(task, description="measuring latency in ONNX Runtime, dense and pruned in turn")
        images = Inputs((split.test_images[:LATENCY_BATCH],), {})
        measured = bench_files(large, small, images, batches=(LATENCY_BATCH,), rounds=51)
        on_runtime = _accuracy_on_runtime(small, split)
        evaluation = {
            "test accuracy": (dense, on_runtime),
            "test images": len(split.test_labels),
            "data": "scikit-learn's digits; the pruned network in ONNX Runtime",
        }
        pruned.save(out, evaluation=evaluation, bench=measured, command="vbpfx demo")
        bar.update(task, description="drawing")
        picture = _plot(points, dense, out / "accuracy.png")
        bar.update(task, description="done")
    for text in (_accuracy_table(points, dense), _chosen_table(pruned, measured)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    figures = {
        "dense_accuracy": dense,
        "points": [asdict(p) for p in points],
        "bench": measured.to_json(),
        "onnx_accuracy": on_runtime,
        "report": pruned.report.to_json(),
    }
    write_atomically({out / "demo.json": json_writer(figures)})
    hidden = sorted({max(shape) for name, shape in initializer_shapes(small).items() if "fc1.bias" in name})
    console.print(
        f"In ONNX Runtime the pruned file scores {on_runtime:.2%} on the test images; its hidden widths are {hidden}."
    )
    console.print(
        f"Report:    {out / 'report.html'}\nPlot:      {picture}\nONNX file: {small}\n"
        f"Artifact:  {out} (vbpfx.load reads it, no pickle)",
        markup=False,
        highlight=False,
        soft_wrap=True,  # does not break paths
    )
    return small


def _measure(captured: vbpfx.Captured, plan: vbpfx.Plan, split: Split) -> Point:
    small = vbpfx.convert(captured, plan)
    return Point(
        plan.settings["criterion"],
        plan.settings["budget"]["ratio"],
        accuracy(small, split.test_images, split.test_labels),
        count_parameters(small),
        sum(replace(captured, graph_module=small).macs.values()),
        vbpfx.verify(captured, small, plan).error,
    )


def _accuracy_on_runtime(path: Path, split: Split) -> float:
    session = open_session(path)
    (logits,) = run_session(session, Inputs((split.test_images,), {}))
    return (logits.argmax(-1) == split.test_labels).double().mean().item()


def _accuracy_table(points: list[Point], dense: float) -> str:
    rows = []
    for ratio in RATIOS:
        row = {p.criterion: p for p in points if p.ratio == ratio}
        worst = max(p.error for p in row.values())
        first = row[CRITERIA[0]]
        scores = (f"{row[c].accuracy:.2%}" for c in CRITERIA)
        rows.append((f"{ratio:.0%}", first.params, first.macs, *scores, f"{worst:.0e}"))
    columns = ("removed", "parameters", "MACs", *CRITERIA, "oracle")
    return table(f"Test accuracy without retraining; dense {dense:.2%}", columns, rows)


def _chosen_table(pruned: vbpfx.Pruned, measured: vbpfx.BenchResult) -> str:
    report, (row,) = pruned.report, measured.rows
    sides = row.dense, row.pruned
    costs = {"parameters": report.params, "MACs per image": report.macs}
    rows: list[tuple[str, ...]] = [
        (name, f"{before:,}", f"{after:,}", f"{after / before:.2f}") for name, (before, after) in costs.items()
    ]
    sizes = [side.size or 0 for side in sides]
    rows.append(("ONNX file, KiB", *(f"{size / 1024:,.0f}" for size in sizes), f"{sizes[1] / sizes[0]:.2f}"))
    seconds = [side.seconds.median for side in sides if side.seconds]
    speedup = f"{seconds[1] / seconds[0]:.2f} ({seconds[0] / seconds[1]:.2f}x faster)"
    rows.append((f"ONNX Runtime, ms / {LATENCY_BATCH} images", *(f"{1e3 * s:.2f}" for s in seconds), speedup))
    return table(f"Dense against pruned at {CHOSEN:.0%} of the hidden neurons", ("", "dense", "pruned", "ratio"), rows)


def _plot(points: list[Point], dense: float, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for criterion, marker in zip(CRITERIA, "os^", strict=True):
        line = [(p.ratio, p.accuracy) for p in points if p.criterion == criterion]
        axes.plot(
            *zip(*line, strict=True), marker=marker, label="variance (VBP)" if criterion == "variance" else criterion
        )
    axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="share of hidden neurons removed", ylabel="test accuracy")
    axes.set_title("Digits transformer, no retraining", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
