"""The parts of the page about refusals, checks, and how to make the network again."""

from __future__ import annotations

from typing import Any

from vbpfx.display.figures import said, scientific
from vbpfx.display.tables import counted
from vbpfx.planning.scores import CRITERIA
from vbpfx.report.report import Report, stated
from vbpfx.rewrite.verify import Verification


def refusals_by_reason(report: Report) -> list[tuple[str, list[tuple[str, int, str]]]]:
    """Return the axes that could not be narrowed, as (label, width, node), by reason, most frequent reasons first."""
    reasons: dict[str, list[tuple[str, int, str]]] = {}
    for refusal in report.refusals:
        reasons.setdefault(refusal.reason, []).append((refusal.label, refusal.width, refusal.node))
    return sorted(reasons.items(), key=lambda entry: -len(entry[1]))


def checks(found: Verification) -> list[tuple[str, str, str]]:
    """Return the results of the substitution oracle, as rows of a name, the error, and the allowed error."""
    rows = [("Pruned network against the reference", scientific(found.error), scientific(found.tolerance))]
    if found.behind is not None:
        rows.append(
            ("Behind the layers that read a narrowed block", scientific(found.behind), scientific(found.tolerance))
        )
    rows.append(("Captured graph against the model", scientific(found.capture), scientific(found.tolerance)))
    if found.refits:
        rows.append(("Fitted weights against the plan", scientific(found.refits), scientific(found.tolerance)))
    return [*rows, ("What the substitution changes at all", scientific(found.effect), "-")]


def settings(report: Report) -> dict[str, str]:
    """Return the settings with which the plan was made, as text by name."""
    given = dict(report.settings)
    reconstruction = given.pop("reconstruction", {})
    budget = ", ".join(f"{kind} = {stated(value)}" for kind, value in given.pop("budget").items())
    shown = {
        "budget": budget,
        **{
            name.replace("_", " "): said(value)
            for name, value in given.items()
            if name not in ("neurons", "samples", "at_floor", "experts")
        },
    }
    if "samples" in given:
        shown["activations seen"] = f"up to {given['samples']:,} per neuron"
    if "samples" in reconstruction:
        shown["reconstructed on"] = counted(reconstruction["samples"], "sample")
    return shown


def versions(report: Report) -> dict[str, str]:
    """Return the versions of packages at pruning, and of the runtimes in which latency was measured."""
    found = dict(report.versions)
    for package, version in (report.bench["versions"] if report.bench else {}).items():
        if found.get(package, version).partition("+")[0] != version.partition("+")[0]:
            package = f"{package}, for the latency"
        found.setdefault(package, version)
    return found


def python_call(report: Report) -> str:
    """Return the Python call that made the network."""
    arguments = "".join(f"    {name}={_literal(name, value)},\n" for name, value in report.arguments.items())
    model = f"# model: {report.network} of {report.params[0]:,} parameters"
    return f"import vbpfx\n\n{model}\npruned = vbpfx.prune(\n    model,\n    calibration,\n{arguments})"


def _literal(name: str, value: Any) -> str:
    if name != "criterion" or value in CRITERIA:
        return repr(value)
    return value if value.isidentifier() else "criterion"  # the user's own function; a lambda has no usable name
