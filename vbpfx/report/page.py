"""The page: a report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbpfx.display.figures import capital
from vbpfx.display.markup import Markup, joined, tag
from vbpfx.display.tables import counted, scrolling
from vbpfx.measurement.bench_result import BenchResult
from vbpfx.report.charts import common_scale, describe, leaves, spectrum_chart
from vbpfx.report.measured import cards, evaluation, latency
from vbpfx.report.notebook import widths_table
from vbpfx.report.report import Report
from vbpfx.report.sections import check, making, refitted, refused
from vbpfx.report.spectrum import Spectrum
from vbpfx.storage.files import Write, json_writer, text_writer, write_atomically

_STYLE = Path(__file__).with_name("page.css")
_MOST_CHARTS = 128


def html_report(report: Report) -> str:
    """A report as one HTML page: no script, no font, no picture from elsewhere; light or dark as the reader has it."""
    title = f"{report.network or 'Network'}, pruned"
    body = joined(
        tag(
            "header",
            tag("p", "vbpfx report", class_="eyebrow"),
            tag("h1", title),
            tag("p", report.summary, class_="lead"),
            cards(report),
            tag("p", f"MACs, multiply-accumulates, are those of one sample of shape {report.sample}.", class_="note")
            if report.sample
            else None,
            tag("p", f"{report.sizes[:1].upper()}{report.sizes[1:]}.", class_="note") if report.fixed else None,
        ),
        tag(
            "main",
            *(
                tag("section", tag("h2", heading), content)
                for heading, content in (
                    ("Evaluation", evaluation(report)),
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


def report_files(report: Report) -> dict[str, Write]:
    """``report.json`` and ``report.html``, by name, for a commit of several files."""
    return {"report.json": json_writer(report.to_json()), "report.html": text_writer(html_report(report))}


def update_report(
    folder: str | Path, *, evaluation: Mapping[str, Any] | None = None, bench: BenchResult | None = None
) -> Report:
    """Add what was measured to the report of a saved network; arguments as :meth:`vbpfx.Report.measured` takes them.

    An evaluation takes the place of the one before: figures of two data sets would look like those of one.

    Raises:
        ArtifactError: the folder holds no report, or cannot be written; both files stay as they were.
    """
    report = Report.load(folder).measured(evaluation=evaluation, bench=bench)
    write_atomically({Path(folder) / name: write for name, write in report_files(report).items()})
    return report


def _widths(report: Report) -> Markup:
    floor = report.settings.get("at_floor")
    return joined(
        tag("p", "Hidden neurons of every block, before and now; bars are drawn on one scale.", class_="note"),
        scrolling("Width per block", widths_table(report.widths)),
        tag("p", f"At the floor (min_width): {', '.join(floor)}.", class_="note") if floor else None,
        tag("p", f"{report.advice}.", class_="note") if report.advice else None,
    )


def _spectra(report: Report) -> Markup | None:
    if not report.spectra:
        return None
    drawn = _drawn(report.spectra)
    scale = common_scale(drawn.values())
    beyond = any(leaves(spectrum, scale) for spectrum in drawn.values())
    text = "Each chart ranks the neurons of a block by the variance of their activation on the calibration data, on one log scale."
    criterion, allocation = (report.settings.get(name) for name in ("criterion", "allocation"))
    honest = (
        f"The neurons of lowest variance go; how many of each block, the allocation says ({allocation})."
        if criterion == "variance"
        else f"The criterion is {criterion}, not this variance: neurons that stay and neurons that go mix."
    )
    shared = any(spectrum.neurons > len(spectrum.variances) for spectrum in drawn.values())
    shades = " A column of several neurons is the paler the fewer of them stay." if shared else ""
    some = (
        f" Drawn are {len(drawn)} of {counted(len(report.spectra), 'block')}, evenly spread."
        if len(drawn) < len(report.spectra)
        else ""
    )
    return joined(
        tag("p", text),
        tag("p", honest, shades, some, class_="note"),
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
                    tag("figcaption", tag("code", name)),
                    spectrum_chart(name, spectrum, scale),
                    tag("p", capital(describe(spectrum)), class_="note"),
                )
                for name, spectrum in drawn.items()
            ),
            class_="charts",
        ),
        tag("p", "Variances beyond the scale are drawn at its ends.", class_="note") if beyond else None,
    )


def _drawn(spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    """The spectra that are drawn: of very many blocks some, so that the page stays small."""
    names = list(spectra)
    count = min(_MOST_CHARTS, len(names))
    return {name: spectra[name] for name in (names[i * len(names) // count] for i in range(count))}


def _swatch(shape: Markup) -> Markup:
    return tag("svg", shape, aria_hidden="true")


def _made_by(report: Report) -> str:
    if not report.versions:
        return "Made by vbpfx."
    return f"Made by vbpfx {report.versions['vbpfx']}. The same figures, for programs, are in report.json beside this file."
