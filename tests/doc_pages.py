"""Parse pages of documentation: the code blocks that can run, and the links."""

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
        language: language of the block; ``python`` and ``sh`` blocks are run, others are not.
        line: line of the page where the block begins.
        title: name of the file that the block shows, if it is not code to run.
        shown: expected output, from the ``text`` block that follows; ``...`` stands for any text.
        needs: packages that the block needs, from ``<!-- needs: a, b -->`` in the line before; it is skipped without them.
        parsed: whether the command is only parsed because it would take too long, from ``<!-- parsed -->`` in that line.
    """

    language: str
    text: str
    line: int
    title: str | None
    shown: str | None
    needs: tuple[str, ...]
    parsed: bool


def code_blocks(page: Path) -> list[Code]:
    """Return the code blocks of a page in order."""
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
    """Return the page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures within the repository."""
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as Markdown's table of contents generates them."""
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
