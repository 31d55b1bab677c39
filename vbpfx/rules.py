"""The rules: how operators treat the axes of their tensors.

A rule is a generator over one call, a :class:`~vbpfx.axes.Site`. Its docstring is the operator's formula; it yields
which axes run channel by channel into which, which a weight makes or sums over, and which are opaque and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from vbpfx.axes import Contracts, Opaque, Operand, Produces, Relation, Same, Site, SizeStated


def elementwise(site: Site) -> Iterator[Relation]:
    """out[i] = f(x[i], ...): axes pair up from the right; an axis of length 1 broadcasts and says nothing."""
    out = site.out
    for operand in site.operands:
        for back in range(1, min(operand.ndim, out.ndim) + 1):
            if operand.shape[-back] == out.shape[-back]:
                yield Same(operand.axis(-back), out.axis(-back))


def unchanged(site: Site) -> Iterator[Relation]:
    """Another type, device or layout of the same values; a second tensor only says which."""
    yield from (Same(a, b) for a, b in zip(site.x.axes, site.out.axes, strict=True))


def linear(site: Site) -> Iterator[Relation]:
    """y[..., o] = sum_i W[o, i] x[..., i] + b[o]"""
    x, out, weight, bias = site.x, site.out, site.operand(1, "weight"), site.operand(2, "bias")
    if weight is None or weight.ndim != 2:
        yield from site.all_opaque("the layer's weight is not a matrix of its own")
        return
    yield from _leading(x, out, but=1)
    yield Contracts(x.axis(-1), weight.axis(1), bias)
    yield Produces(out.axis(-1), weight.axis(0))
    if bias is not None:
        yield Same(out.axis(-1), bias.axis(0))


def addmm(site: Site) -> Iterator[Relation]:
    """y[n, o] = b[o] + sum_i x[n, i] W[i, o]: a linear layer with a transposed weight."""
    bias, x, weight = site.operand(0, "input"), site.operand(1, "mat1"), site.operand(2, "mat2")
    scaled = site.argument(3, "beta", 1) != 1 or site.argument(4, "alpha", 1) != 1
    if bias is None or x is None or weight is None or bias.ndim != 1 or not weight.is_parameter or scaled:
        yield from site.all_opaque("the matrix product is not a layer with a weight and a bias of its own")
        return
    out = site.out
    yield from _leading(x, out, but=1)
    yield Contracts(x.axis(-1), weight.axis(0), bias)
    yield Produces(out.axis(-1), weight.axis(1))
    yield Same(out.axis(-1), bias.axis(0))


def convolution(site: Site) -> Iterator[Relation]:
    """y[o] = sum_i W[o, i] * x[i] + b[o] over windows.

    Any ungrouped convolution produces its output channels. One contracts its input channels if it does
    not pad: beside a border a constant channel is no constant. A depthwise one treats channels one by one.
    """
    x, out, weight, bias = site.x, site.out, site.operand(1, "weight"), site.operand(2, "bias")
    padding, groups = site.constant(4, "padding", 0), site.constant(6, "groups", 1)
    if weight is None or (site.module is not None and site.module.padding_mode != "zeros"):
        yield from site.all_opaque("the convolution has no weight of its own, or a padding mode of its own")
        return
    spatial = weight.ndim - 2
    channel = x.ndim - spatial - 1
    pointwise = all(size == 1 for size in weight.shape[2:])
    padded = (
        padding not in (0, "valid")
        and not (pointwise and padding == "same")
        and any(p != 0 for p in _as_tuple(padding, spatial))
    )
    for dim in range(spatial):
        if pointwise and not padded and x.shape[channel + 1 + dim] == out.shape[channel + 1 + dim]:
            yield Same(x.axis(channel + 1 + dim), out.axis(channel + 1 + dim))
        else:
            yield Opaque(x.axis(channel + 1 + dim), "a convolution mixes the positions along it")
            yield Opaque(out.axis(channel + 1 + dim), "a convolution mixes the positions along it")
    if channel:
        yield Same(x.axis(0), out.axis(0))
    if groups == 1:
        yield Contracts(x.axis(channel), weight.axis(1), bias)
        yield Produces(out.axis(channel), weight.axis(0))
        if padded:
            yield Opaque(
                x.axis(channel), "a padded convolution reads it: beside the border a removed channel is no constant"
            )
    elif groups == x.shape[channel] == out.shape[channel]:
        yield Same(x.axis(channel), weight.axis(0))
        yield Same(x.axis(channel), out.axis(channel))
        if site.module is None:
            yield SizeStated(x.axis(channel), ("args", 6) if len(site.node.args) > 6 else ("kwargs", "groups"))
    else:
        yield Opaque(x.axis(channel), "a grouped convolution reads it in groups")
        yield Opaque(out.axis(channel), "a grouped convolution makes it in groups")
    if bias is not None:
        yield Same(out.axis(channel), bias.axis(0))


def batch_norm(site: Site) -> Iterator[Relation]:
    """Per channel (axis 1) scale and shift, with the running statistics as further per-channel parameters."""
    x, out = site.x, site.out
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    if site.module is not None:
        on_batch = site.module.running_mean is None
    else:
        on_batch = site.constant(5, "training", False) or site.operand(1, "running_mean") is None
    for dim, axis in enumerate(x.axes if on_batch else ()):
        if dim != 1:
            yield Opaque(axis, "a norm takes its statistics across it")
    for position, name in enumerate(("running_mean", "running_var", "weight", "bias"), start=1):
        parameter = site.operand(position, name)
        if parameter is not None:
            yield Same(x.axis(1), parameter.axis(0))


def prelu(site: Site) -> Iterator[Relation]:
    """max(x, 0) + a min(x, 0), with one a per channel (axis 1) or one for all."""
    x, out, slope = site.x, site.out, site.operand(1, "weight")
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    if slope is not None and slope.shape != (1,):
        yield Same(x.axis(1), slope.axis(0))


def norm_over_last(site: Site) -> Iterator[Relation]:
    """LayerNorm, RMSNorm: statistics over the last axes, then scale and shift along them."""
    x, out = site.x, site.out
    normalized = len(_as_tuple(site.constant(1, "normalized_shape"), 1))
    yield from _leading(x, out, but=normalized)
    scale_and_shift = (site.operand(2, "weight"), site.operand(3, "bias"))
    for back in range(1, normalized + 1):
        yield Opaque(x.axis(-back), "a norm takes its statistics across it")
        yield Same(x.axis(-back), out.axis(-back))
        yield from (Same(x.axis(-back), p.axis(-back)) for p in scale_and_shift if p is not None)


def group_norm(site: Site) -> Iterator[Relation]:
    """Statistics over groups of channels and all positions."""
    x, out = site.x, site.out
    yield Same(x.axis(0), out.axis(0))
    for a, b in zip(x.axes[1:], out.axes[1:], strict=True):
        yield Same(a, b)
        yield Opaque(a, "a norm takes its statistics across it")
    for parameter in (site.operand(2, "weight"), site.operand(3, "bias")):
        if parameter is not None:
            yield Same(x.axis(1), parameter.axis(0))


def along_one_axis(site: Site) -> Iterator[Relation]:
    """Shape kept; values mixed along ``dim`` (softmax, cumulative sums, normalisation)."""
    x, out = site.x, site.out
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    dim = site.constant(1, "dim")
    for mixed in x.axes if not isinstance(dim, int) else (x.axis(dim),):
        yield Opaque(mixed, f"{_name(site)} mixes the channels along it")


def reduction(site: Site) -> Iterator[Relation]:
    """mean, sum, extrema over ``dim``; every other axis is kept."""
    x, out = site.x, site.out
    given = site.constant(1, "dim")
    if given is None or isinstance(given, bool) or given == () or given == []:
        yield from site.all_opaque(f"{_name(site)} reduces it")
        return
    reduced = {dim % x.ndim for dim in _as_tuple(given, 1)}
    kept = [dim for dim in range(x.ndim) if dim not in reduced]
    for dim in reduced:
        yield Opaque(x.axis(dim), f"{_name(site)} reduces it")
    for position, dim in enumerate(kept):
        yield Same(x.axis(dim), out.axis(dim if out.ndim == x.ndim else position))


def pooling(site: Site) -> Iterator[Relation]:
    """Windows over the last two axes, with or without a batch axis in front; channels are kept apart."""
    x, out = site.x, site.out
    yield from _leading(x, out, but=2)
    for axis in (*x.axes[-2:], *out.axes[-2:]):
        yield Opaque(axis, "pooling mixes the positions along it")


def permutation(site: Site) -> Iterator[Relation]:
    """permute, transpose, movedim: out axis i is x axis order[i]."""
    x, out = site.x, site.out
    name = _name(site)
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
    same number of elements. What the call states of the output's size must follow the axis: an integer
    is rewritten, a size read elsewhere must be the size of the same axis.
    """
    x, out = site.x, site.out
    kept = _kept_whole(x.shape, out.shape)
    for axis, size, dim in zip(x.axes, x.shape, range(x.ndim), strict=True):
        if dim not in kept and size != 1:
            yield Opaque(axis, f"{_name(site)} splits or merges it")
    whole = set(kept.values())
    for dim, size in enumerate(out.shape):
        if dim not in whole and size != 1:
            yield Opaque(out.axis(dim), f"{_name(site)} makes it from others")
    for dim, position in kept.items():
        yield Same(x.axis(dim), out.axis(position))
        yield from _stated(site, out, position)
    name = _name(site)
    if name in ("reshape_as", "view_as"):
        yield from (Same(a, b) for a, b in zip(site.operands[-1].axes, out.axes, strict=True))
    if name == "unflatten":
        yield Opaque(x.axis(site.constant(1, "dim")), "unflatten states its size")
    if name == "squeeze" and len(site.node.args) + len(site.node.kwargs) == 1:
        for axis in x.axes:
            yield Opaque(axis, "a squeeze of every axis would drop it at a width of one")


