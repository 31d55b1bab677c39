"""The page: a report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbpfx.display.templates import render
from vbpfx.measurement.bench_result import BenchResult
from vbpfx.report.charts import Chart, common_scale, leaves, spectrum_chart
from vbpfx.report.measured import cards, evaluation, latency
from vbpfx.report.notebook import with_shares
from vbpfx.report.report import Report
from vbpfx.report.sections import checks, python_call, refusals_by_reason, settings, versions
from vbpfx.report.spectrum import Spectrum
from vbpfx.storage.files import Write, json_writer, text_writer, write_atomically

_MOST_CHARTS = 128


def html_report(report: Report) -> str:
    """Return a report as a self-contained HTML page, without scripts, in the reader's light or dark theme."""
    return render(
        "report/page.html.jinja",
        report=report,
        title=f"{report.network or 'Network'}, pruned",
        cards=cards(report),
        evaluation=evaluation(report),
        latency=latency(report),
        blocks=with_shares(report.widths),
        spectra=_spectra(report.spectra),
        refusals=refusals_by_reason(report),
        refitted=report.settings.get("reconstruction", {}).get("refitted"),
        checks=checks(report.verification) if report.verification else [],
        call=python_call(report),
        settings=settings(report),
        versions=versions(report),
    )


def report_files(report: Report) -> dict[str, Write]:
    """Return writers for ``report.json`` and ``report.html`` by file name, for writing several files at once."""
    return {"report.json": json_writer(report.to_json()), "report.html": text_writer(html_report(report))}


def update_report(
    folder: str | Path, *, evaluation: Mapping[str, Any] | None = None, bench: BenchResult | None = None
) -> Report:
    """Add measurements to the report of a saved network. The arguments are those of :meth:`vbpfx.Report.measured`.

    A new evaluation replaces the earlier one, because figures of two data sets would look like those of one.

    Raises:
        ArtifactError: the folder holds no report, or cannot be written. Both files then stay as they were.
    """
    report = Report.load(folder).measured(evaluation=evaluation, bench=bench)
    write_atomically({Path(folder) / name: write for name, write in report_files(report).items()})
    return report


def _spectra(spectra: Mapping[str, Spectrum]) -> dict[str, Any] | None:
    """Return the charts on one common scale, whether any exceeds it, and whether columns stand for several neurons."""
    if not spectra:
        return None
    drawn = _drawn(spectra)
    scale = common_scale(drawn.values())
    charts: list[Chart] = [spectrum_chart(name, spectrum, scale) for name, spectrum in drawn.items()]
    return {
        "charts": charts,
        "beyond": any(leaves(spectrum, scale) for spectrum in drawn.values()),
        "shared": any(spectrum.neurons > len(spectrum.variances) for spectrum in drawn.values()),
    }


def _drawn(spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    """Return the spectra to draw: of very many blocks only some, so that the page stays small."""
    names = list(spectra)
    count = min(_MOST_CHARTS, len(names))
    return {name: spectra[name] for name in (names[i * len(names) // count] for i in range(count))}
