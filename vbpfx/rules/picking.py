"""Rules for picking entries and putting them back: computed indices, masks, gather, scatter.

Axes along which nothing is picked pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vbpfx.rules.axes import Opaque, Operand, Relation, Same, Site

_PICKED = "entries of it are picked by computed indices"


def computed_indexing(site: Site, entries: Sequence[Any]) -> Iterator[Relation]:
    """x[i], x[mask], x[:, i]: whole axes are kept, and all other axes are opaque."""
    x, out = site.x, site.out
    kept = _kept_axes(x.ndim, entries)
    yield from _picked(x, kept)
    for position, dim in enumerate(kept):
        yield Opaque(out.axis(position), _PICKED) if dim is None else Same(x.axis(dim), out.axis(position))


def aten_index(site: Site) -> Iterator[Relation]:
    """x[[None, i, ...]]: one index for every axis, None for a whole axis."""
    yield from computed_indexing(site, _as_entries(site.argument(1, "indices")))


def index_put(site: Site) -> Iterator[Relation]:
    """x with values put (or added) at indices or a mask; the last axes of the values are those of x[indices]."""
    x, out, values = site.x, site.out, site.operand(2, "values")
    kept = _kept_axes(x.ndim, _as_entries(site.argument(1, "indices")))
    yield from _picked(x, kept)
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    for back in range(1, min(values.ndim, len(kept)) + 1 if values is not None else 0):
        dim = kept[-back]
        if dim is not None and values is not None and values.shape[-back] == x.shape[dim]:
            yield Same(values.axis(-back), x.axis(dim))


def picking(site: Site) -> Iterator[Relation]:
    """index_select, index_add, index_copy, index_fill: entries along ``dim`` are picked; other axes are the same in all tensors."""
    x, out = site.x, site.out
    dim = site.constant(1, "dim") % x.ndim
    source = site.operand(3, "source")
    for operand in (x, out, *([source] if source is not None and source.ndim == x.ndim else [])):
        yield Opaque(operand.axis(dim), _PICKED)
        yield from (Same(operand.axis(d), out.axis(d)) for d in range(x.ndim) if d != dim)


def scattering(site: Site) -> Iterator[Relation]:
    """gather, scatter, scatter_add, scatter_reduce: an index with as many axes as x moves entries along ``dim``.

    Any other axis is the same in all tensors that have the same length there.
    """
    x, out, index = site.x, site.out, site.operand(2, "index")
    if index is None or index.ndim != x.ndim:
        yield from site.all_opaque(_PICKED)
        return
    dim = site.constant(1, "dim") % x.ndim
    source = site.operand(3, "src")
    for operand in (x, index, out, *([source] if source is not None and source.ndim == x.ndim else [])):
        yield Opaque(operand.axis(dim), _PICKED)
        for other in range(x.ndim):
            if other == dim:
                continue
            if operand.shape[other] == x.shape[other] == index.shape[other]:
                yield Same(operand.axis(other), out.axis(other))
            else:
                yield Opaque(operand.axis(other), _PICKED)


def where_true(site: Site) -> Iterator[Relation]:
    """nonzero, argwhere, masked_select: the output has as many entries as are picked."""
    yield from site.all_opaque("the call picks the entries that are not zero")


def is_computed(entry: Any) -> bool:
    """Return whether an index is a tensor."""
    return isinstance(entry, fx.Node) and isinstance(entry.meta.get("val"), Tensor)


def _as_entries(indices: Any) -> list[Any]:
    return [slice(None) if entry is None else entry for entry in indices]


def _picked(x: Operand, kept: Sequence[int | None]) -> Iterator[Relation]:
    yield from (Opaque(x.axis(dim), _PICKED) for dim in range(x.ndim) if dim not in kept)


def _kept_axes(ndim: int, entries: Sequence[Any]) -> list[int | None]:
    """Return, for every axis of x[entries], the whole axis of x that it is; None if it is not a whole axis of x.

    Indices that are tensors are broadcast against each other. The axes of the result take the place of the first of these
    indices, or come first if something stands between the indices (NumPy's rule).
    """
    given = list(entries)
    if Ellipsis not in given:
        given.append(Ellipsis)
    at = given.index(Ellipsis)
    given[at : at + 1] = [slice(None)] * (ndim - sum(_stands_for(entry) for entry in given if entry is not Ellipsis))
    computed = [place for place, entry in enumerate(given) if is_computed(entry) or isinstance(entry, int)]
    broadcast: list[int | None] = [None] * max(_index_axes(given[place]) for place in computed)
    together = computed == list(range(computed[0], computed[-1] + 1))
    axes: list[int | None] = [] if together else [*broadcast]
    dim = 0
    for place, entry in enumerate(given):
        if place == computed[0] and together:
            axes += broadcast
        if place not in computed:
            axes.append(dim if entry == slice(None) else None)
        dim += _stands_for(entry)
    return axes


def _stands_for(entry: Any) -> int:
    """Return how many axes of the tensor an index stands for. A mask stands for as many as it has itself."""
    if entry is None:
        return 0
    mask = is_computed(entry) and entry.meta["val"].dtype in (torch.bool, torch.uint8)
    return int(entry.meta["val"].ndim) if mask else 1


def _index_axes(entry: Any) -> int:
    """Return how many axes an index has. A mask counts as the list of the entries that it picks, which has one axis."""
    if isinstance(entry, int):
        return 0
    value = entry.meta["val"]
    return 1 if value.dtype in (torch.bool, torch.uint8) else int(value.ndim)
