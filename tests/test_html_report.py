"""The report page is well formed, self-contained, escaped, and shows the figures of the report."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import HOSTILE, LATER, Element, parse, rows, two

import vbpfx
from vbpfx.measurement.bench_result import BenchResult, Row, Side
from vbpfx.measurement.timing import Spread
from vbpfx.planning.importance import Scoring
from vbpfx.plans.records import Refusal
from vbpfx.report.charts import common_scale
from vbpfx.report.page import html_report
from vbpfx.report.report import Report
from vbpfx.report.spectrum import Spectrum

QUOTED = 'a<b>&"c"'
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Largest:
    """A criterion that is a callable object and not a function."""

    def __call__(self, about: Scoring) -> torch.Tensor:
        return about.inputs[0][0].variance


@pytest.fixture(scope="module")
def pruned() -> vbpfx.Pruned:
    torch.manual_seed(0)
    data = [torch.randn(64, 8) for _ in range(3)]
    return vbpfx.prune(two(), data, ratio=0.4, progress=False)


@pytest.fixture
def report(pruned: vbpfx.Pruned, tmp_path: Path) -> Report:
    """Return a report loaded from its file, with all possible contents."""
    spread = Spread(0.004, 0.003, 0.005)
    side = Side(spread, 2e-7, 5_000_000)
    failed = Side(failure='<no> backend & no "device"')
    bench = BenchResult(
        (Row("onnxruntime", 8, 1, side, replace(side, seconds=Spread(0.002, 0.001, 0.003), size=2_500_000), Spread(2.0, 1.75, 2.25), 0.9),
         Row("tvm", 1, 1, failed, failed, None, None)),
        (5568, 3296), 5, {"onnxruntime": "1"},
    )  # fmt: skip
    evaluation = {"top-1 accuracy": (0.8262, 0.6), "loss": (0.5, 0.75), "agreement": 0.91, "data": "val <folder>"}
    pruned.save(tmp_path, evaluation=evaluation, bench=bench, command="vbpfx prune 'a<b>' --ratio 0.4")
    found = Report.load(tmp_path)
    names = {HOSTILE: QUOTED}
    return replace(
        found,
        widths={names.get(name, name): pair for name, pair in found.widths.items()},
        spectra={names.get(name, name): spectrum for name, spectrum in found.spectra.items()},
        refusals=(*found.refusals, Refusal(QUOTED, 8, ("w",), QUOTED, 'of <this> & "that"')),
        refused=found.refused + 1,
        settings=dict(found.settings) | {"at_floor": [QUOTED]},
    )


def number(text: str) -> float:
    """Parse a figure of the page: ``3.94 M`` is 3.94e6."""
    digits, unit = re.fullmatch(r"([\d.,]+)\s*([kMGT]?)B?", text).groups()  # type: ignore[union-attr]
    return float(digits.replace(",", "")) * UNITS.get(unit, 1.0)


def sections(report: Report) -> dict[str, Element]:
    page = parse(html_report(report))
    return {section.one("h2").text: section for section in page.all("section")}


def test_the_page_is_one_file_that_needs_nothing_else(report: Report) -> None:
    page = html_report(report)
    parse(page)
    assert page.startswith("<!doctype html>")
    for loaded in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "onload"):
        assert loaded not in page, loaded
    assert "width=device-width" in page
    assert "@media screen and (prefers-color-scheme: dark)" in page  # dark mode must not apply to print


def test_names_are_text_wherever_they_stand(report: Report) -> None:
    page = html_report(report)
    tree = parse(page)
    assert "<b>" not in page
    assert "<no>" not in page
    assert "<this>" not in page
    assert not list(tree.all("b"))
    found = sections(report)
    # Names appear in the table of widths, above the chart, in the chart's title and label, and among the refusals.
    assert [r[0] for r in rows(found["Width per block"].one("table"))] == list(report.widths)
    figures = list(found["Activation variance"].all("figure"))
    assert [f.one("figcaption").text for f in figures] == list(report.spectra)
    chart = figures[0].one("svg")
    assert chart.one("title").text.startswith(f"{QUOTED}: ")
    assert QUOTED in (chart.attributes["aria-label"] or "")
    assert chart.attributes["role"] == "img"
    assert QUOTED in found["Not narrowed"].text
    assert 'Of <this> & "that"' in found["Not narrowed"].text
    assert "vbpfx prune 'a<b>' --ratio 0.4" in found["How it was made"].text


def test_the_headline_says_the_figures(report: Report) -> None:
    cards = {}
    for card in parse(html_report(report)).one("dl", "cards").all("div"):
        name, now, then = card.one("dt").text, *(dd.text for dd in card.all("dd"))
        cards[name] = (now, *then.removeprefix("dense ").rsplit(" ", 1))
    for name, (dense, now) in {
        "Hidden neurons": report.neurons,
        "Parameters": report.params,
        "MACs per sample": report.macs,
        "Size of the weights": report.size or (0, 0),
    }.items():
        shown, before, change = cards[name]
        # The page shows three digits.
        assert number(shown) == pytest.approx(now, rel=0.005)
        assert number(before) == pytest.approx(dense, rel=0.005)
        assert change == f"\u2212{100 * (dense - now) / dense:.1f}%"
    assert cards["Latency in onnxruntime, batch 8"][0] == "2.00\u202fms"
    assert cards["Top-1 accuracy"][0] == "60.00%"


def test_macs_are_of_a_sample(report: Report) -> None:
    assert "of one sample of shape 8." in parse(html_report(report)).one("header").text
    assert "MACs are those of one sample of shape 8\n" in str(report)


def test_tables_say_the_figures(report: Report) -> None:
    found = sections(report)
    assert rows(found["Width per block"].one("table")) == [
        [name, str(before), str(now), f"{100 * now / before:.1f}%"] for name, (before, now) in report.widths.items()
    ]
    assert f"At the floor (min_width): {QUOTED}." in found["Width per block"].text
    scores = {row[0]: row[1:] for row in rows(found["Evaluation"].one("table"))}
    assert scores["Top-1 accuracy"] == ["82.62%", "60.00%", "\u221222.62 points", "72.6%"]
    assert scores["Loss"] == ["0.5", "0.75", "+50.0%", "-"]
    assert "91.00%" in found["Evaluation"].text
    assert "val <folder>" in found["Evaluation"].text
    measured, failed = rows(found["Latency"].one("table"))
    assert measured[:6] == ["onnxruntime", "8", "1", "4.00\u202fms", "2.00\u202fms", "2.00 (1.75-2.25)"]
    assert measured[7] == "5.00 \u2192 2.50\u202fMB"
    assert failed[3:] == ["-"] * 5
    assert 'tvm, dense, batch 1: <no> backend & no "device"' in found["Latency"].text
    oracle = {row[0]: row[1:] for row in rows(found["Checked"].one("table"))}
    assert report.verification is not None
    shown, allowed = oracle["Pruned network against the reference"]
    power = int(shown.split("10")[-1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    assert float(shown[:3]) * 10.0**power == pytest.approx(report.verification.error, rel=0.05)
    assert allowed.endswith("10⁻⁴")


def test_data_without_labels_is_under_no_heading_of_accuracy(report: Report) -> None:
    found = sections(replace(report, evaluation={"samples": 20, "agreement with the dense network": 0.9}))
    assert "Accuracy" not in found
    assert "90.00%" in found["Evaluation"].text


def test_what_is_wrong_with_a_measurement_is_said(report: Report) -> None:
    """The page reports differing outputs and unmeasured memory in the same words as the terminal."""
    spread = Spread(0.004, 0.003, 0.005)
    dense = Side(spread, 1e-7, None, None, 40_000_000)
    wrong = Side(spread, 1e-2, 3_000_000, None, None, "the process was killed")
    measured = [Row("tvm", 1, n, dense, wrong, Spread(1.0, 1.0, 1.0), None) for n in (1, 2)]
    whole = Row("tvm", 2, 1, dense, dense, Spread(1.0, 1.0, 1.0), None)
    bench = BenchResult((*measured, whole), None, 3, {})
    section = sections(report.measured(bench=bench))["Latency"]
    said = [item.text for item in section.all("li")]
    assert said == bench.problems
    assert "tvm, pruned, batch 1, 2 threads: differs by 1.0e-02 of the output's size, allowed 1e-04" in said
    assert "tvm, pruned, batch 1, 2 threads: the process was killed" in said
    assert [row[-2:] for row in rows(section.one("table"))] == [["-", "-"]] * 2 + [["-", "40.0 \u2192 40.0\u202fMB"]]


def test_a_runtime_whose_outputs_are_not_finite_is_shown(report: Report) -> None:
    spread = Spread(0.004, 0.003, 0.005)
    side = Side(spread, math.inf, 5_000_000)
    bench = BenchResult((Row("tvm", 1, 1, Side(spread, 0.0), side, Spread(1.0, 1.0, 1.0), None),), None, 3, {})
    (row,) = rows(sections(report.measured(bench=bench))["Latency"].one("table"))
    assert "not finite" in row
    text = json.dumps(bench.to_json(), allow_nan=False)  # JSON has no infinity; this raises if there is one
    assert BenchResult.from_json(json.loads(text)) == bench


def test_differences_stand_below_one_another(report: Report) -> None:
    evaluation = {"top-1 accuracy": (0.5, 0.5), "top-5 accuracy": (0.75, 0.7), "errors": (0, 3)}
    table = sections(report.measured(evaluation=evaluation))["Evaluation"].one("table")
    assert [row[3] for row in rows(table)] == ["no change", "\u22125.00 points", "from zero"]
    assert len(list(table.one("tbody").all("td", "number"))) == 3 * 4


def test_headers_of_tables_say_something(report: Report) -> None:
    for table in parse(html_report(report)).all("table"):
        for header in table.all("th"):
            assert header.text, "an empty header is read out as one"
            assert header.attributes["scope"] in ("col", "row")
        assert len(list(table.one("thead").one("tr").children)) == len(list(table.one("tbody").one("tr").children))


def test_refusals_are_counted_by_reason(report: Report) -> None:
    counts: dict[str, int] = {}
    for refusal in report.refusals:
        counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
    section = sections(report)["Not narrowed"]
    for details in section.all("details"):
        count = int(details.one("span", "count").text.split()[0])
        assert len(rows(details.one("table"))) == count
        reason = details.one("summary").text.removesuffix(details.one("span", "count").text)
        assert counts.pop(reason[0].lower() + reason[1:]) == count
    assert not counts


@pytest.mark.parametrize("block", range(3))
def test_charts_colour_what_stays(report: Report, block: int) -> None:
    """The coloured columns, read from their SVG paths, agree with the spectrum's flags."""
    spectrum = list(report.spectra.values())[block]
    chart = list(sections(report)["Activation variance"].all("figure"))[block].one("svg")
    starts: dict[float, float] = {}
    for path in chart.all("path", "stays"):
        for start in re.findall(r"M([\d.]+) ", path.attributes["d"] or ""):
            starts[float(start)] = float(path.attributes["fill-opacity"] or 1)
    left, right = 38.0, 312.0
    expected = {}
    for kept, first, behind in zip(spectrum.kept, spectrum.bounds, spectrum.bounds[1:], strict=False):
        if kept:
            x = round(left + (right - left) * first / spectrum.neurons, 1)
            expected[x] = kept / (behind - first)
    assert set(starts) == set(expected)
    for x, share in expected.items():
        assert abs(starts[x] - share) <= 0.25
        assert (starts[x] == 1) == (share == 1)
    cuts = [float(line.attributes["x1"] or 0) for line in chart.all("line", "cut")]
    kept = sum(spectrum.kept)
    whole = kept == spectrum.neurons
    assert cuts == ([] if whole else [pytest.approx(left + (right - left) * kept / spectrum.neurons, abs=0.051)])


