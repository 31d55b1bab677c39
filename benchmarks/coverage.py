"""Measure coverage: which real networks can be pruned, how much of them, and whether the result is proven.

    python benchmarks/coverage.py [-j N] [--only LIST] [--again] [MODEL ...]
    python benchmarks/coverage.py --page

Every model runs in a process of its own with limits on time and memory. A crash becomes a line in the table and does not
end the run. Results are stored in ``benchmarks/results/coverage.json`` after each model. A new run continues where the
last one stopped: it skips models with a result, unless they are named or ``--again`` is given. At the end the run
writes ``docs/coverage.md``. A model can be named as ``timm/resnet18`` or as ``resnet18``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from coverage_measure import Record, measure
from coverage_models import LISTS, Subject, subjects
from coverage_page import write_page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vbpfx.storage.files import json_writer, read_json, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
SECONDS = 300  # processor time per model, so that other programs on the machine do not change a result
PATIENCE = 6  # a process that takes this many times SECONDS of wall-clock time counts as hanging
MEMORY = 9 * 2**30  # resident bytes per model
# Modules that every model needs and that take seconds to import, each under the name that really loads it.
PRELOADED = (
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
    "onnxscript",
    "onnxruntime",
    "timm",
    "torchvision",
    "vbpfx",
)
_LOOK = 0.25  # seconds between two checks of a process


@dataclass
class Running:
    """A model that is being measured in a process of its own."""

    subject: Subject
    process: BaseProcess
    results: Connection
    start: float
    record: dict[str, Any]

    def step(self, seconds: int) -> bool:
        """Read what the process has reported; return True once it has ended."""
        try:
            while self.results.poll():
                self.record = self.results.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode == -signal.SIGXCPU:
                self._ended("timeout", f"it took more than {seconds:g} s of processor time")
            elif self.record["status"] == "started":
                self._ended("killed", f"the process ended by {_ending(self.process.exitcode)}")
            return True
        if time.monotonic() - self.start > PATIENCE * seconds:
            return self._stop("timeout", f"it hung for {PATIENCE * seconds:g} s")
        if resident(self.process.pid) > MEMORY:
            return self._stop("killed", f"it took more than {MEMORY / 2**30:g} GiB of memory")
        return False

    def _stop(self, status: str, reason: str) -> bool:
        self.process.kill()
        self.process.join()
        self._ended(status, reason)
        return True

    def _ended(self, status: str, reason: str) -> None:
        self.record |= {"status": status, "reason": f"{reason} (in stage {self.record['stage']!r})"}


def child(subject: Subject, results: Connection, seconds: int) -> None:
    """Measure one model in a child process: report to the parent after every stage and print nothing."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # the system ends the process with SIGXCPU
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    measure(subject, lambda record: results.send(record.to_json()))


def start(subject: Subject, context: multiprocessing.context.ForkServerContext, seconds: int) -> Running:
    """Start measuring a model."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(subject, writer, seconds), daemon=True)
    process.start()
    writer.close()  # only the child's end is open now, so the stream ends when the child dies
    return Running(
        subject, process, reader, time.monotonic(), Record(subject.library, subject.name, subject.family).to_json()
    )


def resident(process: int | None) -> int:
    """Return the resident memory of a process in bytes, or 0 where the system does not report it."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def run(chosen: list[Subject], results: dict[str, Any], workers: int, seconds: int, console: Console) -> None:
    """Measure the models, several at a time, and store each result as it arrives."""
    context = multiprocessing.get_context("forkserver")  # imports once, then forks a clean process for every model
    context.set_forkserver_preload(list(PRELOADED))
    queue, running = list(reversed(chosen)), list[Running]()
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measuring", total=len(chosen))
        while queue or running:
            while queue and len(running) < workers:
                running.append(start(queue.pop(), context, seconds))
            wait([one.results for one in running], timeout=_LOOK)
            for one in [one for one in running if one.step(seconds)]:
                running.remove(one)
                results[one.subject.key] = one.record
                write_atomically({RESULTS: json_writer(dict(sorted(results.items())))})
                console.print(_line(one), highlight=False, soft_wrap=True)
                progress.advance(bar)


def _line(one: Running) -> str:
    record, took = one.record, sum(one.record["seconds"].values())
    error = record["error64"]
    figures = f"{record['blocks']} blocks, error {float(error):.1e}" if error is not None else record["reason"][:150]
    return f"{one.subject.key}: {record['status']}, {figures}, {math.ceil(took)} s"


def choose(lists: list[str], names: list[str], again: bool, results: dict[str, Any]) -> list[Subject]:
    """Return the models to measure, without duplicates."""
    known = {subject.key: subject for listed in lists for subject in subjects(listed)}
    if not names:
        return [subject for key, subject in known.items() if again or key not in results]
    chosen = [subject for key, subject in known.items() if key in names or subject.name in names]
    missing = {*names} - {name for subject in chosen for name in (subject.key, subject.name)}
    if missing:
        raise SystemExit(f"no model of the lists {', '.join(lists)} is named {', '.join(sorted(missing))}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="measure these, whether they have a result or not")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--only", choices=LISTS, help="the models of this list")
    parser.add_argument("--again", action="store_true", help="measure what has a result, too")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"processor time per model (default {SECONDS})")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are, and no more")
    asked = parser.parse_args()
    console = Console(stderr=True)
    results = read_json(RESULTS) if RESULTS.exists() else {}
    if not asked.page:
        lists = [asked.only] if asked.only else list(LISTS)
        run(choose(lists, asked.models, asked.again, results), results, asked.jobs, asked.seconds, console)
    write_page(results)


if __name__ == "__main__":
    main()
