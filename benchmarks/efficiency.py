"""Measure how much of the saved MACs becomes saved time: convolutional networks at half of their MACs, in ONNX Runtime.

``python benchmarks/efficiency.py`` narrows networks with random weights at the default rounding. It runs them in turn with the
dense ones, on one thread, and divides the speed-up by the ratio of the MACs. Needs torchvision.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from exactness import randomize
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.measurement.timing import alternating
from vbpfx.runtimes.adapters import NAMES
from vbpfx.runtimes.table import runtime
from vbpfx.storage.files import json_writer, read_json, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "efficiency.json"
NETWORKS = ("resnet50", "resnext50_32x4d", "regnet_x_3_2gf", "regnet_y_3_2gf", "regnet_x_400mf", "vgg16", "densenet121")


def measure(name: str, macs: float, engine: str, rounds: int) -> dict[str, Any]:
    """Return the ratio of the MACs, the speed-up, and seconds of both. Call this in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = randomize(torchvision.models.get_model(name)).eval()
    data = [torch.randn(2, 3, 224, 224) for _ in range(2)]
    pruned = vbpfx.prune(
        model,
        data,
        macs=macs,
        method="auto",
        criterion="variance",
        compensation="mean",
        allocation="equal",
        progress=False,
    )  # which channels are kept makes no difference to the time
    inputs = Inputs((torch.randn(1, 3, 224, 224),), {})
    dense, small = (runtime(engine).compile(g, inputs, 1) for g in (pruned.captured.graph_module, pruned.graph_module))
    runs = {"dense": partial(dense.run, inputs), "narrow": partial(small.run, inputs)}
    seconds = alternating(runs, rounds=rounds, clock=time.process_time)
    counts = [sum(vbpfx.capture(m, inputs.args[0]).macs.values()) for m in (model, pruned.graph_module)]
    speedup = statistics.median(a / b for a, b in zip(seconds["dense"], seconds["narrow"], strict=True))
    return {
        "macs": counts[0] / counts[1],
        "speedup": speedup,
        "dense": statistics.median(seconds["dense"]),
        "narrow": statistics.median(seconds["narrow"]),
        "rounds": rounds,
        "error": pruned.verification.error if pruned.verification else None,
        "machine": machine_line(),
    }


def write_page(results: dict[str, dict[str, Any]], engine: str, page: Path) -> None:
    """Write the section on efficiency into the page."""
    columns = ("network", "dense", "narrowed", "MACs", "speed-up", "speed-up / MACs")
    rows = [
        [
            name,
            f"{r['dense'] * 1e3:.1f} ms",
            f"{r['narrow'] * 1e3:.1f} ms",
            f"{r['macs']:.2f}x less",
            f"{r['speedup']:.2f}x",
            f"{r['speedup'] / r['macs']:.2f}",
        ]
        for name, r in results.items()
    ]
    machines = sorted({r["machine"] for r in results.values()})
    text = f"""## Convolutional networks at half of their MACs

`python benchmarks/efficiency.py` ({engine})

torchvision's networks with random weights, one image of 224 pixels, one thread, processor time, medians. Dense and narrowed
networks run in turn. Widths are rounded as `method="auto"` does by default.

{markdown_table(columns, rows)}

RegNetX-400MF has groups of 16 channels. ONNX Runtime's layout on processors with AVX-512 holds 16, so narrower groups leave it,
and the values are converted before and behind every grouped convolution.

{"  ".join(machines)}
"""
    write_section(page, "efficiency", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/efficiency.py", description="Saved MACs and saved time.")
    add = parser.add_argument
    add("networks", nargs="*", help=f"names in torchvision; default {' '.join(NETWORKS)}")
    add("--macs", type=float, default=0.5, help="fraction of the MACs to keep, default %(default)s")
    add("--runtime", default="onnxruntime", choices=NAMES, help="default %(default)s")
    add("--rounds", type=int, default=31, help="default %(default)s")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/efficiency.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of deployment.md; default docs")
    options = parser.parse_args(argv)
    results = read_json(options.out) if options.out.exists() else {}
    for name in () if options.page else options.networks or NETWORKS:
        results[name] = in_a_process(measure, name, options.macs, options.runtime, options.rounds)
        write_atomically({options.out: json_writer(results)})
        found = results[name]
        ratio = found["speedup"] / found["macs"]
        print(f"{name}: MACs {found['macs']:.2f}x, speed-up {found['speedup']:.2f}x, ratio {ratio:.2f}", flush=True)
    write_page(results, options.runtime, options.docs / "deployment.md")
    print(f"written: {options.docs / 'deployment.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
