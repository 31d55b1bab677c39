"""Measure the cost of calibration relative to plain forward passes over the same data.

``python benchmarks/calibration_cost.py`` measures :func:`vbpfx.calibrate` with variances alone and with covariances, and all of
``vbpfx.prune`` with ``method="auto"``: tracing, analysis, statistics, widths, reconstruction, the new graph and its verification.
It reports processor time and the peak memory of the whole process. Forward passes over a fifth of the data are timed before
and after each measurement, and each line of the table is measured in a process of its own. Weights and images are random,
because the amount of computation does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section
from torch import Tensor, nn

import vbpfx
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_cost.json"
WAYS = {"variances": "calibrate, variances", "covariances": "calibrate, covariances", "auto": "prune, `auto`"}


def _job(way: str, model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], object]:
    """Return the function to time."""
    if way == "auto":
        return lambda: vbpfx.prune(model, batches, ratio=0.5, progress=False)
    analysis = vbpfx.find_blocks(vbpfx.capture(model, batches[0][:4]))
    observed = vbpfx.prepare(analysis.captured, analysis, covariance=way == "covariances")
    return lambda: vbpfx.calibrate(observed, batches)


def _seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def _measure(name: str, way: str, images: int, at_once: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return the median ratio and the peak memory. Call this in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batches = torch.randn(images, *model.pretrained_cfg["input_size"]).split(at_once)
    few = batches[: max(1, len(batches) // 5)]

    def forward() -> None:
        with torch.inference_mode():
            for batch in few:
                model(batch)

    forward()
    ratios = []
    for _ in range(rounds):
        job = _job(way, model, batches)
        before, own, behind = _seconds(forward), _seconds(job), _seconds(forward)
        ratios.append(own / ((before + behind) / 2 * images / sum(map(len, few))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"ratio": statistics.median(ratios), "ratios": ratios, "gib": peak, "images": images}


def _command(name: str, way: str, options: argparse.Namespace) -> str:
    """Return the command that repeats this measurement."""
    words = ["python", "benchmarks/calibration_cost.py", name, "--ways", way]
    for option in ("images", "batch", "rounds", "threads"):
        words += [f"--{option}", str(getattr(options, option))]
    return shlex.join(words)


def write_page(results: dict[str, Any], page: Path) -> None:
    """Write the section on calibration cost into the page."""
    rows = [
        [
            name,
            WAYS[way],
            f"{found['images']:,}",
            str(len(found["ratios"])),
            f"{found['ratio']:.2f}x",
            f"{found['gib']:.1f} GiB",
        ]
        for name, ways in results.items()
        for way, found in ways.items()
    ]
    columns = ("network", "what", "images", "rounds", "cost", "peak memory")
    commands = "  \n".join(f"`{found['command']}`" for ways in results.values() for found in ways.values())
    text = f"""## What calibration costs

{commands}

Processor time over that of plain forward passes on the same images, measured in the same run, before and behind; the median over
rounds. *Peak memory* is all of the process: weights, images, and what calibration holds.

{markdown_table(columns, rows)}

{machine_line()}
"""
    write_section(page, "calibration-cost", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/calibration_cost.py", description="What calibration costs, in forward passes."
    )
    add = parser.add_argument
    add(
        "networks",
        nargs="*",
        metavar="NETWORK",
        default=["deit_small_patch16_224"],
        help="of timm; default %(default)s",
    )
    add("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}; default all")
    add("--images", type=int, default=1000, help="default %(default)s")
    add("--batch", type=int, default=50, help="images at once; default %(default)s")
    add("--rounds", type=int, default=1, help="default %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's choice")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/calibration_cost.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of results.md; default docs")
    options = parser.parse_args(argv)
    ways = options.ways.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"--ways {options.ways}: choose from {', '.join(WAYS)}")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in () if options.page else options.networks:
        for way in ways:
            given = (name, way, options.images, options.batch, options.threads, options.rounds)
            found = in_a_process(_measure, *given)
            results.setdefault(name, {})[way] = found | {"command": _command(name, way, options)}
            write_atomically({options.out: json_writer(results)})
            print(f"{name}, {way}: {found['ratio']:.2f}x, {found['gib']:.1f} GiB", flush=True)
    write_page(results, options.docs / PAGE.name)
    print(f"written: the section on calibration cost in {options.docs / PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
