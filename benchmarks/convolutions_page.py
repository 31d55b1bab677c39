"""Write docs/convolutions.md from the figures of ``convolutions.py``.

A score is the mean of one value per test image. For two methods a and b, with values averaged over D draws of the calibration
images, the difference of the scores is d = mean_i (a_i - b_i), with

    SE(d)^2 = Var_i(a_i - b_i) / n + Var_j(mean a of draw j - mean b of draw j) / D:

the error of the draw of n test images, on which both are measured, and that of the draw of calibration images, which both get.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convolutions_methods import METHODS
from convolutions_subjects import TEXTS
from results_page import PAGE as RESULTS_PAGE
from results_page import markdown_table, write_section
from retention_measures import mean_of, unpack
from torch import Tensor

PAGE = RESULTS_PAGE.with_name("convolutions.md")
_ENOUGH = 2  # standard errors


@dataclass(frozen=True)
class Score:
    """A method's figures at one share of the MACs.

    Attributes:
        name: method and variant.
        values: mean over draws of the value of every test image, (n,).
        means: mean over test images in every draw.
        macs: share of the MACs that is left.
    """

    name: str
    values: Tensor
    means: list[float]
    macs: float

    @property
    def mean(self) -> float:
        """The score."""
        return statistics.fmean(self.means)

    @property
    def error(self) -> float:
        """The standard error of the score."""
        return _error(self.values, self.means)


def difference(a: Score, b: Score) -> tuple[float, float]:
    """Return by how much a is above b, and the standard error."""
    means = [x - y for x, y in zip(a.means, b.means, strict=True)]
    return a.mean - b.mean, _error(a.values - b.values, means)


def _error(values: Tensor, means: list[float]) -> float:
    draws = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    return math.hypot(mean_of(values)[1], math.sqrt(draws))


def verdict(ours: Score, dense: Score, others: list[Score]) -> str:
    """Return how a network of vbpfx stands beside the dense one and those of other tools."""
    if all(gain > _ENOUGH * error for gain, error in (difference(ours, other) for other in others)):
        return "above all"
    lost, error = difference(dense, ours)
    return "at the dense score" if lost <= _ENOUGH * error else "no"


def write_page(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Write one part for each network that was measured."""
    parts = [f"- **{name}**: {method.about}." for name, method in METHODS.items()]
    parts = ["\n".join(parts), *(_network(name, results[name]) for name in TEXTS if name in results)]
    write_section(page, "convolutions", "\n\n".join(parts) + "\n")


def _network(name: str, record: dict[str, Any]) -> str:
    title, about = TEXTS[name]
    dense, shares = record["dense"], record["settings"]["shares"]
    draws = record["settings"]["draws"]
    whole = Score("dense", unpack(dense["values"]), [dense["mean"]] * draws, 1.0)
    cell = _Cell(record["noise_psnr"])
    found = {f"{share:g}": list(_scores(record["results"], f"{share:g}")) for share in shares}
    columns = [f"{share:.0%} of the MACs" for share in shares]
    score = "accuracy" if record["noise_psnr"] is None else "share of the noise that is removed, and PSNR"
    libraries = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    parts = [
        f"## {title}",
        f"{about}: {dense['params']:,} parameters, {dense['macs']:,} MACs. Calibrated on {record['settings']['calibration']} images, "
        f"drawn {draws} times; measured on {record['test']}. Score: {score}. The dense network has **{cell(whole)}**.",
        markdown_table(["method", *columns], _best_rows(record["results"], found, cell)),
    ]
    if standing := list(_standing(found, whole, cell)):
        columns_of_standing = [
            "MACs",
            "method",
            "its score",
            "best of the others",
            "its score",
            "difference",
            "verdict",
        ]
        parts.append(markdown_table(columns_of_standing, standing))
    parts += [
        "Every variant:",
        markdown_table(["method", *columns], _rows(record["results"], found, cell)),
        f"{libraries}; {record['machine'].partition('; ')[2]}",
    ]
    return "\n\n".join(parts)


class _Cell:
    """Formats a score as a cell of a table."""

    def __init__(self, noise_psnr: float | None) -> None:
        self._noise_psnr = noise_psnr

    def __call__(self, score: Score) -> str:
        text = f"{score.mean:.1%} ± {100 * score.error:.1f}"
        if self._noise_psnr is None:
            return text
        return f"{text} ({self._noise_psnr - 10 * math.log10(1 - score.mean):.1f} dB)"


def _scores(results: dict[str, Any], share: str) -> Iterator[tuple[str, Score]]:
    """Return method and score for every variant that reached the share."""
    for method in METHODS:
        for variant, by_share in results.get(method, {}).items():
            if "values" in (figures := by_share[share]):
                name = f"{method}, {variant}" if variant else method
                yield method, Score(name, unpack(figures["values"]), figures["means"], figures["macs"])


def _best_rows(results: dict[str, Any], found: dict[str, list[tuple[str, Score]]], cell: _Cell) -> list[list[str]]:
    """Return one row per method, with its best variant at every share."""
    rows = []
    for method in (m for m in METHODS if m in results):
        cells = []
        for scores in found.values():
            own = [score for name, score in scores if name == method]
            cells.append(cell(max(own, key=lambda score: score.mean)) if own else "-")
        rows.append([method, *cells])
    return rows


def _rows(results: dict[str, Any], found: dict[str, list[tuple[str, Score]]], cell: _Cell) -> list[list[str]]:
    """Return one row per variant; where it did not reach the share, the cell says why."""
    by_name = {share: {score.name: score for _, score in scores} for share, scores in found.items()}
    rows = []
    for method in (m for m in METHODS if m in results):
        for variant, by_share in results[method].items():
            name = f"{method}, {variant}" if variant else method
            cells = []
            for share, figures in by_share.items():
                score = by_name[share].get(name)
                text = f"{cell(score)}, MACs {score.macs:.1%}" if score is not None and METHODS[method].ours else ""
                cells.append(text or (cell(score) if score is not None else figures["impossible"]))
            rows.append([name, *cells])
    return rows


def _standing(found: dict[str, list[tuple[str, Score]]], dense: Score, cell: _Cell) -> Iterator[list[str]]:
    for share, scores in found.items():
        others = [score for method, score in scores if not METHODS[method].ours]
        for ours in (score for method, score in scores if METHODS[method].ours):
            if others:
                best = max(others, key=lambda score: score.mean)
                gain, error = difference(ours, best)
                yield [
                    f"{float(share):.0%}",
                    ours.name,
                    cell(ours),
                    best.name,
                    cell(best),
                    f"{100 * gain:+.1f} ± {100 * error:.1f}",
                    verdict(ours, dense, others),
                ]
