"""Run a measurement in a process of its own, so that it shares no memory and no threads with others."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_process(job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a job in a new process and return its result.

    Exceptions of the job are raised here. If the process dies, BrokenProcessPool is raised.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args, **kwargs).result()
