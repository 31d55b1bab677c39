"""What notebooks show of a report: the headline and the widths, whatever colours the notebook has."""

from __future__ import annotations

from collections.abc import Mapping

from vbpfx.display.figures import kept
from vbpfx.display.markup import Markup, tag
from vbpfx.display.tables import html_table
from vbpfx.report.charts import bar

_STYLE = (
    ".vbpfx .bar{display:block;width:12rem;height:.6rem}.vbpfx .track{fill:#8885}.vbpfx .stays{fill:#3b82d8}"
    ".vbpfx caption,.vbpfx th,.vbpfx td{text-align:left;font-weight:normal;padding:.15rem 1rem .15rem 0}"
    ".vbpfx .number{text-align:right;font-variant-numeric:tabular-nums}.vbpfx caption{max-width:36rem}"
)
_OPEN = 24  # so many blocks are shown without being asked


def notebook_view(summary: str, costs: Mapping[str, tuple[int, int]], widths: Mapping[str, tuple[int, int]]) -> Markup:
    """Small enough for a notebook's cell.

    Args:
        summary: one sentence.
        costs, widths: ``(before, now)`` by name.
    """
    shown = [(name, *pair, kept(*pair)) for name, pair in costs.items()]
    blocks = tag("details", tag("summary", "Width per block"), widths_table(widths), open=len(widths) <= _OPEN)
    style = tag("style", Markup(_STYLE))
    return tag("div", style, html_table(summary, ("", "dense", "pruned", "kept"), shown), blocks, class_="vbpfx")


def widths_table(widths: Mapping[str, tuple[int, int]]) -> Markup:
    """The width of every block before and now, with bars on one scale."""
    largest = max((before for before, _ in widths.values()), default=1)
    rows = [
        (tag("div", tag("code", name), bar(now, before, largest), class_="named-bar"), before, now, kept(before, now))
        for name, (before, now) in widths.items()
    ]
    return html_table("", ("block", "before", "now", "kept"), rows, class_="widths")