def test_reports_of_older_versions_are_shown(report: Report) -> None:
    old = {key: value for key, value in json.loads(json.dumps(report.to_json())).items() if key not in LATER}
    found = sections(Report.from_json(old | {"verification": None}))
    assert set(found) == {"Width per block", "Not narrowed", "Checked", "How it was made"}
    assert [heading.text for heading in found["How it was made"].all("h3")] == ["Settings"]
    assert "did not check these weights" in found["Checked"].text


def test_the_python_call_makes_the_same_plan(pruned: vbpfx.Pruned) -> None:
    code = sections(pruned.report)["How it was made"].one("pre").text
    torch.manual_seed(0)
    scope: dict[str, Any] = {"calibration": [torch.randn(64, 8) for _ in range(3)], "model": pruned.captured.reference}
    exec(code, scope)
    assert [e.kept for e in scope["pruned"].plan.blocks] == [e.kept for e in pruned.plan.blocks]


def test_measuring_with_another_version_does_not_change_what_pruned(report: Report) -> None:
    for measured, name in (("2.13.0", "torch"), ("2.12.0", "torch, for the latency")):
        bench = BenchResult((), None, 3, {"torch": measured, "onnxruntime": "1"})
        versions = {"vbpfx": "0", "torch": "2.13.0+cpu"}
        found = sections(replace(report, versions=versions).measured(bench=bench))["How it was made"]
        shown = list(found.all("dl"))[-1]
        said = dict(zip([dt.text for dt in shown.all("dt")], [dd.text for dd in shown.all("dd")], strict=True))
        assert said == versions | {"onnxruntime": "1"} | ({} if name == "torch" else {name: measured})


