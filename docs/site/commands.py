"""The reference of the command line, made from the commands themselves. A hook of MkDocs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the commands where it asks for them."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Every command with its arguments and options."""
    from vbpfx.cli.root import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join(line for name, command in commands.items() for line in _section(name, command))


def _section(name: str, command: Any) -> Iterator[str]:
    """Heading, sentence and table of one command."""
    first, *_ = (command.help or "").strip().split("\n\n")
    yield from (f"## vbpfx {name}", "", " ".join(first.split()), "", "| argument | |", "|---|---|")
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        named = parameter.param_type_name == "option"
        shown = ", ".join(f"`{option}`" for option in parameter.opts) if named else f"`{_placeholder(parameter)}`"
        yield f"| {shown} | {_sentence(parameter)} |"
    yield ""


def _placeholder(parameter: Any) -> str:
    return (parameter.metavar or parameter.name.upper()).strip("[]{}").replace("|", " or ")


def _sentence(parameter: Any) -> str:
    help = " ".join((parameter.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    if parameter.required:
        return f"{help} Required."
    default = parameter.default
    if default in (None, False, "", ()) or callable(default) or type(default).__name__ == "_Unset":
        return help
    values = default if isinstance(default, (list, tuple)) else [default]
    shown = ", ".join(f"`{getattr(value, 'value', value)}`" for value in values)
    return f"{help} By default {shown}."
