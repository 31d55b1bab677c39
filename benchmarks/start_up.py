"""How long ``import vbpfx`` and ``vbpfx --help`` take in two checkouts, such as the last release and a change.

    python benchmarks/start_up.py OLD NEW --rounds 15

The two take turns, so that the load of the machine is the same for both. The ratio is that of the medians, new over old;
on a busy machine the processor time says more.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {"import vbpfx": ["-c", "import vbpfx"], "vbpfx --help": ["-m", "vbpfx", "--help"]}


def seconds(arguments: Sequence[str], checkout: Path) -> tuple[float, float]:
    """Return the time and the processor time that a new Python process takes that finds vbpfx in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    start, before = time.perf_counter(), _of_children()
    # in its folder, since Python looks in the current one first
    subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, _of_children() - before


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the medians and their ratio for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of vbpfx")
    parser.add_argument("new", type=Path, help="the checkout to compare with it")
    parser.add_argument(
        "--rounds", type=int, default=15, help="processes of each checkout; one more warms up the files"
    )
    options = parser.parse_args(arguments)
    for name, command in COMMANDS.items():
        found: dict[Path, list[tuple[float, float]]] = {options.old: [], options.new: []}
        for _ in range(options.rounds + 1):
            for checkout, taken in found.items():
                taken.append(seconds(command, checkout))
        for what, place in (("time", 0), ("processor time", 1)):
            old, new = (statistics.median(pair[place] for pair in taken[1:]) for taken in found.values())
            print(f"{name}: {what} {old * 1e3:.0f} ms -> {new * 1e3:.0f} ms, ratio {new / old:.3f}")


if __name__ == "__main__":
    main()