def expansion(site: Site) -> Iterator[Relation]:
    """expand: axes pair up from the right; an axis of length 1 is repeated."""
    x, out = site.x, site.out
    for back in range(1, x.ndim + 1):
        if x.shape[-back] == out.shape[-back]:
            yield Same(x.axis(-back), out.axis(-back))
    for dim in range(out.ndim):
        yield from _stated(site, out, dim)


def indexing(site: Site) -> Iterator[Relation]:
    """x[...] with integers, slices, None and Ellipsis: an axis taken whole is kept, one taken in part is not."""
    x, out = site.x, site.out
    index = site.node.args[1]
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, (fx.Node, list, bool)) for e in entries):
        yield from site.all_opaque("it is indexed by a computed value")
        return
    taken = sum(e is not None and e is not Ellipsis for e in entries)
    rest = [slice(None)] * (x.ndim - taken)
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), None)
    entries = entries + rest if at is None else [*entries[:at], *rest, *entries[at + 1 :]]
    source = target = 0
    for entry in entries:
        if entry is None:
            target += 1
        elif isinstance(entry, slice):
            yield from _sliced(x, out, source, target, entry == slice(None))
            source, target = source + 1, target + 1
        else:
            yield Opaque(x.axis(source), "one entry of it is taken")
            source += 1


