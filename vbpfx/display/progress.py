"""Progress bars on standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# The time left is estimated from the mean pace of this many seconds. That is long enough for slow steps, and short
# enough to follow a change of pace.
_PACE = 600.0


@contextmanager
def progress_bar(title: str, total: int | None, progress: bool, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show a progress bar if ``progress`` is true. Yield a function that advances it by one.

    Args:
        title: the text in front of the bar.
        total: the number of steps; None if it is not known.
        progress: whether to show the bar.
        done: the number of steps that an earlier run has done. They count in the bar, but not in the pace.
    """
    if not progress:
        yield lambda: None
        return
    with _bar() as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


@contextmanager
def loss_bar(title: str, total: int, progress: bool, done: int = 0) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar with a loss if ``progress`` is true. Yield a function of the number of steps done and the loss.

    Args:
        title, total, progress, done: see :func:`progress_bar`.
    """
    if not progress:
        yield lambda step, loss: None
        return
    with _bar(TextColumn("loss {task.fields[loss]:.4g}")) as bar:
        task = bar.add_task(title, total=total, completed=done, loss=math.nan)
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)


def _bar(*further: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, *further, *times, console=console, transient=True, speed_estimate_period=_PACE)
