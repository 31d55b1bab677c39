"""Rules for operators that give the same elements another shape: permutations, views, expansions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from vbpfx.rules.axes import (
    Grouped,
    Merged,
    Opaque,
    Operand,
    Part,
    Relation,
    Repeated,
    Same,
    Site,
    SizeStated,
    Stacked,
    as_tuple,
    spelling,
)
from vbpfx.rules.table import Argument, operator_of


def permutation(site: Site) -> Iterator[Relation]:
    """permute, transpose, movedim: out axis i is x axis order[i]."""
    x, out = site.x, site.out
    for position, dim in enumerate(order_of_axes(site, x.ndim)):
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
    heads = [] if stacked or grouped else list(_in_groups(x, out, kept))
    for relation in heads:
        yield relation
        if relation.outer is not None:
            reason = f"{site.name} counts groups of channels along it, such as the heads of attention, and groups are never removed"
            yield Opaque(relation.outer, _shuffled(site) or reason, True)
    described = {axis for relation in heads for axis in (relation.whole, relation.inner, relation.outer)}
    for axis, size, dim in zip(x.axes, x.shape, range(x.ndim), strict=True):
        if dim not in kept and dim not in stacked and dim not in grouped and size != 1 and axis not in described:
            yield Opaque(axis, _shuffled(site) or f"{site.name} splits or merges it")
    whole = {*kept.values(), *(axis.dim for axis in out.axes if axis in described)}
    for axis in out.axes:
        if any(axis in (relation.whole, relation.inner) for relation in heads):
            yield from _stated(site, out, axis.dim, as_number=True)
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
        elif size == 1:
            yield from _computed_one(site, out, dim)
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
            count = site.argument(1, "repeats")
            if isinstance(count, int):
                yield Repeated(x.axis(other), out.axis(other), count)
            for axis in (x.axis(other), out.axis(other)):
                yield Opaque(axis, "repeat_interleave repeats its entries", True)
        else:
            yield Same(x.axis(other), out.axis(other))


def _stated(site: Site, out: Operand, dim: int, *, as_number: bool = False) -> Iterator[Relation]:
    """Yield the relations that the call's size arguments give for one output axis.

    Args:
        as_number: the axis is made from others, so that a size which is read from another tensor only happens to be its size. It
            becomes a number in a narrowed graph.
    """
    axis = out.axis(dim)
    for at, path, value in _size_arguments(site, out.ndim):
        read = site.size_read(value)
        if at is None:  # the whole shape comes from one value
            if read is not None and read.plain and len(read.axes) == out.ndim:
                yield Same(axis, read.axes[dim])
            else:
                yield Opaque(axis, "its size is stated by a computed shape", True)
        elif at == dim:
            if isinstance(value, fx.Node):
                if read is not None and read.plain and len(read.axes) == 1 and not as_number:
                    yield Same(axis, read.axes[0])
                elif isinstance(site.number(value), int):
                    yield SizeStated(axis, path, computed=(value,))
                else:
                    yield Opaque(axis, "its size is stated by a computed number", True)
            elif value != -1:
                yield SizeStated(axis, path)


def _computed_one(site: Site, out: Operand, dim: int) -> Iterator[SizeStated]:
    """Yield that the size of an axis of length 1 is a number that the call computes from sizes, and that a narrowed graph keeps."""
    for at, path, value in _size_arguments(site, out.ndim):
        read = site.size_read(value)
        if at == dim and read is not None and not read.plain and isinstance(site.number(value), int):
            yield SizeStated(out.axis(dim), path, computed=(value,))


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


def _in_groups(x: Operand, out: Operand, kept: dict[int, int]) -> Iterator[Stacked]:
    """Yield the axes that a reshape splits into groups of channels, and those that it makes of such groups.

    The axes that are not kept whole fall into runs with the same number of elements on both sides. If the last axis of a run is
    shorter on one side, and divides the last axis on the other side, it has the channels of one group of the longer axis.
    """
    for before, after in runs(x.shape, out.shape):
        if before[-1] in kept:
            continue
        long, short, run = (x, out, after) if x.shape[before[-1]] > out.shape[after[-1]] else (out, x, before)
        whole, inner = (long.axis((before if long is x else after)[-1]), short.axis(run[-1]))
        size, own = long.shape[whole.dim], short.shape[inner.dim]
        if len(run) < 2 or own < 2 or size % own:
            continue
        outer = short.axis(run[-2])
        yield Stacked(whole, inner, None if short.shape[outer.dim] % (size // own) else outer)


def runs(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of axes that hold the same number of elements on both sides of a reshape; axes of length 1 are left out."""
    if 0 in before:
        return
    left, right = ([dim for dim, size in enumerate(shape) if size != 1] for shape in (before, after))
    while left and right:
        source, made = [left.pop(0)], [right.pop(0)]
        while (read := math.prod(before[d] for d in source)) != (written := math.prod(after[d] for d in made)):
            if read < written:
                source.append(left.pop(0))
            else:
                made.append(right.pop(0))
        yield source, made


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
                if splits and users and all(takes_one(user, entries, out.ndim) for user in users):
                    found.setdefault(dim, position)
    return stacked, {dim: position for dim, position in grouped.items() if dim not in stacked}


def takes_one(user: fx.Node, dim: int, ndim: int) -> bool:
    """Return whether a call takes single entries along an axis, or reduces it, so that the value does not have the axis."""
    name, given = spelling(user), (*user.args[1:], *user.kwargs.values())
    if name == "slice" and user.meta["val"].shape == user.all_input_nodes[0].meta["val"].shape:  # x[:]
        return bool(user.users) and all(takes_one(further, dim, ndim) for further in user.users)
    if name in ("unbind", "select"):
        along = given[0] if given else 0
        return isinstance(along, int) and along % ndim == dim
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
    """Return the reason if this view is the first or the last of three calls that put channels into another order; "" otherwise.

    The three are a view, a permutation, and a view back to the first one's shape.
    """
    node = site.node
    shuffles = [(node, user, again) for user in node.users for again in user.users]
    moved = node.all_input_nodes[0]
    shuffles += [(first, moved, node) for first in moved.all_input_nodes[:1]]
    for first, between, last in shuffles:
        whole = first.all_input_nodes[0].meta["val"] if first.all_input_nodes else None
        views = (
            operator_of(first).rule is operator_of(last).rule is regrouping and operator_of(between).rule is permutation
        )
        if views and isinstance(whole, Tensor) and whole.shape == last.meta["val"].shape:
            return f"{spelling(first)}, {spelling(between)} and {spelling(last)} shuffle its channels"
    return ""


def order_of_axes(site: Site, ndim: int) -> list[int]:
    """Return the list whose entry i is the input axis that becomes output axis i of a permutation.

    Raises:
        ComputedArgumentError: the call computes the order.
    """
    order, name = list(range(ndim)), site.name
    if name not in ("permute", "movedim", "moveaxis", "transpose", "swapaxes", "swapdims", "t"):
        # x.T reverses all axes, x.mT the last two
        last = 0 if "T" in (name.removeprefix("numpy_"), site.argument(1, "name")) else -2
        order[last:] = order[last:][::-1]
        return order
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
