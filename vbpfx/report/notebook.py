"""What notebooks show of a report: the headline and the widths, whatever colours the notebook has."""

from __future__ import annotations

from collections.abc import Mapping

from vbpfx.display.figures import kept
from vbpfx.display.templates import render

_OPEN = 24  # so many blocks are shown without being asked


def notebook_view(summary: str, costs: Mapping[str, tuple[int, int]], widths: Mapping[str, tuple[int, int]]) -> str:
    """A view that is small enough for a notebook's cell.

    Args:
        summary: one sentence.
        costs, widths: ``(before, now)`` by name.
    """
    return render(
        "report/notebook.html.jinja",
        summary=summary,
        costs=with_shares(costs),
        blocks=with_shares(widths),
        open=len(widths) <= _OPEN,
    )


def with_shares(pairs: Mapping[str, tuple[int, int]]) -> list[tuple[str, int, int, str]]:
    """Rows of a table: name, before, now, and the share that is kept."""
    return [(name, before, now, kept(before, now)) for name, (before, now) in pairs.items()]
