"""The documentation site builds without warnings, and its pages load nothing from other servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_pages import ROOT

import vbpfx


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    # Without --quiet, because hidden warnings are not counted.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class _Fetched(HTMLParser):
    """Collect the resources that a browser would load to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.found.append(given.get("href") or "")


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        parser = _Fetched()
        parser.feed(page.read_text())
        assert parser.found
        assert not [target for target in parser.found if re.match(r"(https?:)?//", target)], page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="(vbpfx\.[\w.]+)"', text))
    missing = [name for name in vbpfx.__all__ if not {f"vbpfx.{name}", f"vbpfx.{vbpfx._HOME[name]}.{name}"} & anchors]
    assert not missing
    assert ":func:" not in text, "a reference was left as it stands in the docstring"
    assert ":class:" not in text


def test_every_command_is_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "command_line.html").read_text()
    for command in ("demo", "inspect", "prune", "eval", "finetune", "bench", "onnx"):
        assert f'id="vbpfx-{command}"' in text
    assert "<code>--ratio</code>" in text
