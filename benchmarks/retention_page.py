"""Write the section *retention* of docs/results.md and its pictures from the JSON files of ``retention.py``."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results_page import markdown_table, write_section
from retention_measures import difference, unpack
from retention_methods import METHODS
from retention_networks import NETWORKS

import vbpfx

Record = dict[str, Any]
Result = dict[str, Any]

AGAINST = ("vbp", "dvbp+ob2c")  # the methods that auto is compared with in pairs
SWEEP_METHODS, SWEEP_RATIO = ("vbp", "auto"), 0.5
# Okabe and Ito's eight colours, which colour-blind readers can tell apart. The markers differ, too.
_LOOKS = dict(
    zip(
        METHODS,
        zip(
            ("#999999", "#F0E442", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#0072B2", "#000000"),
            "xv^sDPo*",
            strict=True,
        ),
        strict=True,
    )
)


def write_page(records: dict[str, Record], folder: Path) -> None:
    """Write the section into ``results.md`` of a folder, and the pictures beside it."""
    parts = [_introduction()]
    for name, subject in NETWORKS.items():
        if name in records and records[name]["results"]:
            picture = folder / "figures" / f"retention-{name}.png"
            _plot(records[name], name, picture)
            parts.append(_network(records[name], name, f"![What {subject.title} keeps](figures/{picture.name})"))
    write_section(folder / "results.md", "retention", "\n\n".join(parts) + "\n")


def _introduction() -> str:
    memory = inspect.signature(vbpfx.prune).parameters["memory"].default
    methods = "\n".join(f"- **{name}**: {method.about}." for name, method in METHODS.items())
    return f"""## Retention without retraining

What a trained network keeps when a share p of its hidden neurons is removed and nothing is retrained: the methods below at the
same p, on the same calibration data. **Labels are used for measuring only.**

{methods}

