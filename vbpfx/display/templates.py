"""HTML and SVG from Jinja2 templates, each of which lies beside the code that renders it."""

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
    """Fill in a template.

    Every value is escaped, and a value that the template names and that is not given is an error.

    Args:
        template: the path of the file below the package, such as ``"report/page.html.jinja"``.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only whoever shows HTML waits for it

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
    """Per column whether all of its cells are figures; columns of names are not, whatever the names begin with."""
    return [bool(rows) and i not in names and all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]


def _is_figure(cell: Any) -> bool:
    """Whether a cell is a number, text that begins with a digit or a sign, or the words for no difference."""
    return isinstance(cell, (int, float)) or cell[:1] in _SIGNS or cell[:1].isdigit() or cell in (SAME, FROM_ZERO)


def _figure(cell: Any) -> Any:
    """Numbers with commas; text as it is."""
    return f"{cell:,}" if isinstance(cell, (int, float)) else cell
