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
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
