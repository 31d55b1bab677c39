"""Rules for layers: which axes their weights produce, and which they sum over."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vbpfx.rules.axes import (
    Contracts,
    Grouped,
    Opaque,
    Operand,
    Paired,
    Produces,
    Relation,
    Repeated,
    Same,
    Site,
    SizeStated,
    as_tuple,
    leading,
)
from vbpfx.rules.experts import expert_einsum, expert_linear, expert_product, stack_read
from vbpfx.rules.table import Argument


def linear(site: Site) -> Iterator[Relation]:
    """y[..., o] = sum_i W[o, i] x[..., i] + b[o]"""
    x, out, weight, bias = site.x, site.out, site.operand(1, "weight"), site.operand(2, "bias")
    read = None if site.module is not None else stack_read(Argument(1, "weight").given(site.node), site.names)
    if read is not None and read.routing is not None and read.routing.kind == "one" and len(read.dims) == 2:
        yield from expert_linear(site, read)
        return
    if weight is None or weight.ndim != 2:
        yield from site.all_opaque("the layer's weight is computed, or it is not a matrix")
        return
    yield from leading(x, out, but=1)
    yield Contracts(x.axis(-1), weight.axis(1), bias)
    yield Produces(out.axis(-1), weight.axis(0))
    if bias is not None:
        yield Same(out.axis(-1), bias.axis(0))


def addmm(site: Site) -> Iterator[Relation]:
    """y[n, o] = b[o] + sum_i x[n, i] W[i, o]: a linear layer with a transposed weight."""
    bias, x, (weight, rows) = site.operand(0, "input"), site.operand(1, "mat1"), site.weight(2)
    scaled = site.argument(3, "beta", 1) != 1 or site.argument(4, "alpha", 1) != 1
    if bias is None or x is None or weight is None or bias.ndim != 1 or not weight.is_parameter or scaled:
        yield from site.all_opaque(
            "the matrix product is not a linear layer: its weight or its bias is computed, or alpha or beta is not 1"
        )
        return
    out = site.out
    yield from leading(x, out, but=1)
    yield Contracts(x.axis(-1), weight.axis(1 if rows else 0), bias)
    yield Produces(out.axis(-1), weight.axis(0 if rows else 1))
    yield Same(out.axis(-1), bias.axis(0))


def convolution(site: Site) -> Iterator[Relation]:
    """y[o] = sum_i W[o, i] * x[i] + b[o] over windows.

    A convolution without groups produces its output channels and contracts its input channels. If it pads with zeros, a
    constant channel is zero in the border; reflected, replicated and circular borders stay constant. With groups, each group
    produces and contracts channels of its own. A depthwise convolution treats each channel by itself, and may make several
    channels of it.
    """
    x, out, weight, bias = site.x, site.out, site.operand(1, "weight"), site.operand(2, "bias")
    padding, groups = site.constant(4, "padding", 0), site.constant(6, "groups", 1)
    if weight is None:
        yield from site.all_opaque("the convolution's weight is computed")
        return
    spatial = weight.ndim - 2
    channel = x.ndim - spatial - 1
    pointwise = all(size == 1 for size in weight.shape[2:])
    padded = (
        padding not in (0, "valid")
        and not (pointwise and padding == "same")
        and any(p != 0 for p in as_tuple(padding, spatial))
    )
    for dim in range(spatial):
        if pointwise and not padded and x.shape[channel + 1 + dim] == out.shape[channel + 1 + dim]:
            yield Same(x.axis(channel + 1 + dim), out.axis(channel + 1 + dim))
        else:
            yield Opaque(x.axis(channel + 1 + dim), "a convolution mixes the positions along it")
            yield Opaque(out.axis(channel + 1 + dim), "a convolution mixes the positions along it")
    if channel:
        yield Same(x.axis(0), out.axis(0))
    if groups == x.shape[channel] > 1:
        yield Same(out.axis(channel), weight.axis(0))
        if x.shape[channel] == out.shape[channel]:
            yield Same(x.axis(channel), out.axis(channel))
        else:
            yield Grouped(out.axis(channel), x.axis(channel))
        if site.module is None:
            yield SizeStated(x.axis(channel), site.path(6, "groups"))
    else:
        with_zeros = site.module is None or site.module.padding_mode == "zeros"
        yield Contracts(x.axis(channel), weight.axis(1), bias, padded=padded and with_zeros, groups=groups)
        yield Produces(out.axis(channel), weight.axis(0), groups)
    if bias is not None:
        yield Same(out.axis(channel), bias.axis(0))


# The arguments of a transposed convolution because of which a constant is spread unevenly, with their defaults.
_SPREADING = ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))


def transposed_convolution(site: Site) -> Iterator[Relation]:
    """y[o] = sum_i W[i, o] * x[i] + b[o], where every x is spread over a window.

    It produces its output channels and contracts its input channels. A constant channel is spread unevenly over the output,
    like one behind zero padding, unless the window has a single entry.
    """
    x, out, weight, bias = site.x, site.out, site.operand(1, "weight"), site.operand(2, "bias")
    if weight is None or site.constant(6, "groups", 1) != 1:
        yield from site.all_opaque("the transposed convolution's weight is computed, or it has groups")
        return
    channel = x.ndim - (weight.ndim - 2) - 1
    for operand in (x, out):
        for dim in range(channel + 1, operand.ndim):
            yield Opaque(operand.axis(dim), "a convolution mixes the positions along it")
    if channel:
        yield Same(x.axis(0), out.axis(0))
    sizes = weight.shape[2:], *(site.constant(i, name, default) for i, name, default in _SPREADING)
    spreads = any(
        as_tuple(size, 1) != (least,) * len(as_tuple(size, 1)) for size, least in zip(sizes, (1, 1, 0, 0), strict=True)
    )
    yield Contracts(x.axis(channel), weight.axis(0), bias, padded=spreads)
    yield Produces(out.axis(channel), weight.axis(1))
    if bias is not None:
        yield Same(out.axis(channel), bias.axis(0))


def embedding(site: Site) -> Iterator[Relation]:
    """y[..., c] = W[x[...], c]"""
    ids, weight = site.operand(0, "input"), site.operand(1, "weight")
    if isinstance(site.node.target, torch._ops.OpOverload):
        ids, weight = weight, ids
    out = site.out
    if ids is None or weight is None or weight.ndim != 2:
        yield from site.all_opaque("the embedding's weight is computed, or it is not a matrix")
        return
    yield from leading(out, ids, but=1)
    yield Same(out.axis(-1), weight.axis(1))
    if (
        site.name == "embedding"
        and site.argument(3, "max_norm") is not None
        and site.argument(3, "max_norm") is not False
    ):
        yield Opaque(out.axis(-1), "the embedding is renormalised across it")
    yield Opaque(weight.axis(0), "its rows are looked up")


def attention(site: Site) -> Iterator[Relation]:
    """y[..., n, c] = sum_m softmax_m(q[..., n, :] . k[..., m, :] + mask[..., n, m]) v[..., m, c]"""
    out = site.out
    query, key, value = (site.operand(i, n) for i, n in enumerate(("query", "key", "value")))
    if query is None or key is None or value is None or len({query, key, value}) < 3:
        yield from site.all_opaque("attention uses one tensor as two of query, key and value, and sums over it")
        return
    yield from (Same(query.axis(dim), out.axis(dim)) for dim in range(query.ndim - 1))
    if site.constant(5, "is_causal", False):
        yield Opaque(out.axis(-2), "causal attention counts along it")
    yield Same(value.axis(-1), out.axis(-1))
    yield Paired(query.axis(-1), key.axis(-1))
    for axis in (key.axis(-2), value.axis(-2)):
        yield Opaque(axis, "attention sums over it")
    yield Same(key.axis(-2), value.axis(-2))
    for operand in (key, value):
        for back in range(3, min(operand.ndim, out.ndim) + 1):
            if operand.shape[-back] == out.shape[-back]:
                yield Same(operand.axis(-back), out.axis(-back))
            elif back == 3 and site.argument(7, "enable_gqa", False) is True:
                yield Repeated(operand.axis(-3), out.axis(-3), out.shape[-3] // operand.shape[-3])
    mask = site.operand(3, "attn_mask")
    for axis in mask.axes if mask is not None else ():
        yield Opaque(axis, "it masks attention")
    if mask is not None and mask.ndim > 1:
        for side, along in ((mask.axis(-1), key.axis(-2)), (mask.axis(-2), out.axis(-2))):
            if mask.shape[side.dim] > 1:
                yield Same(side, along)


def einsum(site: Site) -> Iterator[Relation]:
    """Letters name axes. A letter of the output is the same axis in all tensors; all other letters are summed over."""
    out, operands = site.out, site.parts(1, "operands")
    if operands is None:
        given = site.node.args[1:]
        operands = site.operands if len(given) == len(site.operands) else None
    equation = site.argument(0, "equation")
    if operands is not None and isinstance(equation, str) and len(operands) == 2:
        experts = expert_einsum(site, equation, operands, list(site.node.all_input_nodes))
        if experts is not None:
            yield from experts
            return
    if operands is None or not isinstance(equation, str) or "." in equation or "->" not in equation:
        yield from site.all_opaque("an einsum whose equation does not name every axis")
        return
    left, _, right = equation.replace(" ", "").partition("->")
    summed: dict[str, list[tuple[Operand, int]]] = {}
    for letters, operand in zip(left.split(","), operands, strict=True):
        for dim, letter in enumerate(letters):
            if letter in right and letters.count(letter) == 1:
                if operand.shape[dim] == out.shape[right.index(letter)]:
                    yield Same(operand.axis(dim), out.axis(right.index(letter)))
                continue
            summed.setdefault(letter, []).append((operand, dim))
            if letter in right:
                yield Opaque(out.axis(right.index(letter)), "einsum reads it from a diagonal of two axes")
    for letter, found in summed.items():
        owners = {operand.owner for operand, _ in found if not operand.is_parameter}
        if len(found) == len(owners) == 2 and letter not in right:
            yield Paired(*(operand.axis(dim) for operand, dim in found))
            continue
        for operand, dim in found:
            yield Opaque(operand.axis(dim), "einsum sums over it")


def matrix_product(site: Site) -> Iterator[Relation]:
    """y[..., n, o] = sum_i a[..., n, i] b[..., i, o].

    If one side is a matrix of parameters, this is a layer without a bias. If both sides are computed, the axes that are
    summed over are paired.
    """
    operands, out = site.operands, site.out
    for place, node in enumerate(site.node.args[:2] if len(operands) == 2 else ()):
        read = stack_read(node, site.names)
        if read is not None and (read.parameter.ndim == 3 or read.routing is not None):
            experts = expert_product(site, read, operands[1 - place], weight_first=place == 0)
            if experts is not None:
                yield from experts
                return
    (first, columns), (second, rows) = site.weight(0), site.weight(1)
    bare = [weight for weight in (first, second) if weight is not None]
    if len(operands) != 2 or min(o.ndim for o in operands) < 2 or len(bare) > 1 or any(o.ndim != 2 for o in bare):
        yield from site.all_opaque("a matrix product with a vector, with itself or with a stack of matrices")
        return
    a, b = operands
    if second is not None:
        yield from leading(a, out, but=1)
        yield Contracts(a.axis(-1), second.axis(1 if rows else 0), None)
        yield Produces(out.axis(-1), second.axis(0 if rows else 1))
        return
    if first is not None:
        yield from leading(b, out, but=2)
        yield Same(b.axis(-1), out.axis(-1))
        yield Contracts(b.axis(-2), first.axis(0 if columns else 1), None)
        yield Produces(out.axis(-2), first.axis(1 if columns else 0))
        return
    yield Paired(a.axis(-1), b.axis(-2))
    yield Same(a.axis(-2), out.axis(-2))
    yield Same(b.axis(-1), out.axis(-1))
    for operand in operands:
        for back in range(3, operand.ndim + 1):
            if operand.shape[-back] == out.shape[-back]:
                yield Same(operand.axis(-back), out.axis(-back))
