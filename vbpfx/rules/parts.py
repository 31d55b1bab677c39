"""Rules for parts of axes: slices, chunks, packed gates, concatenation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from vbpfx.rules.axes import (
    Axis,
    ComputedArgumentError,
    Grouped,
    Opaque,
    Operand,
    Part,
    Relation,
    Same,
    Site,
    SizeStated,
)
from vbpfx.rules.picking import computed_indexing, is_computed
from vbpfx.rules.table import Argument, operator_of


def indexing(site: Site) -> Iterator[Relation]:
    """x[...] with integers, slices, None and Ellipsis: whole axes are kept, and a slice is a part of its axis."""
    x, out = site.x, site.out
    index = site.node.args[1]
    given = list(index) if isinstance(index, tuple) else [index]
    if any(map(is_computed, given)) and all(is_computed(e) or not isinstance(e, (fx.Node, list, bool)) for e in given):
        yield from computed_indexing(site, given)
        return
    if any(isinstance(e, (fx.Node, list, bool)) for e in given):
        yield from site.all_opaque("it is indexed by a computed value")
        return
    entries = [(e, ("args", 1, i) if isinstance(index, tuple) else ("args", 1)) for i, e in enumerate(given)]
    rest = [(slice(None), ("args", 1))] * (x.ndim - sum(e is not None and e is not Ellipsis for e in given))
    at = next((i for i, e in enumerate(given) if e is Ellipsis), len(given))
    entries[at : at + 1] = rest
    source = target = 0
    for entry, path in entries:
        if entry is None:
            target += 1
        elif isinstance(entry, slice):
            yield from _sliced(site, x.axis(source), out.axis(target), entry, ((*path, "start"), (*path, "stop")))
            source, target = source + 1, target + 1
        else:
            yield Opaque(x.axis(source), "one entry of it is taken")
            source += 1


def aten_slice(site: Site) -> Iterator[Relation]:
    """x[..., start:end:step, ...] along one axis."""
    x, out = site.x, site.out
    sliced = site.constant(1, "dim", 0) % x.ndim
    taken = slice(*(site.constant(at, name) for at, name in ((2, "start"), (3, "end"), (4, "step"))))
    paths = (site.path(2, "start"), site.path(3, "end"))
    for dim in range(x.ndim):
        yield from _sliced(site, x.axis(dim), out.axis(dim), taken if dim == sliced else slice(None), paths)


def narrowing(site: Site) -> Iterator[Relation]:
    """narrow: x[..., start : start + length, ...] along one axis."""
    x, out = site.x, site.out
    narrowed, given = site.constant(1, "dim") % x.ndim, (site.argument(2, "start"), site.argument(3, "length"))
    first, length = map(site.number, given)
    for dim in range(x.ndim):
        if dim != narrowed:
            yield Same(x.axis(dim), out.axis(dim))
    if isinstance(first, fx.Node) or isinstance(length, fx.Node):
        yield Opaque(x.axis(narrowed), "a part of computed size is taken")
        yield Opaque(out.axis(narrowed), "it is a part of computed size")
        return
    start = first % x.shape[narrowed] if x.shape[narrowed] else 0
    yield Part(x.axis(narrowed), out.axis(narrowed), start)
    counts = ((0, start) if first >= 0 else (start, x.shape[narrowed]), (start, start + out.shape[narrowed]))
    for argument, (low, high), path in zip(given, counts, (site.path(2, "start"), site.path(3, "length")), strict=True):
        yield SizeStated(x.axis(narrowed), path, low, high, computed=_nodes(argument))


def select(site: Site) -> Iterator[Relation]:
    """x[..., i, ...] along one axis, which disappears."""
    x, out = site.x, site.out
    taken = site.constant(1, "dim", 0) % x.ndim
    yield Opaque(x.axis(taken), "one entry of it is taken")
    for position, dim in enumerate(d for d in range(x.ndim) if d != taken):
        yield Same(x.axis(dim), out.axis(position))


def splitting(site: Site) -> Iterator[Relation]:
    """chunk, split, tensor_split, unbind...: consecutive parts along one axis, or its entries one by one.

    The call returns a tuple; the relations are about the parts that are taken out of it.
    """
    x, name = site.x, site.name
    dim = split_axis(site.node)
    parts = site.node.meta["val"]
    if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in site.node.users):
        yield from site.all_opaque(f"the parts that {name} returns are used as a whole, or picked by a computed number")
        return
    starts = [0, *itertools.accumulate(part.shape[dim] for part in parts)] if name != "unbind" else []
    for user in site.node.users:
        index: Any = user.args[1]
        taken = Operand(user.name, tuple(user.meta["val"].shape))
        kept = [d for d in range(x.ndim) if d != dim]
        if name == "unbind":
            yield from (Same(x.axis(d), taken.axis(at)) for at, d in enumerate(kept))
        else:
            yield from (Same(x.axis(d), taken.axis(d)) for d in kept)
            yield Part(x.axis(dim), taken.axis(dim), starts[index % len(parts)])
    if name == "unbind":
        yield Opaque(x.axis(dim), "unbind takes its entries one by one")
        return
    computed = tuple(node for node in site.node.all_input_nodes[1:] if not isinstance(node.meta.get("val"), Tensor))
    if any(isinstance(site.number(node), fx.Node) for node in computed):
        yield Opaque(x.axis(dim), f"{name} makes parts of computed size")
    elif computed and name not in ("split", "split_with_sizes", "unsafe_split"):  # it is not the size of a part
        yield Opaque(x.axis(dim), f"{name} makes a computed number of parts")
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        yield SizeStated(x.axis(dim), ("args", 1, index), start, stop, not _counts_parts(site), computed)


def split_axis(node: fx.Node) -> int:
    """Return the axis along which a call splits its operand.

    Raises:
        ComputedArgumentError: the call computes it.
    """
    stated = operator_of(node).dim
    ndim: int = node.all_input_nodes[0].meta["val"].ndim
    if isinstance(stated, int):
        return min(stated, ndim - 1)  # hsplit of a vector goes along its one axis
    dim = (stated or Argument(2, "dim", 0)).given(node)
    if isinstance(dim, fx.Node):
        raise ComputedArgumentError("dim")
    return int(dim % ndim)


def _counts_parts(site: Site) -> bool:
    """Return whether the call states the number of parts, and computes their sizes itself."""
    if site.name in ("chunk", "unsafe_chunk"):
        return True
    given = site.node.args[1] if len(site.node.args) > 1 else next(iter(site.node.kwargs.values()), None)
    return site.name in ("tensor_split", "hsplit", "vsplit", "dsplit") and isinstance(given, int)


def glu(site: Site) -> Iterator[Relation]:
    """out[c] = x[c] sigmoid(x[d + c]) with d half the size of ``dim``: a packed gate in one call."""
    x, out = site.x, site.out
    dim = site.constant(1, "dim", -1) % x.ndim
    for other in range(x.ndim):
        if other != dim:
            yield Same(x.axis(other), out.axis(other))
    yield Part(x.axis(dim), out.axis(dim), 0)
    yield Part(x.axis(dim), out.axis(dim), out.shape[dim])


def concatenation(site: Site) -> Iterator[Relation]:
    """cat: the operands are consecutive parts along ``dim``; every other axis is the same in all of them."""
    out = site.out
    joined = site.constant(1, "dim", 0) % out.ndim
    parts = site.parts(0, "tensors")
    if parts is None or any(part.ndim != out.ndim for part in parts):
        yield from site.all_opaque(f"{site.name} does not get a list of tensors with the same number of axes")
        return
    start = 0
    for part in parts:
        yield from (Same(part.axis(dim), out.axis(dim)) for dim in range(out.ndim) if dim != joined)
        yield Part(out.axis(joined), part.axis(joined), start)
        start += part.shape[joined]


def stack(site: Site) -> Iterator[Relation]:
    """stack: the operands are entries along a new axis; their own axes are the same in all of them."""
    out = site.out
    new = site.constant(1, "dim", 0) % out.ndim
    kept = [dim for dim in range(out.ndim) if dim != new]
    yield Opaque(out.axis(new), "tensors are stacked along it")
    for operand in site.operands:
        yield from (Same(operand.axis(at), out.axis(dim)) for at, dim in enumerate(kept))


def _sliced(
    site: Site, x: Axis, out: Axis, taken: slice, paths: tuple[tuple[str | int, ...], tuple[str | int, ...]]
) -> Iterator[Relation]:
    """Yield the relations between an axis and a slice of it; ``paths`` are the places of the slice's start and stop."""
    numbers: list[Any] = [site.number(entry) for entry in (taken.start, taken.stop)]
    if any(isinstance(entry, fx.Node) for entry in (*numbers, taken.step)):
        yield Opaque(x, "a part of computed size is taken")
        yield Opaque(out, "it is a part of computed size")
        return
    size = next(o.shape[x.dim] for o in site.operands if o.owner == x.owner)
    start, stop, step = slice(numbers[0], numbers[1], taken.step).indices(size)
    ends = [(start, numbers[0], _nodes(taken.start), paths[0]), (stop, numbers[1], _nodes(taken.stop), paths[1])]
    if (start, stop, step) == (0, size, 1):
        yield Same(x, out)
        yield from (_end(x, size, *end) for end in ends if end[2])
    elif 1 < step < size and size % step == 0 and start < step and len(range(start, stop, step)) == size // step:
        yield Grouped(x, out)  # the start and the stop of such a slice hold for a narrowed axis, too
    elif step != 1 or stop <= start:
        yield Opaque(x, "a slice with a step takes only some of its entries (as x[..., ::2] does)")
        yield Opaque(out, "it is a slice with a step of another axis (as x[..., ::2] is)")
    else:
        yield Part(x, out, start)
        yield from (_end(x, size, *end) for end in ends if end[1] is not None and (end[2] or 0 < end[0] < size))


def _end(
    x: Axis, size: int, end: int, value: int, computed: tuple[fx.Node, ...], path: tuple[str | int, ...]
) -> SizeStated:
    """Return the size that the start or stop of a slice states: entries in front of it or, if negative, behind it."""
    start, stop = (0, end) if value >= 0 else (end, size)
    return SizeStated(x, path, start, stop, computed=computed)


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    return (value,) if isinstance(value, fx.Node) else ()
