"""References in docstrings, such as :func:`vbpfx.prune`, as links of the site. An extension of griffe, for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> (?:.+\n)+", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):`(~?)([\w.]+)`")


class References(griffe.Extension):
    """Links to what the package's front door names; code for everything else. Examples become code."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """All docstrings of the package, once its names are known."""
        for name in (str(entry).strip("'\"") for entry in pkg.exports or ()):
            inside = f".{name}" if pkg.members[name].is_module else ""  # a function in a module of its name
            self.places[name] = f"{pkg.path}.{name}{inside}"
        self._rewrite(pkg)

    def _rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(self._link, text)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)  # type: ignore[arg-type]

    def _link(self, match: re.Match[str]) -> str:
        path = match[2]
        name = path.rpartition(".")[2]
        shown = name if match[1] else path
        return f"[`{shown}`][{self.places[name]}]" if name in self.places else f"`{shown}`"
