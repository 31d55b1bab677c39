"""Latency, measured fairly on a noisy machine.

Absolute seconds depend on whoever else is running; ratios of runs that alternate do not. So everything
that is compared runs in turn, round after round, every other round in reverse order, and the medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """The median of what was measured, and its quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles between the values, both ends included."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def alternating(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run in every round.

    Args:
        runs: what to call, by name.
        rounds: how often each is timed.
        warmup: how often each is called before.
        clock: seconds since whenever.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in reversed(list(runs)) if number % 2 else list(runs):
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    return seconds


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of every run, measured in alternation; arguments as :func:`alternating` takes them."""
    seconds = alternating(runs, rounds=rounds, warmup=warmup, clock=clock)
    return {name: statistics.median(times) for name, times in seconds.items()}
