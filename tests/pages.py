"""Helpers for tests of report pages: a strict HTML parser, and a network with a hostile module name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from oracle import randomize
from torch import Tensor, nn

HOSTILE = "a<b>&'c"  # torch.fx itself cannot write code with a double quote in a name
# Fields that reports of older versions lack.
LATER = [
    "network",
    "sample",
    "size",
    "spectra",
    "refusals",
    "arguments",
    "versions",
    "evaluation",
    "tuning",
    "bench",
    "command",
]
_VOID = {"meta"}


class Two(nn.Module):
    """Two consecutive MLPs: 48 neurons under a hostile name and 300 under a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 8)))
        self.plain = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(getattr(self, HOSTILE)(x))  # type: ignore[no-any-return]


def two() -> nn.Module:
    """Return the network in eval mode with random weights."""
    return randomize(Two()).eval()


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str, class_: str | None = None) -> Iterator[Element]:
        """Yield the descendants with that name, in order."""
        for child in self.children:
            if isinstance(child, Element):
                if child.name == name and (class_ is None or class_ in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.all(name, class_)

    def one(self, name: str, class_: str | None = None) -> Element:
        """Return the first descendant with that name."""
        return next(self.all(name, class_))


class _Strict(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.now = Element("", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> states an attribute twice"
        element = Element(tag, dict(attrs), self.now)
        self.now.children.append(element)
        if tag not in _VOID:
            self.now = element

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.now.name, f"</{tag}> closes <{self.now.name}>"
        assert self.now.parent is not None
        self.now = self.now.parent

    def handle_data(self, data: str) -> None:
        self.now.children.append(data)


def parse(page: str) -> Element:
    """Parse a page, in which every element must be closed by its own end tag, into a tree."""
    parser = _Strict()
    parser.feed(page)
    parser.close()
    assert parser.now is parser.root, f"<{parser.now.name}> is never closed"
    return parser.root


def rows(table: Element) -> list[list[str]]:
    """Return the cells of a table as text, without its header."""
    body = table.one("tbody")
    return [[c.text for c in row.children if isinstance(c, Element)] for row in body.all("tr")]
