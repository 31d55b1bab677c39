"""The code in the documentation runs, page by page, and prints what the page shows."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from doc_pages import PAGES, ROOT, Code, code_blocks
from typer.testing import CliRunner

import vbpfx.pipeline.model
from vbpfx.cli.root import app
from vbpfx.onnx_graph import table as onnx_table
from vbpfx.rules import table as rules

RUN = {name: path for name, path in PAGES.items() if any(c.language in ("python", "sh") for c in code_blocks(path))}
OTHER_COMMANDS = ("make", "pip", "python", "torchrun", "source", "cd", "git", "#")


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All code blocks of a page run in order, in one namespace and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))  # pages register operators
    monkeypatch.setattr(onnx_table, "_OPERATORS", dict(onnx_table._OPERATORS))
    random.seed(0)
    np.random.seed(0)
    names: dict[str, object] = {"__name__": "__page__"}
    for code in code_blocks(PAGES[name]):
        if code.title is not None:
            Path(code.title).write_text(code.text)
        elif any(_missing(package) for package in code.needs):
            continue
        elif code.language == "python":
            _compare(name, code, _printed(name, code, names))
        elif code.language == "sh":
            _compare(name, code, "".join(_run(line, code) for line in _lines(code.text)))


def test_docstring_examples() -> None:
    outcome = doctest.testmod(vbpfx.pipeline.model)
    assert outcome.attempted >= 4
    assert outcome.failed == 0


def _missing(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return True
    return False


def _printed(name: str, code: Code, names: dict[str, object]) -> str:
    """Run a block of Python and return its output. Line numbers in tracebacks are those of the page."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (code.line - 1) + code.text, name, "exec"), names)
    return out.getvalue()


def _compare(name: str, code: Code, printed: str) -> None:
    """Assert that the page shows the real output, where ``...`` stands for text that differs between machines."""
    if code.shown is None:
        return
    wanted, found = (_without_trailing_space(text) for text in (code.shown, printed))
    same = doctest.OutputChecker().check_output(wanted, found, doctest.ELLIPSIS)
    assert same, f"{name}:{code.line} shows\n{wanted}\nand prints\n{found}"


def _without_trailing_space(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.strip().splitlines())


def _lines(text: str) -> list[str]:
    """Split into commands, joining those that span several lines."""
    return [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def _run(line: str, code: Code) -> str:
    """Run or parse a vbpfx command; for other commands, check that the files and targets they name exist."""
    words = shlex.split(line, comments=True)
    if not words:
        return ""
    if words[0] == "torchrun":
        words = words[words.index("vbpfx") :] if "vbpfx" in words else words
    if words[0] != "vbpfx":
        _require_what_it_names(line, words)
        return ""
    if code.parsed:
        _parse(words[1:])
        return ""
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.stdout


def _parse(words: list[str]) -> None:
    """Assert that the command, its arguments and its options exist."""
    group = typer.main.get_command(app)
    context = group.make_context("vbpfx", list(words), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, words)  # type: ignore[attr-defined]
    command.make_context(name, rest, parent=context)


def _require_what_it_names(line: str, words: list[str]) -> None:
    assert words[0] in OTHER_COMMANDS, f"no check for {line!r}"
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, line
    if words[0] == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        named = [extra for word in words for group in re.findall(r"vbpfx\[(.*?)\]", word) for extra in group.split(",")]
        assert all(extra in extras for extra in named), line
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists() or Path(words[1]).exists(), line


def test_the_readme_says_what_was_recorded() -> None:
    """The README's table on the ViT-Tiny shows the figures in the benchmark's results."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "retention-vit_tiny.json").read_text())["results"]
    kept = {(one["method"], one["ratio"]): one["figures"]["kept"] for one in recorded if one["calibration"] == 1000}
    readme = (ROOT / "README.md").read_text()
    columns = re.findall(r"(\d+) %", re.findall(r"^\| hidden neurons removed \|(.*)$", readme, re.MULTILINE)[0])
    rows = {
        "VBP, as published": "vbp",
        "DVBP + OB2C": "dvbp+ob2c",
        "OBS, one-shot": "obs",
        'vbpfx, `method="auto"`': "auto",
    }
    for title, method in rows.items():
        (line,) = [line for line in readme.splitlines() if line.replace("*", "").startswith(f"| {title} |")]
        said = re.findall(r"([\d.]+) %", line)
        assert said == [f"{100 * kept[method, int(percent) / 100]:.1f}" for percent in columns]