def aten_slice(site: Site) -> Iterator[Relation]:
    """x[..., start:end:step, ...] along one axis."""
    x, out = site.x, site.out
    sliced = site.constant(1, "dim", 0) % x.ndim
    for dim in range(x.ndim):
        yield from _sliced(x, out, dim, dim, dim != sliced or x.shape[dim] == out.shape[dim])


def select(site: Site) -> Iterator[Relation]:
    """x[..., i, ...] along one axis, which disappears."""
    x, out = site.x, site.out
    taken = site.constant(1, "dim", 0) % x.ndim
    yield Opaque(x.axis(taken), "one entry of it is taken")
    for position, dim in enumerate(d for d in range(x.ndim) if d != taken):
        yield Same(x.axis(dim), out.axis(position))


def concatenation(site: Site) -> Iterator[Relation]:
    """cat: every axis but ``dim`` is common to all parts."""
    out = site.out
    joined = site.constant(1, "dim", 0) % out.ndim
    for operand in site.operands:
        for dim in range(min(operand.ndim, out.ndim)):
            if dim == joined:
                yield Opaque(operand.axis(dim), "it is concatenated with others")
            else:
                yield Same(operand.axis(dim), out.axis(dim))
    yield Opaque(out.axis(joined), "it is concatenated from others")


def matrix_product(site: Site) -> Iterator[Relation]:
    """y[..., n, o] = sum_i a[..., n, i] b[..., i, o] of two computed values: what is summed over is opaque."""
    operands, out = site.operands, site.out
    if len(operands) != 2 or min(o.ndim for o in operands) < 2 or any(o.is_parameter for o in operands):
        yield from site.all_opaque("a matrix product with a bare parameter, a vector or itself")
        return
    a, b = operands
    for axis in (a.axis(-1), b.axis(-2)):
        yield Opaque(axis, "a product of two activations sums over it")
    yield Same(a.axis(-2), out.axis(-2))
    yield Same(b.axis(-1), out.axis(-1))
    for operand in operands:
        for back in range(3, operand.ndim + 1):
            if operand.shape[-back] == out.shape[-back]:
                yield Same(operand.axis(-back), out.axis(-back))


