"""Links in the documentation have existing targets, including headings. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, anchors, links

SOURCES = {**PAGES, **{name: ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}}


@pytest.mark.parametrize("name", SOURCES)
def test_links_lead_somewhere(name: str) -> None:
    page = SOURCES[name]
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name} links to {file}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name} links to {link}; headings there: {sorted(anchors(target))}"


def test_anchors_are_those_of_the_site(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `vbpfx.prune`: one call\n\n## What goes in?\n\n```sh\n# no heading\n```\n\n## What goes in?\n")
    assert anchors(page) == {"vbpfxprune-one-call", "what-goes-in", "what-goes-in_1"}


@pytest.mark.parametrize("name", SOURCES)
def test_programs_that_are_named_exist(name: str) -> None:
    """Pages name the programs that print their figures, and those programs must exist."""
    for program in re.findall(r"\b((?:benchmarks|tests|docs/examples)/[\w/]+\.py)\b", SOURCES[name].read_text()):
        assert (ROOT / program).exists(), f"{name} names {program}"
