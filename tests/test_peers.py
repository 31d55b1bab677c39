"""The comparison with Torch-Pruning shows the outcome of both tools; skipped if Torch-Pruning is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_pages import DOCS


@pytest.mark.filterwarnings("ignore")  # Torch-Pruning's own
def test_the_page_shows_what_comes_of_the_networks(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    import peers

    assert peers.main(["--docs", str(tmp_path)]) == 0
    written = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len(written) == 2 + len(peers.NETWORKS)
    shown = (DOCS / "comparison.md").read_text().splitlines()
    assert all(line in shown for line in written)
