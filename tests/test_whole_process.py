"""Settings of the whole process are restored when the last thread leaves, in whatever order threads enter and leave."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from vbpfx.display.quiet import quiet_logging, quiet_python
from vbpfx.display.whole_process import shared_by_threads
from vbpfx.graph.frontends import unfused_attention
from vbpfx.graph.precision import full_float32


def overlapping(
    context: Callable[[], AbstractContextManager[None]], within: Callable[[], Any] = lambda: None
) -> list[Any]:
    """Let two threads enter a context one after the other and leave it in the same order.

    Return what ``within`` sees between the two exits.
    """
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen: list[Any] = []

    def first() -> None:
        with context():
            first_in.set()
            second_in.wait(20)
        first_out.set()

    def second() -> None:
        first_in.wait(20)
        with context():
            second_in.set()
            first_out.wait(20)
            seen.append(within())

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return seen


STATES: dict[str, tuple[Any, Callable[[], Any], Any]] = {
    "logging": (quiet_logging, lambda: logging.root.manager.disable, logging.CRITICAL),
    "streams": (quiet_python, lambda: type(sys.stdout).__name__, "StringIO"),
    "attention": (unfused_attention, torch.backends.mha.get_fastpath_enabled, False),
    "precision": (full_float32, lambda: torch.backends.mkldnn.matmul.fp32_precision, "ieee"),
}


@pytest.mark.parametrize("kind", STATES)
def test_overlapping_threads_leave_nothing_behind(kind: str) -> None:
    context, state, inside = STATES[kind]
    before, stream = state(), sys.stdout
    (seen,) = overlapping(context, state)
    assert state() == before
    assert sys.stdout is stream
    assert seen == inside, "the first thread ended it for the second"


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from test_whole_process import overlapping
from vbpfx.display.quiet import quiet_process

overlapping(quiet_process, lambda: (os.write(1, b"native"), os.write(2, b"native"), print("python")))
os.write(1, b"heard ")
print("and heard", flush=True)
print("errors, too", file=sys.stderr)
"""


def test_standard_output_is_heard_again_after_two_threads() -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout == "heard and heard\n"
    assert "errors, too" in done.stderr
    assert "native" not in done.stderr


def test_it_can_be_entered_again_and_ends_where_it_raises() -> None:
    happened: list[str] = []

    class Noted:
        def __enter__(self) -> None:
            happened.append("in")

        def __exit__(self, *about: object) -> None:
            happened.append("out")

    context = shared_by_threads(Noted)
    with pytest.raises(ValueError, match="within"), context(), context():
        raise ValueError("within")
    assert happened == ["in", "out"]
    with context():
        assert happened == ["in", "out", "in"]
    assert happened == ["in", "out", "in", "out"]
