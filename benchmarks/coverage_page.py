"""Write docs/coverage.md from the results of the coverage run."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from coverage_measure import ROUNDING
from coverage_models import LARGEST, LEFT_OUT, LISTS, SIZES, left_out_torchvision, subjects
from results_page import machine_line, markdown_table

from vbpfx.outputs.differences import TOLERANCES
from vbpfx.storage.files import write_atomically

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
STATUSES = ("ok", "no blocks", "refused", "wrong", "blind", "untyped", "broken", "timeout", "killed")
TITLES = {
    "families": "Every family of timm, its smallest member",
    "timm": "timm models in use",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
COLUMNS = (
    "model", "family", "px", "status", "front end", "blocks", "refused", "prunable", "f64", "sizes", "f32", "ONNX", "class", "s"
)  # fmt: skip

Results = dict[str, dict[str, Any]]


def write_page(results: Results) -> None:
    """Write the page from the available results; a list without results is left out."""
    lists = {listed: [results[s.key] for s in subjects(listed) if s.key in results] for listed in LISTS}
    measured = {f"{r['library']}/{r['name']}": r for records in lists.values() for r in records}
    parts = [_introduction(lists, measured), *(_table(title, lists[listed]) for listed, title in TITLES.items())]
    parts += [_without_blocks(measured), _not_ok(measured), _other_forms(measured), _reasons(measured), _left_out()]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically({PAGE: lambda path: path.write_text(text, encoding="utf-8") and None})


def _introduction(lists: dict[str, list[dict[str, Any]]], measured: Results) -> str:
    rows = [(listed, *_counts(records)) for listed, records in lists.items() if records]
    rows.append(("all, each once", *_counts(measured.values())))
    families = {(r["library"], r["family"]) for r in measured.values()}
    pruned = {(r["library"], r["family"]) for r in measured.values() if r["status"] == "ok"}
    versions = {r["library"]: import_module(r["library"]).__version__ for r in measured.values()}
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    mean = sum(record["prunable"] or 0.0 for record in measured.values()) / max(1, len(measured))
    return f"""# Coverage

`python benchmarks/coverage.py`

{len(measured)} models of {len(families)} families, {len(pruned)} of which have a model that was pruned and proven. {libraries}. Random
weights of natural size, images of {SIZES[0]} pixels if the network accepts them, half of the hidden neurons removed by variance.

{markdown_table(("list", "models", *STATUSES), rows)}

- **ok**: pruned, and equal to the dense network with the removed channels substituted, to {TOLERANCES[torch.float64]:.0e} in float64 and
  {TOLERANCES[torch.float32]:.0e} in float32 (or to {ROUNDING} times the error of the dense network itself in float32, if that is larger).
- **no blocks**: nothing can be narrowed exactly, for the reasons below. **refused**: another error of vbpfx's own.
- **wrong**: the pruned network computes another function. **untyped**: an exception that is not one of vbpfx's own. Both are bugs.
- **blind**: the substitution changes the output too little for a proof. **broken**: the model itself does not run here.
- **timeout**, **killed**: the limits on a model's time and memory.

