"""Rules for operators that give the same elements another shape: permutations, views, expansions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from vbpfx.rules.axes import (
    Grouped,
    Merged,
    Opaque,
    Operand,
    Part,
    Relation,
    Same,
    Site,
    SizeStated,
    as_tuple,
    spelling,
)
from vbpfx.rules.table import Argument, operator_of


def permutation(site: Site) -> Iterator[Relation]:
    """permute, transpose, movedim: out axis i is x axis order[i]."""
    x, out = site.x, site.out
    name = site.name
    if name in ("permute", "movedim", "moveaxis", "transpose", "swapaxes", "swapdims", "t"):
        order = _order(name, site, x.ndim)
    else:  # x.T reverses all axes, x.mT the last two
        order = list(range(x.ndim))
        last = 0 if "T" in (name.removeprefix("numpy_"), site.argument(1, "name")) else -2
        order[last:] = order[last:][::-1]
    for position, dim in enumerate(order):
        yield Same(x.axis(dim), out.axis(position))


def regrouping(site: Site) -> Iterator[Relation]:
    """view, reshape, flatten, squeeze...: the same elements in the same order under another shape.

    Input axis i is output axis j exactly if they have the same length and the axes before them hold the
    same number of elements. A size that the call states has to change with its axis: an integer is rewritten,
    and a size that was read from a tensor must be the size of the same axis.
    """
    x, out = site.x, site.out
    kept = _kept_whole(x.shape, out.shape)
    stacked, grouped = _taken_apart(site, x, out)
    for axis, size, dim in zip(x.axes, x.shape, range(x.ndim), strict=True):
        if dim not in kept and dim not in stacked and dim not in grouped and size != 1:
            yield Opaque(axis, _shuffled(site) or f"{site.name} splits or merges it")
    whole = set(kept.values())
    for dim, position in grouped.items():
        whole |= {position, position + 1}
        yield Opaque(out.axis(position + 1), "its entries are taken one by one")
        yield Grouped(x.axis(dim), out.axis(position))
        yield from _stated(site, out, position)
    for dim, position in stacked.items():
        whole |= {position, position + 1}
        yield Opaque(out.axis(position), "its entries are taken one by one")
        width = out.shape[position + 1]
        for part in range(out.shape[position]):
            yield Part(x.axis(dim), out.axis(position + 1), part * width)
        yield from _stated(site, out, position + 1)
    for dim, size in enumerate(out.shape):
        if dim not in whole and size != 1:
            yield Opaque(out.axis(dim), f"{site.name} makes it from others")
    for dim, position in kept.items():
        yield Same(x.axis(dim), out.axis(position))
        yield from _stated(site, out, position)
    for rows, apart in ((out, x), (x, out)):  # samples and tokens merged into rows, and the way back
        if rows.ndim > 1 and apart.ndim > 2 and rows.shape[0] == apart.shape[0] * apart.shape[1]:
            yield Merged(rows.axis(0), apart.axis(0), apart.axis(1))
    name = site.name
    if site.operator.form_of is not None:
        yield from (Same(a, b) for a, b in zip(site.operands[-1].axes, out.axes, strict=True))
    if name == "unflatten" and site.module is not None:
        yield Opaque(x.axis(site.constant(1, "dim")), "unflatten states its size")
    if name == "squeeze":
        given = site.constant(1, "dim")
        for dim in range(x.ndim) if given is None else as_tuple(given, 1):
            if x.shape[dim] != 1:
                yield Opaque(x.axis(dim), "a squeeze would drop it at a width of one")


def expansion(site: Site) -> Iterator[Relation]:
    """expand: axes pair up from the right; an axis of length 1 is repeated."""
    x, out = site.x, site.out
    for back in range(1, x.ndim + 1):
        if x.shape[-back] == out.shape[-back]:
            yield Same(x.axis(-back), out.axis(-back))
    for dim in range(out.ndim):
        yield from _stated(site, out, dim)
    if site.operator.form_of is not None:
        yield from (Same(a, b) for a, b in zip(site.operands[-1].axes, out.axes, strict=True))


def repetition(site: Site) -> Iterator[Relation]:
    """repeat, tile: axes pair up from the right; an axis whose repeat count is 1 is kept."""
    x, out = site.x, site.out
    for back in range(1, out.ndim + 1):
        if back <= x.ndim and x.shape[-back] == out.shape[-back] != 1:
            yield Same(x.axis(-back), out.axis(-back))
            continue
        yield Opaque(out.axis(-back), f"{site.name} fills it with copies")
        if back <= x.ndim and x.shape[-back] != 1:
            yield Opaque(x.axis(-back), f"{site.name} repeats it")


def repetition_of_entries(site: Site) -> Iterator[Relation]:
    """repeat_interleave: every entry along ``dim`` is followed by its copies; other axes are kept."""
    x, out = site.x, site.out
    dim = site.constant(2, "dim")
    if dim is None or len(site.operands) > 1:
        yield from site.all_opaque("repeat_interleave repeats its entries")
        return
    for other in range(x.ndim):
        if other == dim % x.ndim:
            yield Opaque(x.axis(other), "repeat_interleave repeats its entries")
            yield Opaque(out.axis(other), "repeat_interleave repeats its entries")
        else:
            yield Same(x.axis(other), out.axis(other))


def _stated(site: Site, out: Operand, dim: int) -> Iterator[Relation]:
    """Yield the relations that the call's size arguments give for one output axis."""
    axis = out.axis(dim)
    for at, path, value in _size_arguments(site, out.ndim):
        read = site.size_read(value)
        if at is None:  # the whole shape comes from one value
            if read is not None and read.plain and len(read.axes) == out.ndim:
                yield Same(axis, read.axes[dim])
            else:
                yield Opaque(axis, "its size is stated by a computed shape")
        elif at == dim:
            if isinstance(value, fx.Node):
                if read is not None and read.plain and len(read.axes) == 1:
                    yield Same(axis, read.axes[0])
                elif isinstance(site.number(value), int):
                    yield SizeStated(axis, path, computed=(value,))
                else:
                    yield Opaque(axis, "its size is stated by a computed number")
            elif value != -1:
                yield SizeStated(axis, path)


