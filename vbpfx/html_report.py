"""The page: a report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbpfx.bench_result import BenchResult
from vbpfx.charts import bar, decades, describe, spectrum_chart
from vbpfx.figures import percent
from vbpfx.files import Write, json_writer, text_writer, write_atomically
from vbpfx.html_sections import cards, check, evaluation, latency, making, refitted, refused
from vbpfx.markup import Markup, joined, tag
from vbpfx.report import Report
from vbpfx.tables import counted

_STYLE = Path(__file__).with_name("report.css")


def html_report(report: Report) -> str:
    """A report as one HTML page: no script, no font, no picture from elsewhere; light or dark as the reader has it."""
    title = f"{report.network or 'Network'}, pruned"
    body = joined(
        tag(
            "header",
            tag("p", "vbpfx report", class_="eyebrow"),
            tag("h1", title),
            tag("p", _summary(report), class_="lead"),
            cards(report),
        ),
        tag(
            "main",
            *(
                tag("section", tag("h2", heading), content)
                for heading, content in (
                    ("Accuracy", evaluation(report)),
                    ("Latency", latency(report)),
                    ("Width per block", _widths(report)),
                    ("Activation variance", _spectra(report)),
                    ("Not narrowed", refused(report)),
                    ("Fitted beside the blocks", refitted(report)),
                    ("Checked", check(report)),
                    ("How it was made", making(report)),
                )
                if content is not None
            ),
        ),
        tag("footer", tag("p", _made_by(report))),
    )
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{title} - vbpfx"),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def notebook_view(report: Report) -> str:
    """The headline and the widths, small enough for a notebook's cell, in colours of the notebook."""
    style = (
        ".vbpfx .bar{display:block;width:10rem;height:.6rem}.vbpfx .track{fill:#8884}.vbpfx .stays{fill:#3b82d8}"
        ".vbpfx .number{text-align:right}.vbpfx th{text-align:left;font-weight:normal}"
    )
    return str(tag("div", tag("style", Markup(style)), tag("p", _summary(report)), class_="vbpfx"))


def report_files(report: Report) -> dict[str, Write]:
    """``report.json`` and ``report.html``, by name, for a commit of several files."""
    return {"report.json": json_writer(report.to_json()), "report.html": text_writer(html_report(report))}


def update_report(
    folder: str | Path, *, evaluation: Mapping[str, Any] | None = None, bench: BenchResult | None = None
) -> Report:
    """Add what was measured to the report of a saved network; arguments as :meth:`vbpfx.Report.measured` takes them.

    Raises:
        ArtifactError: the folder holds no report, or cannot be written; both files stay as they were.
    """
    report = Report.load(folder).measured(evaluation=evaluation, bench=bench)
    write_atomically({Path(folder) / name: write for name, write in report_files(report).items()})
    return report


def _summary(report: Report) -> str:
    dense, pruned = report.neurons
    narrowed = sum(now < before for before, now in report.widths.values())
    return (
        f"{dense - pruned:,} of {dense:,} hidden neurons are gone from {counted(narrowed, 'block')}, without retraining; "
        f"{percent(report.params[1] / report.params[0])} of the parameters and {percent(report.macs[1] / report.macs[0])} "
        f"of the multiply-accumulates are left."
    )


def _widths(report: Report) -> Markup:
    largest = max((before for before, _ in report.widths.values()), default=1)
    rows = [
        tag(
            "tr",
            tag(
                "th",
                tag("div", tag("code", name), bar(now, before, largest), class_="named-bar"),
                scope="row",
            ),
            *(tag("td", text, class_="number") for text in (f"{before:,}", f"{now:,}", percent(now / before))),
        )
        for name, (before, now) in report.widths.items()
    ]
    head = tag(
        "tr", tag("th", "block", scope="col"),
        *(tag("th", text, scope="col", class_="number") for text in ("before", "now", "kept")),
    )  # fmt: skip
    floor = report.settings.get("at_floor")
    return joined(
        tag("p", "Hidden neurons of every block, before and now; bars are drawn on one scale.", class_="note"),
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", *rows), class_="widths"),
            class_="scroll", role="region", aria_label="Width per block", tabindex=0,
        ),
        tag("p", f"At the floor (min_width): {', '.join(floor)}.", class_="note") if floor else None,
    )  # fmt: skip


def _spectra(report: Report) -> Markup | None:
    if not report.spectra:
        return None
    scale = decades(report.spectra.values())
    hidden = any(v < 10.0 ** scale[0] for spectrum in report.spectra.values() for v in spectrum.variances)
    text = "Each chart ranks the neurons of a block by the variance of their activation on the calibration data, on one log scale."
    by_variance = report.settings.get("criterion") == "variance"
    honest = (
        "The method removes the neurons of lowest variance; where the cut falls in a block, its ranking over all blocks says."
        if by_variance
        else "The method does not go by variance alone: it counts how strongly the next layer reads a neuron, and how well the "
        "others predict it. So coloured and grey columns mix."
    )
    return joined(
        tag("p", text),
        tag("p", honest, class_="note"),
        tag(
            "ul",
            tag("li", _swatch(tag("rect", class_="stays", width="100%", height="100%", rx=2)), "stays"),
            tag("li", _swatch(tag("rect", class_="goes", width="100%", height="100%", rx=2)), "goes"),
            tag(
                "li",
                _swatch(tag("line", class_="cut", x1="50%", x2="50%", y1=0, y2="100%")),
                "where a cut by variance alone would be",
            ),
            class_="legend",
        ),
        tag(
            "div",
            *(
                tag(
                    "figure",
                    spectrum_chart(name, spectrum, scale),
                    tag("figcaption", tag("code", name), tag("span", describe(spectrum))),
                )
                for name, spectrum in report.spectra.items()
            ),
            class_="charts",
        ),
        tag("p", "Variances below the scale are drawn at its lower end.", class_="note") if hidden else None,
    )


def _swatch(shape: Markup) -> Markup:
    return tag("svg", shape, aria_hidden="true")


def _made_by(report: Report) -> str:
    if not report.versions:
        return "Made by vbpfx."
    return f"Made by vbpfx {report.versions['vbpfx']}. The same figures, for programs, are in report.json beside this file."
