"""Silence what other packages print while they import, compile, load or run. Their errors are still raised.

Each of these context managers affects the whole process. The last two include those above them.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from vbpfx.display.whole_process import shared_by_threads


@shared_by_threads
@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Suppress warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@shared_by_threads
@contextmanager
def quiet_logging() -> Iterator[None]:
    """Switch off logging. Exporters log every failed attempt, and a final error says the same in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@shared_by_threads
@contextmanager
def quiet_python() -> Iterator[None]:
    """Suppress warnings, logging, and Python's standard output and error."""
    nothing = io.StringIO()
    with redirect_stdout(nothing), redirect_stderr(nothing), quiet_warnings(), quiet_logging():
        yield


@shared_by_threads
@contextmanager
def quiet_process() -> Iterator[None]:
    """Suppress warnings, logging, and all standard output and error, including that of native code."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in kept:
            os.dup2(nowhere, fd)
        with quiet_python():  # Python's own streams may not write to these descriptors
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)
