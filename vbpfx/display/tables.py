"""Tables: what print() shows of an analysis, a plan and a report, and the same for notebooks and pages."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vbpfx.display.figures import FROM_ZERO, SAME
from vbpfx.display.markup import Markup, joined, tag

_WIDTH = 110
_FRAME = 3  # what a column takes beside its cells: a line, a space on either side
_LEAST = 12  # a column of names
_NUMBER = re.compile(r"\s*[-+]?\d[\d.,]*(e[-+]?\d+)?%?")
_SIGNS = ("-", "+", "\u2212")


def counted(number: int, thing: str, things: str | None = None) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, width: int = _WIDTH) -> str:
    """A table as plain text, at most so wide, and no wider than a terminal that it is printed to.

    Numbers and percentages are set to the right; where room is scarce, names and headers are broken, and numbers the last.
    Names stand as they are, whatever is in them.
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
    if title:  # not the table's own, which is broken at the width of the table
        console.print(Text(title))
    console.print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def html_table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, class_: str | None = None
) -> Markup:
    """The same as a table in HTML, whose first column names the rows; columns of numbers are of class ``number``."""
    rows = [list(row) for row in rows]
    kinds = ["number" if rows and all(_is_figure(row[i]) for row in rows) else None for i in range(len(columns))]
    head = [
        tag("th", column, scope="col", class_=kind) if column else tag("td")  # a header that says nothing is none
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kinds[0]),
            *(tag("td", _figure(cell), class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    title = tag("caption", caption) if caption else None
    return tag("table", title, tag("thead", tag("tr", *head)), tag("tbody", *body), class_=class_)


def facts(given: Mapping[str, str]) -> Markup:
    """Names with what belongs to them, as a list of descriptions."""
    pairs = (joined(tag("dt", name), tag("dd", value)) for name, value in given.items())
    return tag("dl", *pairs, class_="facts")


def scrolling(label: str, content: Markup) -> Markup:
    """What is too wide for a phone scrolls by itself, by keyboard too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def _terminal(otherwise: int) -> int:
    """The width of the terminal that is printed to."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size((otherwise, 24)).columns if on_terminal else otherwise


def _is_number(cell: Any) -> bool:
    """A number, or a number or a percentage as text."""
    return isinstance(cell, (int, float)) or (isinstance(cell, str) and _NUMBER.fullmatch(cell) is not None)


def _is_figure(cell: Any) -> bool:
    """A number, text that begins with a digit or a sign, or what stands for a figure where there is no difference."""
    return isinstance(cell, (int, float)) or cell[:1] in _SIGNS or cell[:1].isdigit() or cell in (SAME, FROM_ZERO)


def _figure(cell: Any) -> Any:
    return f"{cell:,}" if isinstance(cell, (int, float)) else cell
