"""Tables as plain text, as print() shows them for an analysis, a plan and a report."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 110
_FRAME = 3  # the width of a column beside its cells: a line, and a space on either side
_LEAST = 12  # the smallest width of a column of names
_NUMBER = re.compile(r"\s*[-+]?\d[\d.,]*(e[-+]?\d+)?%?")


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number with its noun, such as ``1 block`` or ``2 blocks``."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, width: int = _WIDTH) -> str:
    """Return a table as plain text. It is at most ``width`` wide, and no wider than the terminal.

    Columns of numbers and percentages are right-aligned. If the table is too wide, names and headers are broken into several
    lines first, and numbers last. Names are printed unchanged, even if they look like markup.
    """
    rows = [list(row) for row in rows]
    width = min(width, _terminal(width))
    cells = [[f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row] for row in rows]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    needed = [max(map(cell_len, (words, *(row[i] for row in cells)))) for i, words in enumerate(columns)]
    scarce = sum(needed) + _FRAME * len(columns) + 1 > width
    fixed = [
        max(map(cell_len, (*columns[i].split(), *(row[i] for row in cells)))) if scarce and is_number else None
        for i, is_number in enumerate(numeric)
    ]
    least = sum(_LEAST if size is None else size for size in fixed)
    tight = scarce and least + _FRAME * len(columns) + 1 > width
    drawn = Table(header_style="bold", padding=(0, 0 if tight else 1))
    for column, is_number, size in zip(columns, numeric, fixed, strict=True):
        drawn.add_column(Text(column), justify="right" if is_number else "left", overflow="fold", width=size)
    for row in cells:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    if title:  # printed apart, because rich would break the title of a table at the table's width
        console.print(Text(title))
    console.print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _terminal(otherwise: int) -> int:
    """Return the width of the terminal, or ``otherwise`` if standard output is not a terminal."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size((otherwise, 24)).columns if on_terminal else otherwise


def _is_number(cell: Any) -> bool:
    """Return whether a cell is a number, or text that is a number or a percentage."""
    return isinstance(cell, (int, float)) or (isinstance(cell, str) and _NUMBER.fullmatch(cell) is not None)
