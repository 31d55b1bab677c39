"""Measure the speed of vbpfx itself: its pass beside Torch-Pruning's, its observers, its scaling, and networks on a GPU.

``python benchmarks/speed.py`` measures all parts and writes the section *speed* of ``docs/performance.md``, its picture, and
``benchmarks/results/speed.json``. ``--part`` measures one part again and keeps the others. Everything takes about half an hour
on two idle cores; ``--rounds 1`` is a quick check that it runs. Measurements on one thread use processor time, because other
programs on the machine disturb wall-clock time most. Weights and inputs are random, because the amount of computation does
not depend on their values. Needs the extra ``benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from own_process import in_a_process
from results_page import PAGE, machine_line
from speed_gpu import measure_gpu
from speed_measures import COMPARED, LARGE, OBSERVED, PASSES, first_pass, observer_cost, pass_times, torch_pruning
from speed_page import write_page
from speed_scaling import measure_largest, measure_scaling

from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"


def measure_pass(options: argparse.Namespace) -> dict[str, Any]:
    """Measure our pass and Torch-Pruning's in turn, and the first pass of a process."""
    torch_pruning()
    found: dict[str, Any] = {"rounds": {}, "first": {}}
    for name in options.compared:
        found["rounds"][name] = pass_times(name, options.rounds)
        print(f"{name}: pass {found['rounds'][name]['seconds']}", flush=True)
    for name in (*options.compared, *([LARGE] if options.compared == list(COMPARED) else [])):
        found["first"][name] = {way: in_a_process(first_pass, name, way) for way in PASSES}
        print(f"{name}: first pass {found['first'][name]}", flush=True)
    return found


def measure_observers(options: argparse.Namespace) -> dict[str, Any]:
    """Measure forward passes with observers and plain ones in turn."""
    found: dict[str, Any] = {"costs": []}
    for name in options.observed:
        for threads in options.threads:
            cost = in_a_process(observer_cost, name, options.batch, threads, options.rounds)
            found["costs"].append({"network": name} | cost)
            print(
                f"{name}, threads {threads}: observers {cost['ratio']:.3f}x, within {cost['within_ratio']:.3f}x, "
                f"limit {cost['limit']:.3f}x ({cost['clock']})",
                flush=True,
            )
    return found


def measure_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Measure how time grows with the network, and the largest networks."""
    scaling = in_a_process(measure_scaling, options.rounds)
    for stage, quantities in scaling.items():
        print(stage, {q: round(one["exponent"], 2) for q, one in quantities.items()}, flush=True)
    return {"scaling": scaling, "largest": in_a_process(measure_largest, min(3, options.rounds))}


def measure_on_a_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Measure dense and pruned networks on a GPU; without a GPU this part is skipped."""
    if not torch.cuda.is_available():
        print("no GPU: its part is left out")
        return {"rows": None}
    return {"rows": in_a_process(measure_gpu, options.rounds)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "pass": measure_pass,
    "observers": measure_observers,
    "growth": measure_growth,
    "gpu": measure_on_a_gpu,
}


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace, part: str) -> str:
    """Return the command that repeats the measurement of a part."""
    words = ["python", "benchmarks/speed.py", "--part", part, "--rounds", str(options.rounds)]
    for name in ("compared", "observed", "batch", "threads"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/speed.py", description="How long vbpfx itself takes.")
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="once for each; default all")
    add("--rounds", type=int, default=5, help="default %(default)s")
    add("--compared", nargs="+", default=list(COMPARED), help="networks of timm for the pass; default %(default)s")
    add("--observed", nargs="+", default=list(OBSERVED), help="networks of timm for the observers; default %(default)s")
    add("--batch", type=int, default=32, help="images at once; default %(default)s")
    add("--threads", type=int, nargs="+", default=[1, 2], help="of the forward passes; default %(default)s")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/speed.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of performance.md; default docs")
    options = parser.parse_args(argv)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    torch.set_num_threads(1)
    for part in () if options.page else options.part or PARTS:
        about = {"machine": machine_line(), "command": _command(parser, options, part)}
        found[part] = PARTS[part](options) | about
        write_atomically({options.out: json_writer(found)})
    write_page(found, options.docs)
    print(f"written: the section on speed in {options.docs / 'performance.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
