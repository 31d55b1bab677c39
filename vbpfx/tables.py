"""Tables: what print() shows of an analysis, a plan and a report, and the same for notebooks and pages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vbpfx.markup import Markup, tag

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


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """The same as a table in HTML, whose first column names the rows; columns of numbers are of class ``number``."""
    rows = [list(row) for row in rows]
    kinds = ["number" if rows and all(_is_figure(row[i]) for row in rows) else None for i in range(len(columns))]
    head = [tag("th", column, scope="col", class_=kind) for column, kind in zip(columns, kinds, strict=True)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kinds[0]),
            *(tag("td", _figure(cell), class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    return tag(
        "table", tag("caption", caption) if caption else None, tag("thead", tag("tr", *head)), tag("tbody", *body)
    )


def _is_figure(cell: Any) -> bool:
    """A number, or text that begins with a digit or a sign; an empty place is none's evidence."""
    return isinstance(cell, (int, float)) or (isinstance(cell, str) and not cell[:1].isalpha())


def _figure(cell: Any) -> Any:
    return f"{cell:,}" if isinstance(cell, (int, float)) else cell
