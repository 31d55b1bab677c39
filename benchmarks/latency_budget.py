"""Compare the requested, the predicted and the measured latency of networks pruned with ``latency=``.

``python benchmarks/latency_budget.py`` prunes each network once under a latency budget and writes the table into
``docs/deployment.md``. Weights and images are random, because the latency does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "latency_budget.json"
NETWORKS = ("deit_small_patch16_224", "convnext_tiny", "mixer_b16_224", "swin_tiny_patch4_window7_224")


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one network. Call this in a process of its own."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    start = time.perf_counter()
    pruned = vbpfx.prune(
        model,
        [images],
        latency=options.latency,
        runtime=options.runtime,
        runtime_threads=options.threads,
        method="vbp",
        allocation="equal",
        progress=False,
    )
    seconds = time.perf_counter() - start
    assert pruned.report.latency is not None
    macs = pruned.report.macs[1] / pruned.report.macs[0]
    return {**pruned.report.latency, "macs": macs, "round_to": pruned.report.settings["round_to"], "seconds": seconds}


def write_page(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Write the section on latency budgets into the page."""
    rows = [
        [
            found["network"],
            found["runtime"],
            str(found["threads"]),
            f"{found['asked']:.0%}",
            f"{found['predicted']:.1%}",
            f"{found['measured']:.1%}",
            f"{found['measured'] / found['asked'] - 1:+.1%}",
            f"{found['macs']:.1%}",
            str(found["round_to"]),
            f"{found['seconds']:.0f} s",
        ]
        for found in results.values()
    ]
    columns = (
        "network",
        "runtime",
        "threads",
        "asked",
        "predicted",
        "measured",
        "off by",
        "MACs",
        "round_to",
        "in all",
    )
    text = f"""## Latency as a budget

`python benchmarks/latency_budget.py`

`vbpfx.prune(model, data, latency=0.7, runtime="onnxruntime")` measures the blocks in the runtime at several widths, one image at
a time, chooses the widths by that table, and measures the result beside the dense network again. *Asked*, *predicted* and
*measured* are shares of the dense network's latency, *MACs* the share of its products; *in all* is everything, with
compiling and measuring.

{markdown_table(columns, rows)}

{machine_line()}
"""
    write_section(page, "latency-budget", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/latency_budget.py", description="Whether latency= keeps its word."
    )
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", default=list(NETWORKS), help="of timm; default %(default)s")
    add("--latency", type=float, default=0.7, help="share of the dense latency to keep; default %(default)s")
    add("--runtime", default="onnxruntime", help="default %(default)s")
    add("--threads", type=int, default=1, help="default %(default)s")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/latency_budget.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of deployment.md; default docs")
    options = parser.parse_args(argv)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in () if options.page else options.networks:
        found = in_a_process(_measure, name, options)
        results[f"{name}/{options.runtime}/{options.threads}/{options.latency:g}"] = {"network": name, **found}
        write_atomically({options.out: json_writer(results)})
        print(f"{name}: asked {found['asked']:.1%}, measured {found['measured']:.1%}", flush=True)
    write_page(results, options.docs / "deployment.md")
    print("written: the section on latency budgets in deployment.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
