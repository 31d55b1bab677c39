"""Measure latencies so that they can be compared on a noisy machine.

Absolute seconds depend on what else the machine is doing, but ratios of alternating runs do not. So everything that is
compared runs in turn, round after round, with every other round in reverse order, and medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of measured values."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute them from at least one value. Quartiles are interpolated, with both ends included."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def alternating(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions in alternation, and return name -> its seconds in every round.

    Args:
        runs: name -> the function to time.
        rounds: how often each function is timed.
        warmup: how often each function is called before.
        clock: returns the time in seconds, from any starting point.
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
    """Time functions in alternation, and return name -> median seconds. Arguments are those of :func:`alternating`."""
    seconds = alternating(runs, rounds=rounds, warmup=warmup, clock=clock)
    return {name: statistics.median(times) for name, times in seconds.items()}
