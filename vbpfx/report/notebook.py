"""The view of a report in a notebook: the headline figures and the widths, readable in light and dark themes."""

from __future__ import annotations

from collections.abc import Mapping

from vbpfx.display.figures import kept
from vbpfx.display.templates import render

_OPEN = 24  # with at most this many blocks, the table of widths is open from the start


def notebook_view(summary: str, costs: Mapping[str, tuple[int, int]], widths: Mapping[str, tuple[int, int]]) -> str:
    """Return a view of a report that is small enough for a notebook cell.

    Args:
        summary: one sentence.
        costs, widths: name -> ``(before, now)``.
    """
    return render(
        "report/notebook.html.jinja",
        summary=summary,
        costs=with_shares(costs),
        blocks=with_shares(widths),
        open=len(widths) <= _OPEN,
    )


def with_shares(pairs: Mapping[str, tuple[int, int]]) -> list[tuple[str, int, int, str]]:
    """Return the rows of a table: name, before, now, and the share that is kept."""
    return [(name, before, now, kept(before, now)) for name, (before, now) in pairs.items()]