In the tables *prunable* is the share of the dense network's multiply-accumulates, at this image size, in products that make,
carry or contract the hidden axis of a block; the mean over all models is {mean:.0%}. *f64*, *sizes* (float64, two picture sizes that
tracing has not seen), *f32*, *ONNX* (float32) and *class* (the model's own class, float64) are the largest difference of the outputs
divided by the largest output. One model of each family is exported to ONNX. A dash means
that there is no such form; if it was tried, the reason is given further down. *s* is the processor time for everything, in seconds.

{machine_line()}"""


def _counts(records: Iterable[dict[str, Any]]) -> list[str]:
    counts = Counter(record["status"] for record in records)
    return [str(sum(counts.values())), *(str(counts[status]) for status in STATUSES)]


def _table(title: str, records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    return f"## {title}\n\n{markdown_table(COLUMNS, [_row(record) for record in records])}"


def _row(record: dict[str, Any]) -> list[str]:
    share = record["prunable"]
    return [
        record["name"],
        record["family"],
        _plain(record["size"]),
        record["status"],
        _plain(record["frontend"]),
        _plain(record["blocks"]),
        _plain(record["refused"]),
        "-" if share is None else f"{share:.0%}",
        *(_error(record.get(form)) for form in ("error64", "sizes", "error32", "onnx", "own")),
        f"{sum(record['seconds'].values()):.0f}",
    ]


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)


def _error(value: float | str | None) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "inf" if value == "inf" else "-"


def _without_blocks(measured: Results) -> str:
    """Return the families without a single block, with their most frequent reasons for refusals."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in measured.values():
        families[record["library"], record["family"]].append(record)
    lines = []
    for (library, family), records in sorted(families.items()):
        if all(record["status"] == "no blocks" for record in records):
            reasons = _gathered(records).most_common(3)
            lines.append(f"- {library} {family}: {'; '.join(f'{reason} ({count})' for reason, count in reasons)}")
    return "\n".join(["## Families without blocks", "", *lines]) if lines else ""


def _not_ok(measured: Results) -> str:
    """Return every model whose status is neither ``ok`` nor ``no blocks``, with the reason."""
    rows = [
        (key, record["status"], record["stage"], _cell(record["reason"]))
        for key, record in sorted(measured.items())
        if record["status"] not in ("ok", "no blocks")
    ]
    return f"## What else happened\n\n{markdown_table(('model', 'status', 'stage', 'because'), rows)}" if rows else ""


def _other_forms(measured: Results) -> str:
    """Return the reasons why there is no ONNX file or no network of the model's own class, with their models."""
    parts = []
    for form, title in (("onnx", "ONNX"), ("own", "the model's own class"), ("sizes", "other picture sizes")):
        reasons: dict[str, list[str]] = defaultdict(list)
        for key, record in sorted(measured.items()):
            if isinstance(record.get(form), str) and record[form] != "inf":
                reasons[general(record[form])].append(key)
        rows = [
            (str(len(keys)), ", ".join(keys[:3]), _cell(reason))
            for reason, keys in sorted(reasons.items(), key=lambda entry: -len(entry[1]))
        ]
        if rows:
            parts.append(f"## Without {title}\n\n{markdown_table(('models', 'such as', 'because'), rows)}")
    return "\n\n".join(parts)


def _reasons(measured: Results) -> str:
    models: Counter[str] = Counter()
    for record in measured.values():
        models.update({general(entry["reason"]) for entry in record["refusals"]})
    rows = [
        (str(count), str(models[reason]), _cell(reason)) for reason, count in _gathered(measured.values()).most_common()
    ]
    return f"## Why axes are refused\n\n{markdown_table(('axes', 'models', 'because'), rows)}"


def _gathered(records: Iterable[dict[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records:
        for entry in record["refusals"]:
            counts[general(entry["reason"])] += entry["count"]
    return counts


def general(reason: str) -> str:
    """Return the reason without the names and numbers of a single model."""
    reason = re.sub(r"block \S+:", "block ...:", reason)
    reason = re.sub(r"exclude=\[.*", "exclude=[...]", reason)
    reason = re.sub(r"_\d+\b", "", reason)  # split_1 and split_2 are nodes of one kind
    reason = re.sub(r"(?:[\w]+\.)+(?:weight|bias|\w*scale|gamma|beta)\b|\bnode \S+", "...", reason)
    return re.sub(r"\b\d+(?:\.\d+)?(?:e[-+]?\d+)?\b", "N", reason)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _left_out() -> str:
    lines = [f"- timm {family}: {reason}" for family, reason in sorted(LEFT_OUT.items())]
    large = ", ".join(f"{name} ({size / 1e6:.0f})" for name, size in sorted(left_out_torchvision().items()))
    lines.append(f"- torchvision, above {LARGEST / 1e6:.0f} million parameters (millions in brackets): {large}")
    return "\n".join(["## Left out", "", *lines])
