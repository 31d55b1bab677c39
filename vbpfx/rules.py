"""The rules: how operators treat the axes of their tensors.

A rule is a generator over one call, a :class:`~vbpfx.axes.Site`. Its docstring is the operator's formula; it yields
which axes run channel by channel into which, which a weight makes or sums over, and which are opaque and why.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from vbpfx.axes import Axis, Contracts, Opaque, Operand, Part, Produces, Reduces, Relation, Same, Site, SizeStated


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
    """LayerNorm, RMSNorm: statistics over the last axes, then scale and shift along them.

    Over one axis the statistics are sums, in which channels that became constant go on counting.
    """
    x, out = site.x, site.out
    normalized = len(_as_tuple(site.constant(1, "normalized_shape"), 1))
    yield from _leading(x, out, but=normalized)
    scale_and_shift = (site.operand(2, "weight"), site.operand(3, "bias"))
    if normalized == 1:
        yield Reduces(x.axis(-1), "rms_norm" if "rms" in _name(site) else "layer_norm")
        if site.module is None:
            yield SizeStated(x.axis(-1), (*_argument_path(site, 1, "normalized_shape"), 0))
    for back in range(1, normalized + 1):
        if normalized > 1:
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
    """mean, sum, extrema, length over ``dim``; every other axis is kept."""
    x, out = site.x, site.out
    given = site.constant(2 if _name(site) in ("norm", "linalg_vector_norm", "vector_norm") else 1, "dim")
    if given is None or isinstance(given, bool) or given == () or given == []:
        yield from site.all_opaque(f"{_name(site)} reduces it")
        return
    reduced = {dim % x.ndim for dim in _as_tuple(given, 1)}
    kept = [dim for dim in range(x.ndim) if dim not in reduced]
    for dim in reduced:
        if len(reduced) == 1 and _name(site) == "mean":
            yield Reduces(x.axis(dim), "mean")
        elif len(reduced) == 1 and _name(site) == "sum":
            yield Reduces(x.axis(dim), "sum")
        else:
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
    stacked = _stacked_parts(site, x, out)
    for axis, size, dim in zip(x.axes, x.shape, range(x.ndim), strict=True):
        if dim not in kept and dim not in stacked and size != 1:
            yield Opaque(axis, f"{_name(site)} splits or merges it")
    whole = set(kept.values())
    for dim, position in stacked.items():
        whole |= {position, position + 1}
        yield Opaque(out.axis(position), "its entries are taken one by one")
        width = out.shape[position + 1]
        for part in range(out.shape[position]):
            yield Part(x.axis(dim), out.axis(position + 1), part * width)
        yield from _stated(site, out, position + 1)
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
    given = list(index) if isinstance(index, tuple) else [index]
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
    paths = (_argument_path(site, 2, "start"), _argument_path(site, 3, "end"))
    for dim in range(x.ndim):
        yield from _sliced(site, x.axis(dim), out.axis(dim), taken if dim == sliced else slice(None), paths)


def narrowing(site: Site) -> Iterator[Relation]:
    """narrow: x[..., start : start + length, ...] along one axis."""
    x, out = site.x, site.out
    narrowed, start = site.constant(1, "dim") % x.ndim, site.constant(2, "start")
    for dim in range(x.ndim):
        if dim != narrowed:
            yield Same(x.axis(dim), out.axis(dim))
    start = start % x.shape[narrowed] if x.shape[narrowed] else 0
    yield Part(x.axis(narrowed), out.axis(narrowed), start)
    yield SizeStated(x.axis(narrowed), _argument_path(site, 2, "start"), 0, start)
    yield SizeStated(x.axis(narrowed), _argument_path(site, 3, "length"), start, start + out.shape[narrowed])


def splitting(site: Site) -> Iterator[Relation]:
    """chunk, split, unbind: consecutive parts along one axis, or its entries one by one.

    The call's value is a tuple; what is said here is of the parts that are taken out of it.
    """
    x, name = site.x, _name(site)
    dim = site.constant(1 if name == "unbind" else 2, "dim", 0) % x.ndim
    parts = site.node.meta["val"]
    if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in site.node.users):
        yield from site.all_opaque(f"{name} hands its parts on together")
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
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        yield SizeStated(x.axis(dim), ("args", 1, index), start, stop, by_code=name != "chunk")


def glu(site: Site) -> Iterator[Relation]:
    """out[c] = x[c] sigmoid(x[d + c]) with d half the size of ``dim``: a packed gate in one call."""
    x, out = site.x, site.out
    dim = site.constant(1, "dim", -1) % x.ndim
    for other in range(x.ndim):
        if other != dim:
            yield Same(x.axis(other), out.axis(other))
    yield Part(x.axis(dim), out.axis(dim), 0)
    yield Part(x.axis(dim), out.axis(dim), out.shape[dim])


def select(site: Site) -> Iterator[Relation]:
    """x[..., i, ...] along one axis, which disappears."""
    x, out = site.x, site.out
    taken = site.constant(1, "dim", 0) % x.ndim
    yield Opaque(x.axis(taken), "one entry of it is taken")
    for position, dim in enumerate(d for d in range(x.ndim) if d != taken):
        yield Same(x.axis(dim), out.axis(position))


def concatenation(site: Site) -> Iterator[Relation]:
    """cat: consecutive parts along ``dim``; every other axis is common to all of them."""
    out = site.out
    joined = site.constant(1, "dim", 0) % out.ndim
    parts = site.parts(0, "tensors")
    if parts is None or any(part.ndim != out.ndim for part in parts):
        yield from site.all_opaque(f"{_name(site)} joins what is no list of tensors of one shape")
        return
    start = 0
    for part in parts:
        yield from (Same(part.axis(dim), out.axis(dim)) for dim in range(out.ndim) if dim != joined)
        yield Part(out.axis(joined), part.axis(joined), start)
        start += part.shape[joined]


def stack(site: Site) -> Iterator[Relation]:
    """stack: a new axis along which the operands stand; their own axes are common to all."""
    out = site.out
    new = site.constant(1, "dim", 0) % out.ndim
    kept = [dim for dim in range(out.ndim) if dim != new]
    yield Opaque(out.axis(new), "tensors are stacked along it")
    for operand in site.operands:
        yield from (Same(operand.axis(at), out.axis(dim)) for at, dim in enumerate(kept))


def matrix_product(site: Site) -> Iterator[Relation]:
    """y[..., n, o] = sum_i a[..., n, i] b[..., i, o].

    With a matrix of parameters on one side it is a layer without a bias; of two computed values what is summed over
    is opaque.
    """
    operands, out = site.operands, site.out
    bare = [o for o in operands if o.is_parameter]
    if len(operands) != 2 or min(o.ndim for o in operands) < 2 or len(bare) > 1 or any(o.ndim != 2 for o in bare):
        yield from site.all_opaque("a matrix product with a vector, with itself or with a stack of matrices")
        return
    a, b = operands
    if b.is_parameter:
        yield from _leading(a, out, but=1)
        yield Contracts(a.axis(-1), b.axis(0), None)
        yield Produces(out.axis(-1), b.axis(1))
        return
    if a.is_parameter:
        yield from _leading(b, out, but=2)
        yield Same(b.axis(-1), out.axis(-1))
        yield Contracts(b.axis(-2), a.axis(1), None)
        yield Produces(out.axis(-2), a.axis(0))
        return
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


def _sliced(
    site: Site, x: Axis, out: Axis, taken: slice, paths: tuple[tuple[str | int, ...], tuple[str | int, ...]]
) -> Iterator[Relation]:
    """One axis under a slice; ``paths`` say where the call states the slice's two ends."""
    if any(isinstance(entry, fx.Node) for entry in (taken.start, taken.stop, taken.step)):
        yield Opaque(x, "a part of computed size is taken")
        yield Opaque(out, "it is a part of computed size")
        return
    size = next(o.shape[x.dim] for o in site.operands if o.owner == x.owner)
    start, stop, step = taken.indices(size)
    if (start, stop, step) == (0, size, 1):
        yield Same(x, out)
    elif step != 1 or stop <= start:
        yield Opaque(x, "every so many entries of it are taken")
        yield Opaque(out, "it is every so many entries of another axis")
    else:
        yield Part(x, out, start)
        for end, value, path in ((start, taken.start, paths[0]), (stop, taken.stop, paths[1])):
            if value is not None and 0 < end < size:
                yield SizeStated(x, path, *((0, end) if value >= 0 else (end, size)))


