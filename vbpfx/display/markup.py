"""Markup: elements that close what they open, and text that is always escaped."""

from __future__ import annotations

from html import escape
from typing import Any


class Markup(str):
    """HTML or SVG that :func:`tag` made, and that goes into other elements as it is."""

    __slots__ = ()


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """An element. Content is escaped unless it is Markup; what is None or False is left out.

    Attributes are spelled as Python can: ``class_``, ``aria_label``; True is an attribute without a value.
    """
    stated = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{stated}>{joined(*content)}</{name}>")


def joined(*content: Any) -> Markup:
    """Several pieces one after the other."""
    pieces = (piece for piece in content if piece is not None and piece is not False)
    return Markup("".join(p if isinstance(p, Markup) else escape(str(p), quote=False) for p in pieces))
