"""What was measured of a pruned network, in the report beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import note

InReport = Annotated[bool, typer.Option(help="Add what was measured to report.html and report.json in DIR.")]


def add_to_report(folder: Path, **measured: Any) -> None:
    """Add to the folder's report, as :func:`vbpfx.report.page.update_report` does, and say so; the figures count without it."""
    from vbpfx.errors import ArtifactError
    from vbpfx.report.page import update_report

    try:
        update_report(folder, **measured)
    except ArtifactError as error:
        note(f"the report stays as it was: {error}")
    else:
        note(f"added to {folder / 'report.html'}")
