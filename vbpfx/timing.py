"""Latency, measured fairly on a noisy machine.

Absolute seconds depend on whoever else is running; ratios of runs that alternate do not. So everything
that is compared runs in turn, round after round, and the medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3) -> dict[str, float]:
    """Median seconds of every run, measured in alternation.

    Args:
        runs: what to call, by name.
        rounds: how often each is timed.
        warmup: how often each is called before.
    """
    return {name: statistics.median(times) for name, times in _seconds(runs, rounds, warmup).items()}


def paired_ratio(
    run: Callable[[], object], reference: Callable[[], object], *, rounds: int = 15, warmup: int = 3
) -> float:
    """Median over rounds of the seconds of a run over those of the reference right beside it."""
    seconds = _seconds({"run": run, "reference": reference}, rounds, warmup)
    return statistics.median(a / b for a, b in zip(seconds["run"], seconds["reference"], strict=True))


def _seconds(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every run in every round; each round begins with another one."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds
