"""Format numbers and settings for people: few digits, with units."""

from __future__ import annotations

import math
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NARROW_SPACE = "\u202f"
MINUS = "\u2212"
SAME, FROM_ZERO = "no change", "from zero"  # shown instead of a difference
_TIMES = "\u00d7"


def short(number: float, like: float | None = None) -> str:
    """Return a number with three digits and a unit, such as ``5.72 M``. Whole numbers below 10,000 are shown exactly.

    Args:
        like: the unit is the one that fits the larger of the number and this one.
    """
    unit = max(number, like or 0)
    if unit < 10_000:
        return f"{number:,.0f}" if number == int(number) else f"{number:.3g}"
    return _with_unit(number, unit, "")


def in_bytes(number: float, like: float | None = None) -> str:
    """Return a number of bytes with a unit, such as ``22.9 MB``; one MB is a million bytes.

    Args:
        like: the unit is the one that fits the larger of the number and this one.
    """
    unit = max(number, like or 0)
    return f"{number:.0f}{NARROW_SPACE}B" if unit < 1000 else _with_unit(number, unit, "B")


def in_milliseconds(seconds: float) -> str:
    """Return a time in milliseconds, such as ``3.21 ms``."""
    return f"{_three_digits(1e3 * seconds)}{NARROW_SPACE}ms"


def percent(share: float) -> str:
    """Return a share as a percentage, such as ``45.6%``."""
    return f"{share:.1%}"


def kept(dense: float, pruned: float) -> str:
    """Return the share that is left, as a percentage, or a dash if there was nothing before."""
    return percent(pruned / dense) if dense else "-"


def change(dense: float, pruned: float) -> str:
    """Return the relative change with its sign, such as ``-31.0%``, or words if both are equal or ``dense`` is zero."""
    if dense == pruned:
        return SAME
    if not dense:
        return FROM_ZERO
    difference = pruned / dense - 1
    return f"{MINUS if difference < 0 else '+'}{abs(difference):.1%}"


def scientific(number: float) -> str:
    """Return a number as a mantissa times a power of ten. Zero is ``0``, and NaN and infinity are ``not finite``."""
    if not number:
        return "0"
    if not math.isfinite(number):
        return "not finite"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}{NARROW_SPACE}{_TIMES}{NARROW_SPACE}{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """Return a power of ten with its exponent raised, such as ``10⁻⁷``."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def said(value: Any) -> str:
    """Return the value of a setting as text. Truth values become yes or no, and lists are joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _with_unit(number: float, like: float, what: str) -> str:
    factor, unit = next((f, u) for f, u in _UNITS if like >= 0.9995 * f)
    return f"{_three_digits(number / factor)}{NARROW_SPACE}{unit}{what}"


def _three_digits(number: float) -> str:
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.9995 else 3
    return f"{number:,.{digits}f}"