@pytest.mark.parametrize("criterion", [lambda about: about.inputs[0][0].variance, Largest()])
def test_an_own_criterion_is_shown_by_a_name_that_python_can_read(criterion: Any) -> None:
    torch.manual_seed(0)
    given = {"ratio": 0.4, "method": "vbp", "criterion": criterion}
    page = sections(vbpfx.prune(two(), [torch.randn(64, 8)], progress=False, **given).report)["How it was made"]
    call = ast.parse(page.one("pre").text).body[-1]
    assert isinstance(call, ast.Assign)
    assert "    criterion=Largest," in page.one("pre").text or "    criterion=criterion," in page.one("pre").text
    assert " at 0x" not in page.text


def test_no_variance_at_all_is_drawn(report: Report) -> None:
    dead = Spectrum(2, (0.0, 0.0), (1, 0), 1, 1.0)
    whole = Spectrum(2, (4.0, 0.0), (1, 1), 2, 1.0)
    for spectra in ({"dead": dead}, {"dead": dead, "whole": whole}):
        section = sections(replace(report, spectra=spectra))["Activation variance"]
        assert "nan" not in section.text
        assert "Variances beyond the scale" in section.text
    assert "All 2 neurons stay" in section.text
    assert "1 of 2 neurons stays; none of them varies on the calibration data" in section.text
    assert len(list(section.all("line", "cut"))) == 2  # one in the legend and one in the chart of ``dead``


