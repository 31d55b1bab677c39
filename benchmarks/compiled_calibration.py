"""Compare calibration with compiled forward passes to calibration with plain ones.

``python benchmarks/compiled_calibration.py`` measures what compilation costs and after how many samples it pays off. It runs
the same batches through the same prepared graph with ``compile=False`` and with ``compile=True`` of :func:`vbpfx.calibrate`,
one after the other in every round. Times are processor time of the process and of the compilers that it starts. Each network
is measured in a process of its own with an empty cache of compiled code. Only variances are gathered, as for
``method="vbp"``. Weights and images are random, because the amount of computation does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.calibration.compiled import forward_passes
from vbpfx.data.inputs import Inputs
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "compiled_calibration.json"
PERFORMANCE = PAGE.parent / "performance.md"
NETWORKS = ("deit_small_patch16_224", "convnext_tiny")


def _processor_time() -> float:
    """Return the processor seconds of this process and of the child processes that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _seconds(job: Callable[[], object]) -> float:
    start = _processor_time()
    job()
    return _processor_time() - start


def _measure(name: str, at_once: int, rounds: int) -> dict[str, Any]:
    """Return seconds per batch both ways, the compile time, and how far the statistics differ.

    Call this in a process of its own.
    """
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # keep worker processes out: their time would not be counted
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        batch = Inputs((torch.randn(at_once, *model.pretrained_cfg["input_size"]),), {})
        captured = vbpfx.capture(model, batch.first(4))
        analysis = vbpfx.find_blocks(captured)
        plain, compiled = (vbpfx.prepare(captured, analysis, covariance=False) for _ in range(2))
        ways = {"plain": forward_passes(plain, False), "compiled": forward_passes(compiled, True)}
        for way in ways.values():
            way.run(batch, 0)  # a shape is compiled when it comes a second time
        ways["plain"].run(batch, at_once)
        first = _seconds(lambda: ways["compiled"].run(batch, at_once))
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(2, 2 + rounds):
            for way, passes in ways.items():
                seconds[way].append(_seconds(partial(passes.run, batch, number * at_once)))
        found = [vbpfx.statistics(observed).moments for observed in (plain, compiled)]
        another = forward_passes(compiled, True)
        another.run(batch, 0)
        cached = _seconds(partial(another.run, batch, at_once))
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    saved = (medians["plain"] - medians["compiled"]) / at_once
    compiling = first - medians["compiled"]
    return {
        "seconds": seconds,
        "batch": at_once,
        "speedup": medians["plain"] / medians["compiled"],
        "compiling": compiling,
        "from the cache": cached - medians["compiled"],
        "pays after": math.ceil(compiling / saved) if saved > 0 else None,
        "difference": max(
            float(((a.variance - b.variance).abs() / a.variance).max())
            for block in found[0]
            for a, b in zip(*(moments[block] for moments in found), strict=True)
        ),
    }


def write_page(results: dict[str, Any], page: Path) -> None:
    """Write the section on compiled calibration into the page."""
    rows = [
        [
            name,
            str(found["batch"]),
            str(len(found["seconds"]["plain"])),
            *(f"{statistics.median(found['seconds'][way]):.2f} s" for way in ("plain", "compiled")),
            f"{found['speedup']:.2f}x",
            f"{found['compiling']:.0f} s",
            f"{found['from the cache']:.0f} s",
            "never" if found["pays after"] is None else f"{found['pays after']:,} samples",
            f"{found['difference']:.0e}",
        ]
        for name, found in results.items()
    ]
    columns = (
        "network",
        "batch",
        "rounds",
        "plain",
        "compiled",
        "speed",
        "compiling",
        "from the cache",
        "pays after",
        "variances differ by",
    )
    commands = "  \n".join(f"`{found['command']}`" for found in results.values())
    text = f"""## Calibration with torch.compile

{commands}

`vbpfx.calibrate(..., compile=True)` beside the same without: one batch through the prepared graph, variances alone, medians over rounds
in which both take turns, at one thread. Processor time, that of the C++ compiler included; *compiling* starts from an empty cache, and
comes once a calibration; *from the cache*: the same again, for another calibration of the network. *Pays after*: so many samples until
what a batch saves has made up for compiling from an empty cache. *Variances differ by*: the largest
relative difference of a variance between both.

{markdown_table(columns, rows)}

Not measured on a GPU, where `compile={{"mode": "reduce-overhead"}}` takes CUDA graphs.

{next(iter(results.values()))["machine"]}
"""
    write_section(page, "compiled", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/compiled_calibration.py", description="Calibration by plain and by compiled passes."
    )
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", default=list(NETWORKS), help="of timm; default %(default)s")
    add("--batch", type=int, default=32, help="images at once; default %(default)s")
    add("--rounds", type=int, default=7, help="default %(default)s")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/compiled_calibration.json")
    add("--docs", type=Path, default=PERFORMANCE.parent, help="folder of performance.md; default docs")
    options = parser.parse_args(argv)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in () if options.page else options.networks:
        found = in_a_process(_measure, name, options.batch, options.rounds)
        words = ["python", "benchmarks/compiled_calibration.py", name]
        words += ["--batch", str(options.batch), "--rounds", str(options.rounds)]
        results[name] = found | {"command": shlex.join(words), "machine": machine_line()}
        write_atomically({options.out: json_writer(results)})
        print(
            f"{name}: {found['speedup']:.3f}x, compiling {found['compiling']:.1f} s, pays after {found['pays after']} samples, "
            f"variances differ by {found['difference']:.1e}",
            flush=True,
        )
    write_page(results, options.docs / PERFORMANCE.name)
    print(f"written: the section on compiled calibration in {options.docs / PERFORMANCE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
