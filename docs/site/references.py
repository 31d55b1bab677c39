"""References in docstrings, such as :func:`vbpfx.prune`, as links of the site. An extension of griffe, for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):`(~?)([\w.]+)`")


class References(griffe.Extension):
    """Links to what the package's front door names; code for everything else."""

    def __init__(self) -> None:
        self.public: set[str] = set()

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """All docstrings of the package, once its names are known."""
        self.public = {str(name).strip("'\"") for name in pkg.exports or ()}
        self._rewrite(pkg)

    def _rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(self._link, obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)  # type: ignore[arg-type]

    def _link(self, match: re.Match[str]) -> str:
        path = match[2]
        name = path.rpartition(".")[2]
        shown = name if match[1] else path
        return f"[`{shown}`][vbpfx.{name}]" if name in self.public else f"`{shown}`"
