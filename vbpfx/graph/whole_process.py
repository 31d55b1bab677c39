"""Contexts that change something of the whole process, in any number of threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, _GeneratorContextManager, contextmanager


def shared_by_threads(
    make: Callable[[], AbstractContextManager[None]],
) -> Callable[[], _GeneratorContextManager[None]]:
    """A context that the first thread to ask for it enters, and the last one leaves.

    Streams, file descriptors, filters and settings of backends are the process's, not a thread's. Were each thread to keep what it
    found and to put that back, two that overlap would leave behind what the first had changed.

    Args:
        make: makes the context; it takes no arguments, since it is one for all.
    """
    lock = threading.RLock()
    inside = 0
    entered = ExitStack()

    @contextmanager
    def shared() -> Iterator[None]:
        nonlocal inside, entered
        with lock:
            if not inside:
                entered = ExitStack()
                entered.enter_context(make())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    entered.close()

    functools.update_wrapper(shared, make)
    return shared
