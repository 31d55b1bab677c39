"""The command ``vbpfx demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vbpfx.cli.conventions import Debug, failing_in_one_line


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files, the artifact and the plot.")] = Path(
        "demo-output"
    ),
    debug: Debug = False,
) -> None:
    """Prune a trained network on real data, without a download; takes about a minute on two cores."""
    with failing_in_one_line(debug):
        from vbpfx.demo.run import run_demo

        run_demo(out, Console())