Those with one global ranking may narrow a block to a single neuron; the others keep a sixteenth of every block.
One-shot methods share the statistics of one pass; `auto` fits layers on as many of the calibration samples as it can hold in {memory:g} GiB. Equal p is
not equal cost where layers differ in size: *MACs* says what is left. *Kept* is the pruned figure over the dense one on the same
test samples, with its standard error (SE, paired, over test samples). *Agreement* is the share of samples on which both choose
the same class, *KL* the mean KL(dense ‖ pruned) of their outputs in nats; these two tell methods apart sooner than accuracy
does. *Calibration cost* is the processor time from the dense network to the pruned and verified one, in units of one plain forward
pass over the same calibration data; tracing and verifying are in it, which in the small networks are most of it. A dash: the
method cannot remove so much."""


def _network(record: Record, name: str, picture: str) -> str:
    subject, dense, machine, versions = NETWORKS[name], record["dense"], record["machine"], record["versions"]
    calibration = shown_calibration(record)
    results = [r for r in record["results"] if r["calibration"] == calibration]
    swept = [r for r in record["results"] if (r["method"], r["ratio"]) in {(m, SWEEP_RATIO) for m in SWEEP_METHODS}]
    sizes = sorted({r["calibration"] for r in swept})
    shown = results + (swept if len(sizes) > 1 else [])
    commands = "\n".join(f"`{command}`  " for command in dict.fromkeys(r["command"] for r in shown))
    score = "top-1" if subject.kind == "classifier" else "recall@1"
    parts = [
        f"### {subject.title}",
        commands.strip(),
        _wrapped(
            f"{subject.about}. Calibrated on {calibration:,} {subject.units}, measured on {record['test_samples']:,}. The dense network has "
            f"{dense['neurons']:,} hidden neurons in {dense['blocks']} blocks, {_amount(dense['params'])} parameters, "
            f"{_amount(dense['macs'])} MACs and a {score} of **{dense['score']:.1%}**."
        ),
        picture,
        _main_table(record, subject.kind, results),
    ]
    if paired := _paired_table(record, subject.kind, results):
        parts.append(paired)
    if len(sizes) > 1:
        parts.append(_sweep_table(subject.kind, swept, sizes))
    libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
    parts.append(
        f"{libraries}; {machine['processor']}, {machine['cores']} cores, {machine['threads']} of them used.\n"
        f"All figures, with the width of every block: `benchmarks/results/retention-{name}.json`."
    )
    return "\n\n".join(parts)


def shown_calibration(record: Record) -> int:
    """Return the number of calibration samples that most results have; on a tie, the largest."""
    counts = Counter(r["calibration"] for r in record["results"])
    return max(counts, key=lambda size: (counts[size], size))


def _main_table(record: Record, kind: str, results: list[Result]) -> str:
    own = (
        ["kept ± SE", "top-1", "agreement", "KL"] if kind == "classifier" else ["cosine ± SE", "recall@1", "kept ± SE"]
    )
    columns = ["p", "method", *own, "parameters", "MACs", "narrowest block", "calibration cost"]
    order = list(METHODS)
    rows = []
    for result in sorted(results, key=lambda r: (r["ratio"], order.index(r["method"]))):
        rows.append(
            [f"{100 * result['ratio']:g}%", result["method"], *_cells(record["dense"], kind, result, len(columns) - 2)]
        )
    return markdown_table(columns, rows)


def _cells(dense: dict[str, Any], kind: str, result: Result, count: int) -> list[str]:
    if "impossible" in result:
        return ["-"] * count
    f = result["figures"]
    kept = f"{f['kept']:.1%} ± {f['kept_se']:.1%}"
    if kind == "classifier":
        own = [kept, f"{f['top1']:.1%}", f"{f['agreement']:.1%}", f"{f['kl']:.2f}"]
    else:
        own = [f"{f['cosine']:.4f} ± {f['cosine_se']:.4f}", f"{f['recall']:.1%}", kept]
    return [
        *own,
        f"{result['params'] / dense['params']:.1%}",
        f"{result['macs'] / dense['macs']:.1%}",
        str(min(result["widths"].values())),
        f"{result['cost']:.1f}x",
    ]


def _paired_table(record: Record, kind: str, results: list[Result]) -> str | None:
    """Return how much more auto keeps than the others, at every p where both were possible; None without such a pair."""
    found = {(r["method"], r["ratio"]): unpack(r["values"]) for r in results if "values" in r}
    dense = unpack(record["dense"]["values"]) if kind == "classifier" else None
    others = [other for other in AGAINST if any(method == other for method, _ in found)]
    rows = []
    for ratio in sorted(ratio for method, ratio in found if method == "auto"):
        cells = []
        for other in others:
            if (other, ratio) in found:
                gain, error = difference(found["auto", ratio], found[other, ratio], dense)
                scale, digits = (100, 1) if kind == "classifier" else (1, 4)
                cells.append(f"{scale * gain:+.{digits}f} ± {scale * error:.{digits}f}")
            else:
                cells.append("-")
        rows.append([f"{100 * ratio:g}%", *cells])
    if not rows or not others:
        return None
    unit = "percentage points of *kept*" if kind == "classifier" else "cosine"
    table = markdown_table(["p", *(f"auto - {other}" for other in others)], rows)
    return f"The difference that `auto` makes on the same test samples, in {unit}, with its paired standard error:\n\n{table}"


def _sweep_table(kind: str, swept: list[Result], sizes: list[int]) -> str:
    figure, error, form = ("kept", "kept_se", ".1%") if kind == "classifier" else ("cosine", "cosine_se", ".4f")
    by_key = {(r["method"], r["calibration"]): r for r in swept}
    rows = []
    for size in sizes:
        cells = []
        for method in SWEEP_METHODS:
            f = by_key.get((method, size), {}).get("figures")
            cells.append(f"{f[figure]:{form}} ± {f[error]:{form}}" if f else "-")
        rows.append([f"{size:,}", *cells])
    table = markdown_table(["calibration samples", *(f"{method}, {figure} ± SE" for method in SWEEP_METHODS)], rows)
    return f"By the number of calibration samples, at p = {SWEEP_RATIO:.0%}:\n\n{table}"


def _plot(record: Record, name: str, path: Path) -> None:
    """Plot the kept accuracy or cosine over the remaining MACs, one line per method, with bars of one standard error."""
    subject, calibration = NETWORKS[name], shown_calibration(record)
    figure, error = ("kept", "kept_se") if subject.kind == "classifier" else ("cosine", "cosine_se")
    picture = Figure(figsize=(7.0, 3.8), layout="constrained")
    axes = picture.add_subplot()
    possible = [r for r in record["results"] if r["calibration"] == calibration and "figures" in r]
    lines = {m: sorted((r for r in possible if r["method"] == m), key=lambda r: r["ratio"]) for m in METHODS}
    lines = {method: line for method, line in lines.items() if line}
    # The legend has the order of the lines, with the best on top.
    means = {m: sum(r["figures"][figure] for r in line) / len(line) for m, line in lines.items()}
    for method in sorted(lines, key=lambda m: -means[m]):
        color, marker = _LOOKS[method]
        line = lines[method]
        axes.errorbar(
            [100 * r["macs"] / record["dense"]["macs"] for r in line],
            [r["figures"][figure] * (100 if figure == "kept" else 1) for r in line],
            [r["figures"][error] * (100 if figure == "kept" else 1) for r in line],
            color=color,
            marker=marker,
            markersize=8 if marker == "*" else 5,
            markeredgecolor="black" if method == "magnitude" else color,
            linewidth=2.2 if method == "auto" else 1.3,
            elinewidth=0.8,
            label=method,
        )
    labels = {"kept": "kept, % of the dense top-1", "cosine": "mean cosine to the dense embedding"}
    axes.set(xlabel="multiply-accumulates left, % of the dense network", ylabel=labels[figure])
    axes.invert_xaxis()
    axes.set_title(f"{subject.title}, no retraining", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110, metadata={"Software": None})


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _amount(count: int) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= unit)
    return f"{count / unit:.3g} {name}"