@pytest.mark.parametrize(
    ("spectrum", "said"),
    [
        (Spectrum(1, (4.0,), (1,), 1, 1.0), "Its one neuron stays"),
        (
            Spectrum(2, (4.0, 1.0), (1, 0), 1, 0.8),
            "1 of 2 neurons stays, the one of highest variance; it holds 80.0% of",
        ),
        (
            Spectrum(2, (4.0, 1.0), (0, 1), 0, 0.2),
            "1 of 2 neurons stays, not the one of highest variance; it holds 20.0%",
        ),
    ],
)
def test_one_is_no_plural(report: Report, spectrum: Spectrum, said: str) -> None:
    narrow = replace(report, neurons=(2, 1), widths={"a": (2, 1)}, spectra={"a": spectrum})
    page = parse(html_report(narrow))
    assert said in page.one("figure").text
    assert "1 of 2 hidden neurons is gone from 1 block;" in page.text
    ticks = [text.text for text in page.one("svg", "spectrum").all("text")]
    assert ticks.count("1") == 1 + (spectrum.neurons > 1)  # the first rank, and the cut after it


@pytest.mark.parametrize("highest", [1.0, 1.4, 3.0, 9.0, 2e-7])
def test_a_scale_can_be_read(report: Report, highest: float) -> None:
    spectrum = Spectrum(3, (highest, highest / 2, highest / 3), (1, 1, 0), 2, 0.8)
    chart = sections(replace(report, spectra={"a": spectrum}))["Activation variance"].one("svg", "spectrum")
    labels = {text.text: float(text.attributes["y"] or 0) for text in chart.all("text") if text.text.startswith("10")}
    assert len(labels) >= 2
    assert all(20 < y < 165 for y in labels.values())  # between the top and the base line


def test_a_block_that_never_varies_does_not_stretch_the_scale() -> None:
    small = Spectrum(3, (2e-6, 1e-6, 5e-7), (1, 1, 0), 2, 0.8)
    dead = Spectrum(3, (0.0, 0.0, 0.0), (1, 1, 0), 2, 1.0)
    assert common_scale([small, dead]) == common_scale([small])


def test_one_outlier_does_not_flatten_all_curves(report: Report) -> None:
    """One neuron has variance 600 among 200 near 1: the scale ends above the others, and the chart states the 600."""
    values = (600.0, *(2.0 - i / 200 for i in range(199)))
    spectrum = Spectrum(200, values, (1,) * 200, 200, 1.0)
    low, high = common_scale([spectrum])
    assert 0.3 < high < 0.5
    assert low < 0
    section = sections(replace(report, spectra={"block": spectrum}))["Activation variance"]
    assert "variance, up to 600" in section.one("svg", "spectrum").text
    assert "Variances beyond the scale" in section.text


def test_notebooks_show_the_headline_and_the_widths(report: Report, pruned: vbpfx.Pruned) -> None:
    view = parse(report._repr_html_())
    costs, widths = view.all("table")
    assert [row[:3] for row in rows(costs)] == [[name, f"{a:,}", f"{b:,}"] for name, (a, b) in report.costs.items()]
    assert [row[0] for row in rows(widths)] == list(report.widths)
    assert parse(pruned._repr_html_()).all("table")
    assert "<b>" not in pruned._repr_html_()
    for shown in (pruned, report):
        assert len(repr(shown)) < 200
        assert f"parameters {report.params[0]:,} -> {report.params[1]:,}" in repr(shown)


def test_notebooks_show_an_analysis(pruned: vbpfx.Pruned) -> None:
    blocks, refusals = parse(pruned.analysis._repr_html_()).all("table")
    assert [(r[0], r[1]) for r in rows(blocks)] == [(b.name, str(b.width)) for b in pruned.analysis.usual]
    assert [r[-1] for r in rows(refusals)] == [r.reason for r in pruned.analysis.refusals]
