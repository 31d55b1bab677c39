"""Fuzz vbpfx: take many random networks through every stage and check each with the substitution oracle.

The networks come from `tests/random_networks.py` and the checked properties from `tests/random_check.py`. They are drawn in
chunks, each with a seed of its own. A failure does not end the run: its network is shrunk, stored and printed. Networks
that fail in the same way with the same parts count as the same failure.

    python benchmarks/fuzz.py --examples 20000 --seed 0 -j 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from results_page import machine_line, write_section
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from random_check import check
from random_networks import Spec, specs

from vbpfx.errors import VbpfxError, first_line

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
INTRO = """# Reliability

This page lists the attempts to break vbpfx, and their results. Each set of figures is written by the program named with it.
"""
CHUNK = 200
MOST_FAILURES = 40
SHRINKS = 120

Known = MutableMapping[str, list[tuple[frozenset[str], str]]]


@dataclass
class Tally:
    """The counts of a run."""

    networks: int = 0
    exported: int = 0
    planted: int = 0
    found: int = 0
    rewritten: int = 0
    effective: int = 0
    failed: int = 0
    worst: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)
    own_class: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add the counts of another part of the run."""
        for entry in fields(self):
            mine, its = getattr(self, entry.name), getattr(other, entry.name)
            setattr(self, entry.name, max(mine, its) if entry.name == "worst" else mine + its)

    def count(self, spec: Spec) -> None:
        """Check one network and count its outcome."""
        outcome = check(spec)
        self.planted += outcome.planted
        self.found += outcome.found
        self.rewritten += outcome.rewritten
        self.effective += outcome.effect > 1e-6
        self.worst = max(self.worst, outcome.error)
        self.ended[outcome.ended] += 1
        self.own_class[outcome.own_class] += bool(outcome.own_class)
        self.refusals.update(
            re.sub(r"'.*?'|[\w.]+\.[\w.]+|\d+|\[.*\]", "_", reason)
            for reason, n in outcome.refusals.items()
            for _ in range(n)
        )


