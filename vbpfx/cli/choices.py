"""Options that take one of a few names, and these names.

The library's tables of names need PyTorch, which ``--help`` must not import. So the names are repeated here, and a test
compares them with the tables. The names of criteria and runtimes come from the names of their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

METHODS = ("auto", "vbp")
ALLOCATIONS = ("global", "normalised", "equal", "sensitivity")
COMPENSATIONS = ("none", "mean", "ridge")
FRONTENDS = ("auto", "symbolic", "export")
BAD_IMAGES = ("refuse", "skip")
OUTPUT_KINDS = ("logits", "values")
RECIPES = ("default", "few", "paper")
LOSSES = ("kl", "mse")
PRECISIONS = ("no", "bf16", "fp16")


def choice(names: Sequence[str], *flags: str, **settings: Any) -> Any:
    """Return an option that takes one of the names, and shows them in its help.

    Args:
        names: the allowed values.
        flags, settings: as ``typer.Option`` takes them.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return value

    return typer.Option(
        *flags, metavar=f"<{'|'.join(names)}>", callback=check, autocompletion=lambda: list(names), **settings
    )
