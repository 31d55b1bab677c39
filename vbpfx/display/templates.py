"""Render HTML and SVG from Jinja2 templates. Each template is in the folder of the code that renders it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from vbpfx.display.figures import FROM_ZERO, SAME, capital
from vbpfx.display.tables import counted

if TYPE_CHECKING:
    from jinja2 import Environment

_SIGNS = ("-", "+", "\u2212")


def render(template: str, **values: Any) -> str:
    """Return a template with its values filled in.

    Every value is escaped. It is an error if the template uses a value that is not given.

    Args:
        template: the path of the file in the package, such as ``"report/page.html.jinja"``.
        values: the values, by the names that the template uses.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only code that renders HTML waits for it

    found = Environment(
        loader=PackageLoader("vbpfx", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"capital": capital, "figure": _figure, "counted": counted}
    found.globals["numeric"] = _numeric
    return found


def _numeric(columns: Sequence[str], rows: Sequence[Sequence[Any]], names: Collection[int]) -> list[bool]:
    """Return for each column whether all of its cells are numbers. ``names`` are the columns of names, which never are."""
    return [bool(rows) and i not in names and all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]


def _is_figure(cell: Any) -> bool:
    """Return whether a cell is a number, text that begins with a digit or a sign, or words instead of a difference."""
    return isinstance(cell, (int, float)) or cell[:1] in _SIGNS or cell[:1].isdigit() or cell in (SAME, FROM_ZERO)


def _figure(cell: Any) -> Any:
    """Return a number with commas between thousands, or text as it is."""
    return f"{cell:,}" if isinstance(cell, (int, float)) else cell
