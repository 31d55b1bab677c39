"""Sections of the page: figures, refusals, checks, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vbpfx.figures import MINUS, change, in_bytes, in_milliseconds, percent, scientific, short
from vbpfx.importance import CRITERIA
from vbpfx.markup import Markup, joined, tag
from vbpfx.report import Report
from vbpfx.tables import counted, html_table

_SHARES = ("accuracy", "agreement")  # evaluations that are shares of 1, by a word of their names


def cards(report: Report) -> Markup:
    """The headline: what was, what is, and the difference."""
    shown = [
        ("Hidden neurons", short(report.neurons[0]), short(report.neurons[1]), change(*report.neurons)),
        ("Parameters", short(report.params[0]), short(report.params[1]), change(*report.params)),
        ("MACs per sample", short(report.macs[0]), short(report.macs[1]), change(*report.macs)),
    ]
    if report.size:
        shown.append(("Size of the weights", in_bytes(report.size[0]), in_bytes(report.size[1]), change(*report.size)))
    if row := next((row for row in _rows(report) if row["speedup"]), None):
        dense, pruned = (row[side]["seconds"]["median"] for side in ("dense", "pruned"))
        name = f"Latency, {row['runtime']}, batch {row['batch']}"
        shown.append((name, in_milliseconds(dense), in_milliseconds(pruned), change(dense, pruned)))
    elif report.latency:
        found = report.latency
        name = f"Latency, {found['runtime']}, batch {found['batch']}"
        shown.append((name, "100%", percent(found["measured"]), change(1, found["measured"])))
    for name, (dense, pruned) in _measures(report).items():
        shown.append((_capital(name), _score(name, dense), _score(name, pruned), _difference(name, dense, pruned)))
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
            _capital(name),
            _score(name, dense),
            _score(name, pruned),
            _difference(name, dense, pruned),
            _retention(dense, pruned),
        )
        for name, (dense, pruned) in measures.items()
    ]
    others = {name: _score(name, value) for name, value in report.evaluation.items() if name not in measures}
    return joined(
        _scrolling("Accuracy", html_table("", ("", "dense", "pruned", "difference", "pruned / dense"), rows))
        if rows
        else None,
        _facts(others) if others else None,
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
        parts.append(_scrolling("Latency", html_table("", columns, [_bench_row(row) for row in rows])))
        if failures := _failures(rows):
            parts.append(tag("ul", *(tag("li", failure) for failure in failures)))
    return joined(*parts) if parts else None


def refused(report: Report) -> Markup | None:
    """The axes that could not be narrowed, grouped by reason."""
    if not report.refused:
        return None
    about = f"{counted(report.refused, 'axis', 'axes')} that layers produce cannot be narrowed exactly, and were left as they are."
    if not report.refusals:
        return tag("p", about)
    reasons: dict[str, list[tuple[str, int, str]]] = {}
    for refusal in report.refusals:
        reasons.setdefault(refusal.reason, []).append((refusal.name or "(whole model)", refusal.width, refusal.node))
    groups = [
        tag(
            "details",
            tag("summary", _capital(reason), tag("span", counted(len(axes), "axis", "axes"), class_="count")),
            _scrolling(
                reason,
                html_table(
                    "", ("axis of", "width", "at node"), [(_code(a), w, _code(n) if n else "-") for a, w, n in axes]
                ),
            ),
        )
        for reason, axes in sorted(reasons.items(), key=lambda entry: -len(entry[1]))
    ]
    return joined(tag("p", about), *groups)


def refitted(report: Report) -> Markup | None:
    """Layers whose shapes stay and whose weights were fitted anew."""
    names = report.settings.get("reconstruction", {}).get("refitted")
    if not names:
        return None
    about = (
        f"{counted(len(names), 'layer')} that write to the residual stream keep their shape; their weights were fitted anew, "
        f"to make up for what the narrowed blocks pass on."
    )
    listed = tag("ul", *(tag("li", _code(name)) for name in names), class_="names")
    return joined(tag("p", about), tag("details", tag("summary", "Their names"), listed))


def check(report: Report) -> Markup:
    """What the substitution oracle measured."""
    if (found := report.verification) is None:
        return tag("p", "The substitution oracle was switched off (verify=False): nothing was checked.")
    about = (
        "The substitution oracle runs the dense network with the removed neurons replaced by what the plan says stands for "
        f"them, and compares the pruned network's output with its. Largest differences over the largest output, in {found.dtype}."
    )
    rows = [
        ("Pruned network against the reference", scientific(found.error), scientific(found.tolerance)),
        ("Captured graph against the model", scientific(found.capture), scientific(found.tolerance)),
    ]
    if found.refits:
        rows.append(("Fitted weights against the plan", scientific(found.refits), scientific(found.tolerance)))
    rows.append(("What the substitution changes at all", scientific(found.effect), "no bound"))
    return joined(tag("p", about), _scrolling("Checks", html_table("", ("", "measured", "allowed"), rows)))


def making(report: Report) -> Markup:
    """Settings, versions, and what to type to make it again."""
    settings = dict(report.settings)
    reconstruction = settings.pop("reconstruction", {})
    budget = ", ".join(f"{kind} = {value:g}" for kind, value in settings.pop("budget").items())
    facts = {
        "budget": budget,
        **{
            name.replace("_", " "): _said(value)
            for name, value in settings.items()
            if name not in ("neurons", "samples", "at_floor")
        },
        "activations seen": f"{settings['samples']:,} per neuron" if "samples" in settings else None,
        "reconstructed on": counted(reconstruction["samples"], "sample") if "samples" in reconstruction else None,
    }
    return joined(
        tag("h3", "On the command line") if report.command else None,
        tag("pre", tag("code", report.command), tabindex=0) if report.command else None,
        tag("h3", "In Python") if report.arguments else None,
        tag("pre", tag("code", _python(report)), tabindex=0) if report.arguments else None,
        tag("h3", "Settings"),
        _facts({name: value for name, value in facts.items() if value is not None}),
        joined(tag("h3", "Versions"), _facts(report.versions)) if report.versions else None,
    )


def _python(report: Report) -> str:
    """The call that made it."""
    arguments = "".join(f"    {name}={_literal(name, value)},\n" for name, value in report.arguments.items())
    model = f"    model,  # {report.network} of {report.params[0]:,} parameters\n"
    return f"import vbpfx\n\npruned = vbpfx.prune(\n{model}    calibration,\n{arguments})"


def _literal(name: str, value: Any) -> str:
    own_function = name == "criterion" and value not in CRITERIA
    return str(value) if own_function else repr(value)


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
        return _said(value)
    if _is_share(name):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _difference(name: str, dense: float, pruned: float) -> str:
    if not _is_share(name):
        return change(dense, pruned)
    points = 100 * (pruned - dense)
    return f"{'+' if points >= 0 else MINUS}{abs(points):.2f} points"


def _retention(dense: float, pruned: float) -> str:
    return percent(pruned / dense) if dense else "-"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(facts: Mapping[str, str]) -> Markup:
    pairs = (joined(tag("dt", name), tag("dd", value)) for name, value in facts.items())
    return tag("dl", *pairs, class_="facts")


def _scrolling(label: str, content: Markup) -> Markup:
    """What is too wide for a phone scrolls by itself, by keyboard too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def _code(text: str) -> Markup:
    return tag("code", text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