def signature(error: BaseException) -> str:
    """Return the kind of an error: its class, its message without names and numbers, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = re.sub(r"'.*?'|\d[\d.e+-]*|\(.*\)", "_", first_line(error))[:160]
    where = "" if isinstance(error, (VbpfxError, AssertionError)) else f" at {Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {text}{where}"


def parts(spec: Spec) -> frozenset[str]:
    """Return the templates, middle operators and spellings of a network."""
    return frozenset(
        name
        for step in spec.steps
        for name in (step.template, *step.middle, *step.other, *step.spelled, *step.windows, step.shuffle)
    ) | {spec.frontend}


def run_chunk(number: int, examples: int, known: Known) -> Tally:
    """Check ``examples`` networks from one seed; put each new kind of failure into ``known`` with its smallest network."""
    tally = Tally()
    first_failure: list[bool] = []
    smallest: list[tuple[Spec, BaseException]] = []

    def attempt(spec: Spec) -> None:
        shrinking = bool(first_failure)
        if shrinking:
            first_failure.append(True)
            if len(first_failure) > SHRINKS:  # shrunk enough: from now on only the smallest network found fails
                if spec == smallest[0][0]:
                    raise smallest[0][1]
                return
        if not shrinking:
            tally.networks += 1
            tally.exported += spec.frontend == "export"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                (Tally() if shrinking else tally).count(spec)
        except Exception as error:
            kind = signature(error)
            if any(small <= parts(spec) for small, _ in known.get(kind, ())):
                tally.failed += not shrinking
                return
            if not shrinking:
                tally.failed += 1
                first_failure.append(True)
            smallest[:] = [(spec, error)]
            raise

    attempts = 0
    while tally.networks < examples and sum(map(len, known.values())) < MOST_FAILURES:
        first_failure.clear()
        smallest.clear()
        options = settings(
            max_examples=examples - tally.networks, deadline=None, database=None, report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink), verbosity=Verbosity.quiet, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        before = tally.networks
        try:
            seed(1000 * number + attempts)(options(given(specs())(attempt)))()
        except Exception:
            if not smallest:
                raise
            spec, error = smallest[0]
            kind = signature(error)
            known[kind] = [*known.get(kind, ()), (parts(spec), f"{spec!r}\n{error}")]
            print(f"FAILURE {kind}\n{spec!r}\n{error}\n", file=sys.stderr, flush=True)
        attempts += 1
        if tally.networks == before:
            break
    return tally


def _work(task: tuple[int, int, Known]) -> Tally:
    torch.set_num_threads(1)
    return run_chunk(*task)


def percent(part: int, whole: int) -> str:
    """Return a share as text for a table."""
    return f"{part:,} ({100 * part / max(1, whole):.1f}%)"


def section(asked: argparse.Namespace, tally: Tally, failures: int, seconds: float) -> str:
    """Return the page's section on this run."""
    verified = tally.ended["verified"]
    rows = {
        "networks": f"{tally.networks:,}",
        "captured by torch.export": percent(tally.exported, tally.networks),
        "blocks that had to be found, and were": f"{tally.planted:,}",
        "blocks found": f"{tally.found:,}",
        "networks narrowed and held to the oracle": percent(verified, tally.networks),
        "of these, the substitution changed the output": percent(tally.effective, verified),
        "blocks narrowed": f"{tally.rewritten:,}",
        "largest error against the oracle, float64": f"{tally.worst:.1e}",
        "narrowed in the model's own class too": percent(tally.own_class["exact"], verified),
        "networks without a block, each axis with its reason": percent(tally.ended["no block"], tally.networks),
        "budgets that could not be met": percent(tally.ended["no budget"], tally.networks),
        "networks that failed": f"{tally.failed:,}",
        "distinct failures": f"{failures:,}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    reasons = "\n".join(f"| {reason} | {count:,} |" for reason, count in tally.refusals.most_common(20))
    command = f"python benchmarks/fuzz.py --examples {asked.examples} --seed {asked.seed} -j {asked.jobs}"
    return (
        f"## Random networks\n\n`{command}`\n\nNetworks drawn at random from every operator of the table and from traps (taps, tied weights, views that mix the\n"
        "axis, memory changed in place, sizes that are equal by accident, blocks that see no data or move nothing,\n"
        "leaves of torch, loops over samples, inputs whose first axis is time): each is captured, analysed, narrowed and compared\n"
        "with the substitution reference in float64 at 1e-9, on the batch it was captured with and on one of another size; a tenth goes through\n"
        "`vbpfx.prune` and its default method. The\n"
        f"model and its batch must stay bit for bit what they were. Hypothesis draws {CHUNK} networks from each of the seeds {1_000_000 * asked.seed}, {1_000_000 * asked.seed + 1000}, ...\n\n"
        f"| | |\n| --- | ---: |\n{table}\n\nWhy axes were refused, most frequent first:\n\n"
        f"| reason | axes |\n| --- | ---: |\n{reasons}\n\n{seconds / 60:.0f} minutes in {asked.jobs} processes. {machine_line()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/reliability.md as it is")
    asked = parser.parse_args()
    begin = time.perf_counter()
    total = Tally()
    with multiprocessing.Manager() as manager, multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        known: Known = manager.dict()
        sizes = [min(CHUNK, asked.examples - start) for start in range(0, asked.examples, CHUNK)]
        tasks = [(asked.seed * 1000 + number, size, known) for number, size in enumerate(sizes)]
        for tally in track(pool.imap_unordered(_work, tasks), "networks", len(tasks), console=Console(stderr=True)):
            total.add(tally)
        failures = dict(known)
    seconds = time.perf_counter() - begin
    text = section(asked, total, sum(map(len, failures.values())), seconds)
    print(text)
    print(f"{total.networks / seconds:.1f} networks a second")
    if not asked.no_page:
        if not PAGE.exists():
            PAGE.write_text(INTRO, encoding="utf-8")
        write_section(PAGE, "random networks", text)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
