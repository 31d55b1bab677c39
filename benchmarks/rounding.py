"""Measure what odd widths cost in each runtime: the latency of an MLP over its hidden width, near multiples of 64.

``python benchmarks/rounding.py`` compiles an MLP at hidden widths between two multiples of 64, chosen so that multiples of 1, 2,
4, 8, 16, 32 and 64 are among them. It runs them in turn on one thread and compares each latency with the linear interpolation
between the two multiples of 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section
from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.measurement.timing import Spread, alternating
from vbpfx.runtimes.adapters import NAMES
from vbpfx.runtimes.table import runtime
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "rounding.json"
SHAPES = {"197 tokens of 384": (197, 384, 768), "128 tokens of 768": (128, 768, 1536)}  # tokens, width, hidden width
_BELOW = (64, 63, 62, 60, 56, 48, 32, 31, 16, 8, 1, 0)  # these numbers are subtracted from the hidden width


def _measure(name: str, shape: str, rounds: int) -> dict[str, Any]:
    """Return width -> seconds. Call this in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, dim, hidden = SHAPES[shape]
    inputs = Inputs((torch.randn(2, tokens, dim),), {}).first(1)
    widths = [hidden - below for below in _BELOW]
    made = {
        w: runtime(name).compile(nn.Sequential(nn.Linear(dim, w), nn.GELU(), nn.Linear(w, dim)).eval(), inputs, 1)
        for w in widths
    }
    runs = {str(w): partial(compiled.run, inputs) for w, compiled in made.items()}
    seconds = alternating(runs, rounds=rounds, clock=time.process_time)
    low, high = (Spread.of(seconds[str(w)]).median for w in (widths[0], widths[-1]))
    found = {}
    for w in widths:
        median = Spread.of(seconds[str(w)]).median
        line = low + (high - low) * (w - widths[0]) / (widths[-1] - widths[0])
        found[str(w)] = {"ms": median * 1e3, "over_line": median / line - 1, "multiple": w & -w if w % 64 else 64}
    return {"widths": found, "rounds": rounds, "machine": machine_line()}


def write_page(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Write the section on rounding into the page."""
    tables = []
    for shape, (_, _, hidden) in SHAPES.items():
        rows = {key.rpartition("/")[2]: found for key, found in results.items() if key.startswith(f"{shape}/")}
        if not rows:
            continue
        widths = [str(hidden - below) for below in _BELOW]
        first = next(iter(rows.values()))["widths"]
        columns = ("runtime", *(f"{w} ({first[w]['multiple']})" for w in widths))
        lines = [
            [name, *(f"{f['widths'][w]['ms']:.3f} ({f['widths'][w]['over_line']:+.0%})" for w in widths)]
            for name, f in rows.items()
        ]
        tables.append(f"An MLP on {shape}, by hidden width:\n\n{markdown_table(columns, lines)}\n")
    machines = sorted({found["machine"] for found in results.values()})
    text = f"""## Widths and their multiples

`python benchmarks/rounding.py`

The value of `round_to` in `vbpfx/runtimes/adapters/` follows from these measurements. It is the multiple at which the time of a
runtime stays near a straight line. It is recorded if missing this multiple costs more time than the neurons that rounding up
adds. For ONNX Runtime the multiple follows from its convolutions, which leave their fast layout at widths that are not
multiples of 8. To see this, compare EfficientNet-B0 at 10% with 10% to 8 in the table above.

The tables show milliseconds of processor time per call on one thread. The widths are measured in turn, and times are medians.
The number in brackets after a width is the largest power of two, up to 64, that divides it. The number in brackets after a time
is its distance from the straight line between the first width and the last.

{chr(10).join(tables)}
{"  ".join(machines)}
"""
    write_section(page, "rounding", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/rounding.py", description="What odd widths cost.")
    add = parser.add_argument
    add("--runtime", action="append", choices=NAMES, help="once for each; default all")
    add("--rounds", type=int, default=101, help="default %(default)s")
    add("--again", action="store_true", help="measure what is there, too")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/rounding.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of deployment.md; default docs")
    options = parser.parse_args(argv)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in () if options.page else options.runtime or NAMES:
        for shape in SHAPES:
            if f"{shape}/{name}" in results and not options.again:
                continue
            found = in_a_process(_measure, name, shape, options.rounds)
            results[f"{shape}/{name}"] = found
            write_atomically({options.out: json_writer(results)})
            print(name, shape, *(f"{w}:{f['over_line']:+.1%}" for w, f in found["widths"].items()), flush=True)
    write_page(results, options.docs / "deployment.md")
    print(f"written: {options.docs / 'deployment.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
