"""Rules for operators that treat every element by itself."""

from __future__ import annotations

from collections.abc import Iterator

from vbpfx.rules.axes import Relation, Same, Site


def elementwise(site: Site) -> Iterator[Relation]:
    """out[i] = f(x[i], ...): axes pair up from the right; an axis that is broadcast has no relation to the output."""
    out = site.out
    for operand in site.operands:
        for back in range(1, min(operand.ndim, out.ndim) + 1):
            if operand.shape[-back] == out.shape[-back]:
                yield Same(operand.axis(-back), out.axis(-back))


def unchanged(site: Site) -> Iterator[Relation]:
    """The same values in another type, device or layout, which a second tensor may give."""
    yield from (Same(a, b) for a, b in zip(site.x.axes, site.out.axes, strict=True))


def prelu(site: Site) -> Iterator[Relation]:
    """max(x, 0) + a min(x, 0), with one a per channel (axis 1) or one for all."""
    x, out, slope = site.x, site.out, site.operand(1, "weight")
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    if slope is not None and slope.shape != (1,):
        yield Same(x.axis(1), slope.axis(0))
