"""Write the section *speed* of docs/performance.md and its picture from the results of ``speed.py``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results_page import markdown_table, write_section

_COLOURS = {"depth": "#0072B2", "width": "#D55E00", "tokens": "#009E73", "batches": "#CC79A7"}
_MARKERS = {"depth": "o", "width": "s", "tokens": "^", "batches": "D"}
_FIGURE = "speed-scaling.png"
_TITLES = {"pass": "The pass itself", "observers": "Observers", "growth": "Growth", "gpu": "On a GPU"}


def write_page(found: dict[str, Any], folder: Path) -> None:
    """Write the section into ``performance.md`` of a folder, and the picture beside it.

    Args:
        found: part -> its results; parts without results are left out.
    """
    sections = {"pass": _pass, "observers": _observers, "growth": _growth, "gpu": _gpu}
    text = ["## Speed\n\nThe medians of rounds in which all that is compared takes turns."]
    text += [
        f"### {title}\n\n`{found[part]['command']}`  \n{found[part]['machine']}\n\n{sections[part](found[part])}"
        for part, title in _TITLES.items()
        if part in found
    ]
    if "growth" in found:
        _plot(found["growth"]["scaling"], folder / "figures" / _FIGURE)
    write_section(folder / "performance.md", "speed", "\n\n".join(text) + "\n")


def _pass(found: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{1e3 * statistics.median(taken):.0f} ms" for taken in one["seconds"].values()),
         f"{_ratio(one['seconds']):.2f}x"]
        for name, one in found["rounds"].items()
    ]  # fmt: skip
    memory = [
        [name, way, f"{one['seconds']:.2f} s", f"{one['peak'] / 2**20:.0f} MiB", f"{one['peak'] / one['weights']:.2f}x"]
        for name, ways in found["first"].items()
        for way, one in ways.items()
    ]
    return f"""From a model to one with half of every MLP, without calibration: `capture`, `find_blocks`, `make_plan`, `convert` against Torch-Pruning's
dependency graph and pruner on the same layers (which changes the model in place; `convert` makes a new one). Processor time at one thread.

{markdown_table(("network", "vbpfx", "Torch-Pruning", "vbpfx / Torch-Pruning"), rows)}

The first pass of a new process: processor time, and the most memory above what the process held before, beside the weights' own.

{markdown_table(("network", "who", "first pass", "memory", "of the weights"), memory)}"""


def _ratio(seconds: dict[str, list[float]]) -> float:
    ours, theirs = seconds["vbpfx"], seconds["torch-pruning"]
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _observers(found: dict[str, Any]) -> str:
    rows = [
        [one["network"], str(one["batch"]), str(one["threads"]), one["clock"],
         str(len(one["within"])), f"{statistics.median(one['seconds']['plain']):.2f} s", f"{one['ratio']:.3f}x", f"{one['within_ratio']:.3f}x",
         f"{one['limit']:.3f}x"]
        for one in found["costs"]
    ]  # fmt: skip
    return f"""Forward passes of the prepared graph, variances alone, over plain ones. *Within*: the time that passes within the observers over the rest of the
same pass, which other processes on the machine disturb less. *Limit*: what it would take to read the hidden activations once, at the
bandwidth that a sum over 256 MiB reaches in the same run.

{markdown_table(("network", "batch", "threads", "clock", "rounds", "plain", "cost", "within", "limit"), rows)}"""


def _growth(found: dict[str, Any]) -> str:
    rows = [
        [stage, quantity, f"{one['sizes'][0]} to {one['sizes'][-1]}", f"{one['seconds'][0]:.3f} s", f"{one['seconds'][-1]:.3f} s",
         f"{one['exponent']:.2f}"]
        for stage, quantities in found["scaling"].items()
        for quantity, one in quantities.items()
    ]  # fmt: skip
    large = [
        [name, f"{one['parameters'] / 1e6:,.0f} M", str(one["nodes"]), str(one["blocks"]), f"{one['capture']:.2f} s",
         f"{one['analysis']:.2f} s", f"{1e6 * one['analysis'] / one['nodes']:.0f} us"]
        for name, one in found["largest"].items()
    ]  # fmt: skip
    return f"""Vision transformers that grow in one quantity; *exponent* is the slope of log time over log size. *Analysis*: `capture` and `find_blocks`, on
the meta device. *Calibration*: `calibrate`, variances alone, forward passes included. Processor time at one thread.

{markdown_table(("stage", "quantity", "sizes", "first", "last", "exponent"), rows)}

![Time over size](figures/{_FIGURE})

The largest networks of timm, whose weights are never allocated:

{markdown_table(("network", "parameters", "nodes", "blocks", "capture", "find_blocks", "per node"), large)}"""


def _plot(scaling: dict[str, Any], picture: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (stage, quantities) in zip(figure.subplots(1, len(scaling)), scaling.items(), strict=True):
        for quantity, one in quantities.items():
            label = f"{quantity}: exponent {one['exponent']:.2f}"
            relative = [size / one["sizes"][0] for size in one["sizes"]]
            axes.loglog(relative, one["seconds"], color=_COLOURS[quantity], marker=_MARKERS[quantity], label=label)
        axes.set(title=stage, xlabel="size over the smallest", ylabel="processor seconds")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def _gpu(found: dict[str, Any]) -> str:
    if found["rows"] is None:
        return "Not measured: the machine of this run has none. The command measures it where there is one."
    columns = ("network", "removed", "batch", "precision", "runtime", "dense", "pruned", "speedup")
    cells = [
        [one["network"], f"{one['ratio']:.0%}", str(one["batch"]), one["precision"], one["runtime"],
         f"{one['dense']:.2f} ms", f"{one['pruned']:.2f} ms", f"{one['dense'] / one['pruned']:.2f}x"]
        for one in found["rows"]
    ]  # fmt: skip
    return f"Wall-clock time of a batch, synchronised.\n\n{markdown_table(columns, cells)}"
