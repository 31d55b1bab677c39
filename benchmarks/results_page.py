"""Write sections of docs/results.md: every table on it is written by the program that measured it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
INTRO = """# Results

What vbpfx does to networks, measured. Every table is written by a program in `benchmarks/`; no figure in it is copied in by
hand. Data is not part of the repository: set `VBPFX_DATA` to the folder that holds it, and run the command given with each
table.
"""


def describe_machine() -> dict[str, Any]:
    """Return the processor and the number of its cores, without the name of the machine."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def machine_line() -> str:
    """Return a description of the machine and the version of torch in one line."""
    machine = describe_machine()
    return f"torch {torch.__version__}; {machine['processor']}, {machine['cores']} cores."


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with right-aligned columns."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---:"] * len(columns), *rows))


def write_section(page: Path, name: str, text: str) -> None:
    """Put the text between the markers of that name and leave the rest of the page unchanged.

    A missing page is created with the introduction. If the page lacks the markers, the section is added at its end.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else INTRO
    if begin not in old or end not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