def _argument_path(site: Site, position: int, name: str) -> tuple[str | int, ...]:
    """Where a call holds an argument."""
    return ("kwargs", name) if name in site.node.kwargs else ("args", position)


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


def _stacked_parts(site: Site, x: Operand, out: Operand) -> dict[int, int]:
    """Input axis of k d channels -> output axis k, where it becomes (k, d) and every reader takes one of the k.

    That is a packed gate. Attention's heads look alike but go on side by side: no single entry is read.
    """
    found = {}
    for dim, size in enumerate(x.shape):
        for position in range(out.ndim - 1):
            count, width = out.shape[position : position + 2]
            splits = math.prod(x.shape[:dim]) == math.prod(out.shape[:position]) and 1 < count < size == count * width
            users = site.node.users
            if splits and users and all(_takes_one(user, position, out.ndim) for user in users):
                found[dim] = position
    return found


def _takes_one(user: fx.Node, dim: int, ndim: int) -> bool:
    """Whether a call reads single entries along an axis, never the whole of it."""
    name, given = spelling(user), (*user.args[1:], *user.kwargs.values())
    if name == "slice" and user.meta["val"].shape == user.all_input_nodes[0].meta["val"].shape:  # x[:]
        return bool(user.users) and all(_takes_one(further, dim, ndim) for further in user.users)
    if name in ("unbind", "select"):
        return bool(given) and isinstance(given[0], int) and given[0] % ndim == dim
    if name != "getitem" or not given:
        return False
    index = given[0] if isinstance(given[0], tuple) else (given[0],)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (ndim - len(index) + 1), *index[at + 1 :])
    return None not in index and len(index) > dim and isinstance(index[dim], int)


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