def _size_arguments(site: Site, ndim: int) -> Iterator[tuple[int | None, tuple[str | int, ...], Any]]:
    """Yield each size that a call states: the output axis, the place of the argument, and its value.

    The axis is None if one value states the sizes of all axes.
    """
    args, stated = site.node.args, site.operator.sizes
    if stated is None:
        return
    # view(x, 2, 3) against view(x, [2, 3])
    first, name = stated.position, stated.name
    listed = name in site.node.kwargs or len(args) == first + 1
    given = site.argument(first, name) if listed else args[first:]
    if not isinstance(given, (tuple, list)):
        whole = None if ndim != 1 or not isinstance(given, int) else 0
        yield whole, site.path(first, name), given
        return
    begin = site.constant(1, "dim") % site.x.ndim if site.name == "unflatten" else 0
    for index, value in enumerate(given):
        path = (*site.path(first, name), index) if listed else ("args", first + index)
        yield begin + index, path, value


def _kept_whole(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """Return input axis -> output axis, for the axes that a reshape keeps whole."""
    starts = {}
    ahead = 1
    for dim, size in enumerate(after):
        if size != 1:
            starts[ahead] = (dim, size)
        ahead *= size
    kept = {}
    ahead = 1
    for dim, size in enumerate(before):
        if size != 1 and ahead in starts and starts[ahead][1] == size:
            kept[dim] = starts[ahead][0]
        ahead *= size
    return kept


def _taken_apart(site: Site, x: Operand, out: Operand) -> tuple[dict[int, int], dict[int, int]]:
    """Return input axis -> the first of the two output axes that it is split into, for packed gates and maxout.

    The first dict holds the axes that become (k, d): k parts of d channels, side by side. The second holds those that
    become (d, k): d channels of k entries, interleaved. In both, every reader takes one of the k entries, or reduces all k
    to one. Attention's heads have the same shapes, but no reader takes single entries of them.
    """
    stacked: dict[int, int] = {}
    grouped: dict[int, int] = {}
    users = site.node.users
    for dim, size in enumerate(x.shape):
        for position in range(out.ndim - 1):
            first, second = out.shape[position : position + 2]
            splits = math.prod(x.shape[:dim]) == math.prod(out.shape[:position]) and 1 < first < size == first * second
            for found, entries in ((stacked, position), (grouped, position + 1)):
                if splits and users and all(_takes_one(user, entries, out.ndim) for user in users):
                    found.setdefault(dim, position)
    return stacked, {dim: position for dim, position in grouped.items() if dim not in stacked}


def _takes_one(user: fx.Node, dim: int, ndim: int) -> bool:
    """Return whether a call takes single entries along an axis, or reduces it, so that the value does not have the axis."""
    name, given = spelling(user), (*user.args[1:], *user.kwargs.values())
    if name == "slice" and user.meta["val"].shape == user.all_input_nodes[0].meta["val"].shape:  # x[:]
        return bool(user.users) and all(_takes_one(further, dim, ndim) for further in user.users)
    if name in ("unbind", "select"):
        return bool(given) and isinstance(given[0], int) and given[0] % ndim == dim
    operator = operator_of(user)
    if operator.aggregates:
        stated = operator.dim if isinstance(operator.dim, Argument) else Argument(1, "dim")
        along = stated.given(user)
        dims = as_tuple(along, 1)
        return not isinstance(along, bool) and all(isinstance(d, int) and d % ndim == dim for d in dims) and bool(dims)
    if name != "getitem" or not given:
        return False
    index = given[0] if isinstance(given[0], tuple) else (given[0],)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (ndim - len(index) + 1), *index[at + 1 :])
    return None not in index and len(index) > dim and isinstance(index[dim], int)


def _shuffled(site: Site) -> str:
    """Return the reason if this view, a permutation and a view back put channels into another order; "" otherwise."""
    for user in site.node.users:
        again = next(iter(user.users), user)
        back = operator_of(user).rule is permutation and operator_of(again).rule is regrouping
        if back and tuple(again.meta["val"].shape) == site.x.shape:
            return f"{site.name}, {spelling(user)} and {spelling(again)} shuffle its channels"
    return ""


def _order(name: str, site: Site, ndim: int) -> list[int]:
    """Return the list whose entry i is the input axis that becomes output axis i."""
    order = list(range(ndim))
    if name == "permute":
        dims = site.constant(1, "dims")
        return [int(d) % ndim for d in (dims if isinstance(dims, (tuple, list)) else site.node.args[1:])]  # type: ignore[arg-type]
    if name in ("movedim", "moveaxis"):
        sources, targets = (as_tuple(site.constant(i, n), 1) for i, n in ((1, "source"), (2, "destination")))
        pairs = sorted((t % ndim, s % ndim) for s, t in zip(sources, targets, strict=True))
        order = [dim for dim in order if dim not in {s for _, s in pairs}]
        for target, source in pairs:
            order.insert(target, source)
        return order
    first, second = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
    a, b = (0, ndim - 1) if name == "t" else (site.constant(1, first) % ndim, site.constant(2, second) % ndim)
    order[a], order[b] = order[b], order[a]
    return order
