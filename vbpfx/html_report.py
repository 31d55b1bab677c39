"""The page: a report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vbpfx.bench_result import BenchResult
from vbpfx.files import Write, json_writer, text_writer, write_atomically
from vbpfx.report import Report


def html_report(report: Report) -> str:
    """A report as one HTML page: no script, no font, no picture from elsewhere."""
    return f"<!doctype html><html lang=en><title>vbpfx</title><pre>{escape(str(report))}</pre></html>"


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
