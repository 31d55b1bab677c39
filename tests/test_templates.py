"""Templates: they ship with the package, escape what they are given, and say what they miss."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
from pages import HOSTILE, parse

import vbpfx
from vbpfx.display.templates import _environment, render

PACKAGE = Path(vbpfx.__file__).parent
TEMPLATES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.jinja"))
COLUMNS = ("name", "width")


def table(rows: list[tuple[object, ...]], title: str = "") -> str:
    content = (title, COLUMNS, rows)
    return render("analysis/blocks.html.jinja", blocks=content, refusals=content)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_found_and_is_sound(name: str) -> None:
    source = (PACKAGE / name).read_text(encoding="utf-8")
    assert _environment().get_template(name)
    assert "|safe" not in source.replace(" ", "")
    assert "autoescape" not in source


def test_values_are_text_wherever_they_stand() -> None:
    found = parse(table([(HOSTILE, '"><i>')], title="</caption><b>"))
    (cell, *_), (value, *_) = found.all("th"), found.all("td")
    names = [th.text for th in found.all("th") if th.attributes["scope"] == "row"]
    assert names == [HOSTILE, HOSTILE]
    assert value.text == '"><i>'
    assert found.one("caption").text == "</caption><b>"
    assert not list(found.all("i"))
    assert not list(found.all("b"))
    assert cell.attributes == {"scope": "col"}


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'refusals' is undefined"):
        render("analysis/blocks.html.jinja", blocks=("", COLUMNS, []))


@pytest.mark.parametrize(("cells", "numeric"), [([1, 2000], True), (["1.5 MB", "no change"], True), (["a", 1], False)])
def test_columns_of_figures_are_set_to_the_right(cells: list[object], numeric: bool) -> None:
    found = parse(table([("x", cell) for cell in cells]))
    shown = list(found.one("tbody").all("td"))
    assert [td.attributes.get("class") for td in shown] == ["number" if numeric else None] * len(cells)
    assert shown[-1].text == ("2,000" if cells[-1] == 2000 else str(cells[-1]))
