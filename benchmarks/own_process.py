"""A measurement in a process of its own: its memory and its threads are no one else's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_process(job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a job returns; what it raises is raised, and BrokenProcessPool where the process dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args, **kwargs).result()
