"""Context managers that change a setting of the whole process, made safe for several threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, _GeneratorContextManager, contextmanager


def shared_by_threads(
    make: Callable[[], AbstractContextManager[None]],
) -> Callable[[], _GeneratorContextManager[None]]:
    """Return a context manager that the first thread really enters and the last one really leaves.

    Streams, file descriptors, filters and settings of backends belong to the process, not to a thread. If every thread
    restored what it had found on entry, two threads that overlap would leave the changed setting behind.

    Args:
        make: makes the context manager. It takes no arguments, because all threads share one.
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