def _leading(x: Operand, out: Operand, but: int) -> Iterator[Relation]:
    for dim in range(x.ndim - but):
        yield Same(x.axis(dim), out.axis(dim))


def _sliced(x: Operand, out: Operand, source: int, target: int, whole: bool) -> Iterator[Relation]:
    if whole:
        yield Same(x.axis(source), out.axis(target))
    else:
        yield Opaque(x.axis(source), "a part of it is taken")
        yield Opaque(out.axis(target), "it is a part of another axis")


def _stated(site: Site, out: Operand, dim: int) -> Iterator[Relation]:
    """What the call's size arguments say of one output axis."""
    axis = out.axis(dim)
    for path, value in _size_arguments(site, out.ndim):
        read = site.size_read(value)
        if path is None:  # the whole shape comes from one value
            if read is not None and read.plain and len(read.axes) == out.ndim:
                yield Same(axis, read.axes[dim])
            else:
                yield Opaque(axis, "its size is stated by a computed shape")
        elif path[-1] == dim + _first_size(site):
            if isinstance(value, fx.Node):
                if read is not None and read.plain and len(read.axes) == 1:
                    yield Same(axis, read.axes[0])
                else:
                    yield Opaque(axis, "its size is stated by a computed number")
            elif value != -1:
                yield SizeStated(axis, path)


def _first_size(site: Site) -> int:
    """Offset of the first size in its argument list: view(x, 2, 3) against view(x, [2, 3])."""
    return 1 if len(site.node.args) > 1 and not isinstance(site.node.args[1], (tuple, list)) else 0


def _size_arguments(site: Site, ndim: int) -> Iterator[tuple[tuple[str | int, ...] | None, Any]]:
    """Every size that a view, reshape or expand states, with its path; path None for a whole shape."""
    if _name(site) not in _STATES_SIZES or site.module is not None:
        return
    args = site.node.args
    keyword = next((k for k in ("shape", "size") if k in site.node.kwargs), None)
    given = site.node.kwargs[keyword] if keyword else args[1] if len(args) == 2 else args[1:]
    prefix: tuple[str | int, ...] = ("kwargs", keyword) if keyword else ("args", 1) if len(args) == 2 else ("args",)
    if isinstance(given, (tuple, list)):
        offset = _first_size(site)
        for i, value in enumerate(given):
            yield (*prefix, i + offset), value
    elif ndim == 1 and isinstance(given, int):
        yield ("args", 1), given
    else:
        yield None, given


_STATES_SIZES = frozenset({"view", "reshape", "expand", "_unsafe_view"})


def _kept_whole(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """Input axis -> output axis, for the axes a reshape leaves whole."""
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


def _order(name: str, site: Site, ndim: int) -> list[int]:
    """order[i] is the input axis that becomes output axis i."""
    order = list(range(ndim))
    if name == "permute":
        dims = site.constant(1, "dims")
        return [int(d) % ndim for d in (dims if isinstance(dims, (tuple, list)) else site.node.args[1:])]  # type: ignore[arg-type]
    if name in ("movedim", "moveaxis"):
        sources, targets = (_as_tuple(site.constant(i, n), 1) for i, n in ((1, "source"), (2, "destination")))
        pairs = sorted((t % ndim, s % ndim) for s, t in zip(sources, targets, strict=True))
        order = [dim for dim in order if dim not in {s for _, s in pairs}]
        for target, source in pairs:
            order.insert(target, source)
        return order
    first, second = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
    a, b = (0, ndim - 1) if name == "t" else (site.constant(1, first) % ndim, site.constant(2, second) % ndim)
    order[a], order[b] = order[b], order[a]
    return order


def _as_tuple(value: Any, repeat: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * repeat


def _name(site: Site) -> str:
    return type(site.module).__name__.lower() if site.module is not None else spelling(site.node)


def spelling(node: fx.Node) -> str:
    """The operator's bare name, however it is spelled."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return node.target.split(".")[-1] if isinstance(node.target, str) else str(node.target.__name__)
