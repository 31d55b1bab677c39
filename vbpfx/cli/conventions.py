"""What all commands share: option types, one-line errors, exit statuses.

This file and those of the commands import nothing heavy but inside the commands: ``--help`` need not wait for torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from vbpfx.errors import VbpfxError

Debug = Annotated[bool, typer.Option(help="Show the whole traceback of an error.")]


@contextmanager
def failing_in_one_line(debug: bool) -> Iterator[None]:
    """What goes wrong on purpose is one line on standard error, and exit status 1."""
    try:
        yield
    except (VbpfxError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"vbpfx: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def sizes(shape: str) -> tuple[int, ...] | None:
    """The numbers in a ``--shape`` such as 3x224x224; None for none.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        found = tuple(int(size) for size in shape.split("x")) if shape else None
    except ValueError as error:
        raise typer.BadParameter(f"--shape {shape}: expected numbers such as 3x224x224") from error
    if found is not None and min(found) < 1:
        raise typer.BadParameter(f"--shape {shape}: expected sizes of 1 and more, such as 3x224x224")
    return found
