"""Rules for operators that turn channels into positions or positions into channels, and for shuffles of channels."""

from __future__ import annotations

from collections.abc import Iterator

from vbpfx.rules.axes import Grouped, Opaque, Operand, Relation, Same, Site


def pixel_shuffle(site: Site) -> Iterator[Relation]:
    """pixel_shuffle: out[..., c, r y + i, r x + j] = x[..., r^2 c + r i + j, y, x]: r^2 channels make one."""
    yield from _cells(site, site.x, site.out)


def pixel_unshuffle(site: Site) -> Iterator[Relation]:
    """pixel_unshuffle: out[..., r^2 c + r i + j, y, x] = x[..., c, r y + i, r x + j]: one channel makes r^2."""
    yield from _cells(site, site.out, site.x)


def _cells(site: Site, fine: Operand, coarse: Operand) -> Iterator[Relation]:
    """Yield that the channels of ``fine`` are the cells of the pixels of ``coarse``, which has fewer channels."""
    for dim in range(fine.ndim - 3):
        yield Same(fine.axis(dim), coarse.axis(dim))
    if fine.shape[-3] == coarse.shape[-3]:  # a factor of 1
        yield Same(fine.axis(-3), coarse.axis(-3))
    else:
        yield Grouped(fine.axis(-3), coarse.axis(-3))
    for operand in (fine, coarse):
        for dim in (-2, -1):
            yield Opaque(operand.axis(dim), f"{site.name} exchanges positions and channels along it")


def channel_shuffle(site: Site) -> Iterator[Relation]:
    """channel_shuffle: out[:, G c + g] = x[:, d g + c] for G groups of d channels; every other axis is kept."""
    x, out = site.x, site.out
    for dim in range(x.ndim):
        if dim == 1:
            yield Opaque(x.axis(dim), f"{site.name} shuffles its channels")
            yield Opaque(out.axis(dim), f"{site.name} shuffles its channels")
        else:
            yield Same(x.axis(dim), out.axis(dim))
