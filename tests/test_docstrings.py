"""The docstring of every public name describes what it does, its arguments, and its errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vbpfx

# Functions that raise no errors of their own.
QUIET = {"find_blocks", "without_weights"}
# Names whose formulas come from a paper, which the docstring cites.
SOURCES = {"make_plan": "arXiv 2507.12988", "Statistics": "arXiv 2507.12988"}
# Names with tensors among their fields or arguments, whose docstring states shapes or units.
UNITS = {"Statistics": "(d,)", "Report": "per sample", "Verification": "over"}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield public functions and public methods of public classes."""
    for name in vbpfx.__all__:
        found = getattr(vbpfx, name)
        if not inspect.isclass(found):
            yield name, found
            continue
        for attribute, value in vars(found).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if inspect.isfunction(function) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", function


FUNCTIONS = dict(public())
CLASSES = [name for name in vbpfx.__all__ if inspect.isclass(getattr(vbpfx, name))]


def section(docstring: str, title: str) -> str:
    """Return the text under a heading such as ``Args:``, or an empty text without that heading."""
    match = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    return match[1] if match else ""


def entries(text: str) -> set[str]:
    """Return the names that the entries of a section describe; one entry can have several."""
    heads = re.findall(r"^    (?! )([^:]+):", text, re.MULTILINE)
    return {name.strip(" *") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_their_arguments_and_errors(name: str) -> None:
    function = FUNCTIONS[name]
    documented = inspect.getdoc(function) or ""
    assert documented.splitlines()[0].endswith((".", ":")), "the first line is a sentence"
    parameters = inspect.signature(function).parameters.values()
    taken = {p.name for p in parameters if p.name not in ("self", "cls")}
    missing = taken - entries(section(documented, "Args")) - {"options"}
    assert not missing, f"{name}: Args: lacks {sorted(missing)}"
    if "." not in name or re.search(r"^\s+raise \w", inspect.getsource(function), re.MULTILINE):
        raised = entries(section(documented, "Raises"))
        assert raised or name in QUIET, f"{name}: no Raises:"
        for error in raised:
            assert hasattr(vbpfx, error), f"{name} documents {error}, which vbpfx does not export"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_name_their_fields(name: str) -> None:
    found = getattr(vbpfx, name)
    documented = inspect.getdoc(found) or ""
    assert documented
    if dataclasses.is_dataclass(found):
        fields = {field.name for field in dataclasses.fields(found) if not field.name.startswith("_")}
        missing = fields - entries(section(documented, "Attributes"))
        assert not missing, f"{name}: Attributes: lacks {sorted(missing)}"
    for attribute, value in vars(found).items():
        if isinstance(value, property) and not attribute.startswith("_"):
            assert value.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize(("name", "said"), [*SOURCES.items(), *UNITS.items()])
def test_sources_and_units_are_said(name: str, said: str) -> None:
    assert said in (inspect.getdoc(getattr(vbpfx, name)) or "")
