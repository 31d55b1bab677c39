"""The notebooks run from top to bottom and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS

NOTEBOOKS = {path.name: path for path in sorted((DOCS / "notebooks").glob("*.ipynb"))}


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads(NOTEBOOKS[name].read_text())["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of all cells runs in order in one namespace; figures are drawn but not shown."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", plt.close)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}[{number}]", "exec"), names)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_of_a_machine_is_stored(name: str) -> None:
    for cell in cells(name):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell["metadata"]
