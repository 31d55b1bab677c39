"""Sections of the page: refusals, checks, and how to make it again."""

from __future__ import annotations

from typing import Any

from vbpfx.display.figures import capital, said, scientific
from vbpfx.display.markup import Markup, joined, tag
from vbpfx.display.tables import counted, facts, html_table, scrolling
from vbpfx.planning.importance import CRITERIA
from vbpfx.report.report import Report


def refused(report: Report) -> Markup | None:
    """The axes that could not be narrowed, grouped by reason."""
    if not report.refused:
        return None
    left = "and was left as it is" if report.refused == 1 else "and were left as they are"
    about = f"{counted(report.refused, 'axis', 'axes')} that layers produce cannot be narrowed exactly, {left}."
    if not report.refusals:
        return tag("p", about)
    reasons: dict[str, list[tuple[str, int, str]]] = {}
    for refusal in report.refusals:
        reasons.setdefault(refusal.reason, []).append((refusal.label, refusal.width, refusal.node))
    groups = [
        tag(
            "details",
            tag("summary", capital(reason), tag("span", counted(len(axes), "axis", "axes"), class_="count")),
            scrolling(
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
        why = "they were trained since" if report.tuning else "it was off, or they were trained since"
        return tag("p", f"The substitution oracle did not check these weights: {why}.")
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
    if found.behind is not None:
        row = ("Behind the layers that read a narrowed block", scientific(found.behind), scientific(found.tolerance))
        rows.insert(1, row)
    rows.append(("What the substitution changes at all", scientific(found.effect), "-"))
    words = found.in_words() if report.widths else ""
    return joined(
        tag("p", about),
        scrolling("Checks", html_table("", ("", "measured", "allowed"), rows)),
        tag("p", f"{words[:1].upper()}{words[1:]}.") if words else None,
    )


def making(report: Report) -> Markup:
    """Settings, versions, and what to type to make it again."""
    settings = dict(report.settings)
    reconstruction = settings.pop("reconstruction", {})
    budget = ", ".join(f"{kind} = {value:g}" for kind, value in settings.pop("budget").items())
    shown = {
        "budget": budget,
        **{
            name.replace("_", " "): said(value)
            for name, value in settings.items()
            if name not in ("neurons", "samples", "at_floor")
        },
        "activations seen": f"up to {settings['samples']:,} per neuron" if "samples" in settings else None,
        "reconstructed on": counted(reconstruction["samples"], "sample") if "samples" in reconstruction else None,
    }
    versions = dict(report.versions)
    for package, version in (report.bench["versions"] if report.bench else {}).items():
        if versions.get(package, version).partition("+")[0] != version.partition("+")[0]:
            package = f"{package}, for the latency"
        versions.setdefault(package, version)
    return joined(
        tag("h3", "On the command line") if report.command else None,
        tag("pre", tag("code", report.command), tabindex=0) if report.command else None,
        tag("p", f"Fine-tuned: {report.tuning}.") if report.tuning else None,
        tag("h3", "In Python, before it was fine-tuned" if report.tuning else "In Python")
        if report.arguments
        else None,
        tag("pre", tag("code", _python(report)), tabindex=0) if report.arguments else None,
        tag("h3", "Settings"),
        facts({name: value for name, value in shown.items() if value is not None}),
        joined(tag("h3", "Versions"), facts(versions)) if versions else None,
    )


def _python(report: Report) -> str:
    """The call that made it."""
    arguments = "".join(f"    {name}={_literal(name, value)},\n" for name, value in report.arguments.items())
    model = f"# model: {report.network} of {report.params[0]:,} parameters"
    return f"import vbpfx\n\n{model}\npruned = vbpfx.prune(\n    model,\n    calibration,\n{arguments})"


def _literal(name: str, value: Any) -> str:
    if name != "criterion" or value in CRITERIA:
        return repr(value)
    return value if value.isidentifier() else "criterion"  # a function of the user's own; a lambda has no name


def _code(text: str) -> Markup:
    return tag("code", text)
