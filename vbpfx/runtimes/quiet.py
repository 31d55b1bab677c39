"""Silence while another package imports, compiles or loads: what it has to say comes as its exception."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vbpfx.graph.frontends import unheard
from vbpfx.graph.whole_process import shared_by_threads


@shared_by_threads
@contextmanager
def silenced() -> Iterator[None]:
    """No warnings, no logging, and nothing on standard output and error, from native code neither; for the whole process."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in kept:
            os.dup2(nowhere, fd)
        with unheard():  # Python's own streams need not lead to the descriptors
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)
