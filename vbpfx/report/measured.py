"""The measurements of both networks that the page shows."""

from __future__ import annotations

from typing import Any

from vbpfx.display.figures import (
    MINUS,
    NARROW_SPACE,
    SAME,
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
from vbpfx.measurement.bench_result import BenchResult, Row
from vbpfx.report.report import Report

_BENCH = ("runtime", "batch", "threads", "dense", "pruned", "speed-up", "difference of outputs", "size", "memory")
_SHARES = ("accuracy", "agreement")  # an evaluation with such a word in its name is a share of 1


def cards(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the headline figures, each as its name, the dense and the pruned value, and the difference."""
    shown: list[tuple[str, str, str, str]] = [
        ("Hidden neurons", f"{report.neurons[0]:,}", f"{report.neurons[1]:,}", change(*report.neurons)),
        ("Parameters", short(report.params[0]), short(*reversed(report.params)), change(*report.params)),
        ("MACs per sample", short(report.macs[0]), short(*reversed(report.macs)), change(*report.macs)),
    ]
    if report.size:
        shown.append(
            ("Size of the weights", in_bytes(report.size[0]), in_bytes(*reversed(report.size)), change(*report.size))
        )
    shown += _latency_card(report)
    for name, (dense, pruned) in _measures(report).items():
        shown.append((capital(name), _score(name, dense), _score(name, pruned), _difference(name, dense, pruned)))
        break
    return shown


def _latency_card(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the card of the first latency in the bench, or else the one measured for a latency budget."""
    bench = _bench(report)
    for row in bench.rows if bench else ():
        if row.dense.seconds and row.pruned.seconds:
            dense, pruned = row.dense.seconds.median, row.pruned.seconds.median
            name = f"Latency in {row.runtime}, batch {row.batch}"
            return [(name, in_milliseconds(dense), in_milliseconds(pruned), change(dense, pruned))]
    if found := report.latency:
        name = f"Latency in {found['runtime']}, batch {found['batch']}"
        return [(name, "100%", percent(found["measured"]), change(1, found["measured"]))]
    return []


def evaluation(report: Report) -> dict[str, Any] | None:
    """Return an evaluation of both networks on a data set: the rows of a table, and other facts by name."""
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
    return {"rows": rows, "others": others}


def latency(report: Report) -> dict[str, Any]:
    """Return what was measured in runtimes: a sentence about the budget, the bench result, and its table."""
    budget = ""
    if found := report.latency:
        budget = (
            f"The budget asked for {percent(found['asked'])} of the dense network's latency in {found['runtime']} at batch "
            f"{found['batch']}; {percent(found['predicted'])} was predicted, and {percent(found['measured'])} measured "
            f"on the result."
        )
    bench = _bench(report)
    rows = bench.rows if bench else ()
    shown = len(_BENCH) - all(side.memory is None for row in rows for side in (row.dense, row.pruned))
    return {
        "budget": budget,
        "bench": bench,
        "columns": _BENCH[:shown],
        "rows": [_bench_row(row)[:shown] for row in rows],
    }


def _bench(report: Report) -> BenchResult | None:
    return BenchResult.from_json(report.bench) if report.bench else None


def _bench_row(row: Row) -> tuple[Any, ...]:
    place = row.runtime, row.batch, row.threads
    dense, pruned, speedup = row.dense, row.pruned, row.speedup
    if speedup is None or dense.seconds is None or pruned.seconds is None:
        return (*place, *["-"] * 6)
    parities = [side.parity for side in (dense, pruned) if side.parity is not None]
    return (
        *place,
        in_milliseconds(dense.seconds.median),
        in_milliseconds(pruned.seconds.median),
        f"{speedup.median:.2f} ({speedup.lower:.2f}-{speedup.upper:.2f})",
        scientific(max(parities)) if parities else "-",
        _both(dense.size, pruned.size),
        _both(dense.memory, pruned.memory),
    )


def _both(dense: int | None, pruned: int | None) -> str:
    """Return the bytes of both networks as text, or a dash if one of them is not known."""
    if dense is None or pruned is None:
        return "-"
    before, now = (in_bytes(size, like=max(dense, pruned)) for size in (dense, pruned))
    return f"{before[: before.rindex(NARROW_SPACE)]} \u2192 {now}"  # shows the unit once


def _measures(report: Report) -> dict[str, tuple[float, float]]:
    """Return the entries of an evaluation that have a number for each of the two networks."""
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
        return SAME
    return f"{'+' if points > 0 else MINUS}{abs(points):.2f} points"
