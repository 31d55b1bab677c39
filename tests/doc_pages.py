"""Pages of documentation, taken apart: what there is to run in them, and where their links lead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}

_FENCE = re.compile(
    r"^(?:<!-- (?P<marks>[^\n]*?) -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Code:
    """A block of code.

    Attributes:
        language: ``python`` and ``sh`` run; what another language holds is shown alone.
        line: where it begins in its page.
        title: the name of the file that it is, in place of code to run.
        shown: what the page says that it prints: the ``text`` block behind it. ``...`` stands for anything.
        needs: packages without which it is not run: ``<!-- needs: a, b -->`` in the line before.
        parsed: a command that is parsed alone, as it would take too long: ``<!-- parsed -->`` there.
    """

    language: str
    text: str
    line: int
    title: str | None
    shown: str | None
    needs: tuple[str, ...]
    parsed: bool


def code_blocks(page: Path) -> list[Code]:
    """The blocks of a page in their order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        marks = match["marks"] or ""
        needs = tuple(marks.removeprefix("needs: ").split(", ")) if marks.startswith("needs: ") else ()
        line = text.count("\n", 0, match.start("code")) + 1
        parts = match["language"], match["code"], line, match["title"], match["shown"]
        found.append(Code(*parts, needs, parsed=marks == "parsed"))
    return found


def prose(page: Path) -> str:
    """The page without its blocks of code and its code spans."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def links(page: Path) -> list[str]:
    """Targets of links and pictures that lie in the repository."""
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower())
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}_{number}", number + 1
        found.add(unique)
    return found | set(re.findall(r'id="([\w.-]+)"', text))
