"""Files beside the code: consistent versions, issue templates that ask for what is needed, a correct checklist."""

from __future__ import annotations

import re

import pytest
from doc_pages import DOCS, ROOT

import vbpfx

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vbpfx.__version__
    assert citation["license"] == "Apache-2.0"


def test_templates_ask_for_the_version() -> None:
    yaml = pytest.importorskip("yaml")
    assert [path.stem for path in TEMPLATES] == ["bug", "config", "model", "question"]
    for path in TEMPLATES:
        asked = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert "vbpfx --version" in str(asked["body"])
            assert len({field["id"] for field in asked["body"]}) == len(asked["body"])


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "vbpfx" / "py.typed").exists()


def test_the_release_checklist_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (DOCS / "release.md", DOCS / "stability.md", ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([\w-]+)", page.read_text()))
        assert named <= targets, page.name
