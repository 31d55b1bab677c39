"""Tables as text: what print() shows of an analysis, a plan and a report."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 110


def counted(number: int, thing: str, things: str | None = None) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, width: int = _WIDTH) -> str:
    """A table as plain text, at most so wide; numbers are set to the right."""
    rows = [list(row) for row in rows]
    drawn = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row))
    out = io.StringIO()
    Console(file=out, width=width).print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
