"""Add measurements of a pruned network to the report in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import note

InReport = Annotated[bool, typer.Option(help="Add what was measured to report.html and report.json in DIR.")]


def add_to_report(folder: Path, **measured: Any) -> None:
    """Add measurements to the report in a folder, and print a note. If that fails, print why and go on.

    Args:
        measured: as :func:`vbpfx.report.page.update_report` takes them.
    """
    from vbpfx.errors import ArtifactError
    from vbpfx.report.page import update_report

    try:
        update_report(folder, **measured)
    except ArtifactError as error:
        note(f"the report stays as it was: {error}")
    else:
        note(f"added to {folder / 'report.html'}")
