"""Sections of the page: what was measured of both networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vbpfx.display.figures import (
    MINUS,
    capital,
    change,
    in_bytes,
    in_milliseconds,
    kept,
    percent,
    said,
    scientific,
    short,
)
from vbpfx.display.markup import Markup, joined, tag
from vbpfx.display.tables import counted, facts, html_table, scrolling
from vbpfx.report.report import Report

_SHARES = ("accuracy", "agreement")  # evaluations that are shares of 1, by a word of their names


def cards(report: Report) -> Markup:
    """The headline: what was, what is, and the difference."""
    shown = [
        ("Hidden neurons", *(f"{n:,}" for n in report.neurons), change(*report.neurons)),
        ("Parameters", short(report.params[0]), short(*reversed(report.params)), change(*report.params)),
        ("MACs per sample", short(report.macs[0]), short(*reversed(report.macs)), change(*report.macs)),
    ]
    if report.size:
        shown.append(
            ("Size of the weights", in_bytes(report.size[0]), in_bytes(*reversed(report.size)), change(*report.size))
        )
    if row := next((row for row in _rows(report) if row["speedup"]), None):
        dense, pruned = (row[side]["seconds"]["median"] for side in ("dense", "pruned"))
        name = f"Latency, batch {row['batch']}"
        shown.append((name, in_milliseconds(dense), in_milliseconds(pruned), change(dense, pruned)))
    elif report.latency:
        found = report.latency
        name = f"Latency, batch {found['batch']}"
        shown.append((name, "100%", percent(found["measured"]), change(1, found["measured"])))
    for name, (dense, pruned) in _measures(report).items():
        shown.append((capital(name), _score(name, dense), _score(name, pruned), _difference(name, dense, pruned)))
        break
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", now, class_="big"),
                tag("dd", tag("span", f"dense {before} ", class_="of"), tag("span", difference, class_="change")),
            )
            for name, before, now, difference in shown
        ),
        class_="cards",
    )


def evaluation(report: Report) -> Markup | None:
    """What a data set says of both networks."""
    if not report.evaluation:
        return None
    measures = _measures(report)
    rows = [
        (
            capital(name),
            _score(name, dense),
            _score(name, pruned),
            _difference(name, dense, pruned),
            kept(dense, pruned) if _is_share(name) else "-",
        )
        for name, (dense, pruned) in measures.items()
    ]
    others = {
        name: _score(name, value)
        for name, value in report.evaluation.items()
        if name not in measures and value is not None
    }
    return joined(
        scrolling("Accuracy", html_table("", ("", "dense", "pruned", "difference", "kept"), rows)) if rows else None,
        facts(others) if others else None,
    )


def latency(report: Report) -> Markup | None:
    """What was measured in runtimes."""
    parts = []
    if found := report.latency:
        parts.append(
            tag(
                "p",
                f"The budget asked for {percent(found['asked'])} of the dense network's latency in {found['runtime']} at batch "
                f"{found['batch']}; {percent(found['predicted'])} was predicted, and {percent(found['measured'])} measured "
                f"on the result.",
            )
        )
    if rows := _rows(report):
        assert report.bench is not None
        parts.append(
            tag(
                "p",
                f"Medians of {counted(report.bench['rounds'], 'round')}, dense and pruned in turn; in brackets the quartiles "
                f"of the speed-up.",
                class_="note",
            )
        )
        columns = ("runtime", "batch", "threads", "dense", "pruned", "speed-up", "difference of outputs", "size")
        parts.append(scrolling("Latency", html_table("", columns, [_bench_row(row) for row in rows])))
        if failures := _failures(rows):
            parts.append(tag("ul", *(tag("li", failure) for failure in failures)))
    return joined(*parts) if parts else None


def _bench_row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    place = row["runtime"], row["batch"], row["threads"]
    dense, pruned, speedup = row["dense"], row["pruned"], row["speedup"]
    if not speedup:
        return (*place, *["-"] * 5)
    sizes = [in_bytes(side["size"]) for side in (dense, pruned) if side["size"] is not None]
    parities = [side["parity"] for side in (dense, pruned) if side["parity"] is not None]
    return (
        *place,
        in_milliseconds(dense["seconds"]["median"]),
        in_milliseconds(pruned["seconds"]["median"]),
        f"{speedup['median']:.2f} ({speedup['lower']:.2f}-{speedup['upper']:.2f})",
        scientific(max(parities)) if parities else "-",
        " \u2192 ".join(sizes) or "-",
    )


def _failures(rows: list[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['runtime']}, batch {row['batch']}, {side}: {row[side]['failure']}"
        for row in rows
        for side in ("dense", "pruned")
        if row[side]["failure"]
    ]


def _rows(report: Report) -> list[Mapping[str, Any]]:
    return list(report.bench["rows"]) if report.bench else []


def _measures(report: Report) -> dict[str, tuple[float, float]]:
    """Of an evaluation what both networks have a number for."""
    return {
        name: (value[0], value[1])
        for name, value in (report.evaluation or {}).items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    }


def _is_share(name: str) -> bool:
    return any(word in name.lower() for word in _SHARES)


def _score(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return said(value)
    if _is_share(name):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _difference(name: str, dense: float, pruned: float) -> str:
    if not _is_share(name):
        return change(dense, pruned)
    points = round(100 * (pruned - dense), 2)
    if not points:
        return "no change"
    return f"{'+' if points > 0 else MINUS}{abs(points):.2f} points"
