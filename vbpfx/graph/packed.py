"""Unpack layers that compute queries, keys and values at once: one axis that holds all three becomes three axes.

A packed layer's output is split by a view into (n, H, d), n parts of H heads with d channels, and the parts are taken one by one. In
this form all parts have as many channels. Here the parts are split first, and each is divided into heads by itself:

    qkv.reshape(B, N, 3, H, d).permute(2, 0, 3, 1, 4)  ->  part.unflatten(-1, (H, d)).permute(0, 2, 1, 3)  for each of three parts

The values are the same. The layer keeps its weight, with the rows in the same order, and each part may lose other channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from vbpfx.rules.axes import ComputedArgumentError, Names, Site, spelling
from vbpfx.rules.calls import called_module
from vbpfx.rules.shapes import order_of_axes, permutation, regrouping, runs, takes_one
from vbpfx.rules.table import operator_of

# A view into two axes is unpacked only for this many parts. Two parts are the halves of a gate.
_QUERY_KEY_VALUE = 3
_NO_NAMES = Names({}, {})


class _Packed(NamedTuple):
    """A view that splits axis ``dim`` of its operand into ``before``, ``parts`` and ``after``, and the parts that are taken of it."""

    view: fx.Node
    dim: int
    before: tuple[int, ...]
    parts: int
    after: tuple[int, ...]
    taken: tuple[_Taken, ...]


class _Taken(NamedTuple):
    """A node that takes one part.

    ``axes`` are the axes of its value as axes of the view, None for a new axis of length 1. ``copies`` says whether a call on the way
    makes the value contiguous.
    """

    node: fx.Node
    part: int
    axes: tuple[int | None, ...]
    copies: bool


def unpack(graph_module: fx.GraphModule) -> None:
    """Rewrite all packed layers of a graph, in place. All nodes must have ``meta["val"]``, and new nodes get it."""
    found = [packed for node in graph_module.graph.nodes if (packed := _packed(graph_module, node)) is not None]
    for packed in found:
        _rewrite(packed)
    if found:
        graph_module.graph.lint()
        graph_module.recompile()


def _packed(graph_module: fx.GraphModule, view: fx.Node) -> _Packed | None:
    """Return what a view packs; None if it does not split an axis into parts that are taken one by one."""
    module = called_module(graph_module, view)
    if operator_of(view, module).rule is not regrouping or not view.all_input_nodes:
        return None
    given, value = (node.meta.get("val") for node in (view.all_input_nodes[0], view))
    if not isinstance(given, Tensor) or not isinstance(value, Tensor):
        return None
    before, after = tuple(given.shape), tuple(value.shape)
    for source, made in runs(before, after):
        first, last = made[0], made[-1]
        beside = before[: source[0]], before[source[0] + 1 :]
        if len(source) > 1 or len(made) < 2 or beside != (after[:first], after[last + 1 :]):
            continue
        for at in made[:-1]:
            if len(made) == 2 and after[at] != _QUERY_KEY_VALUE:
                continue
            taken = list(_taken(graph_module, view, at, tuple(range(len(after))), False))
            if taken and None not in taken:
                ends = tuple(end for end in taken if end is not None)
                return _Packed(view, source[0], after[first:at], after[at], after[at + 1 : last + 1], ends)
    return None


def _taken(
    graph_module: fx.GraphModule, node: fx.Node, at: int, axes: tuple[int | None, ...], copies: bool
) -> Iterator[_Taken | None]:
    """Yield the nodes that take one part of a view, behind permutations; None if anything else uses the view.

    Args:
        node: the view, or a permutation of it.
        at: the axis of the view that counts the parts.
        axes: the axes of the node's value as axes of the view.
        copies: whether the value was made contiguous.
    """
    ndim, place = len(axes), axes.index(at)
    left = (*axes[:place], *axes[place + 1 :])
    for user in node.users:
        row, name = operator_of(user, called_module(graph_module, user)), spelling(user)
        if user.args[:1] != (node,) or node in user.args[1:]:
            yield None
        elif row.rule is permutation:
            try:
                order = order_of_axes(Site(user, None, _NO_NAMES, {}), ndim)
            except ComputedArgumentError:
                yield None
            else:
                yield from _taken(graph_module, user, at, tuple(axes[dim] for dim in order), copies)
        elif row.hands_on:
            yield from _taken(graph_module, user, at, axes, copies or name in ("contiguous", "clone"))
        elif name in ("squeeze", "unsqueeze") and (moved := _with_one(user, axes)) is not None:
            yield from _taken(graph_module, user, at, moved, copies)
        elif name == "unbind" and takes_one(user, place, ndim):
            for part in user.users:
                index = part.args[1] if spelling(part) == "getitem" else None
                yield _Taken(part, index, left, copies) if isinstance(index, int) else None
        elif name == "select" and takes_one(user, place, ndim) and isinstance(user.args[2], int):
            yield _Taken(user, user.args[2], left, copies)
        elif name == "getitem" and place == 0 and isinstance(user.args[1], int):
            yield _Taken(user, user.args[1], left, copies)
        else:
            yield None


def _with_one(node: fx.Node, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    """Return the axes behind a call of ``unsqueeze`` or of ``squeeze`` that drops a new axis; None for any other call."""
    dim = node.args[1] if len(node.args) == 2 else None
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(dim, int):
        return None
    if spelling(node) == "unsqueeze":
        at = dim % (len(axes) + 1)
        return (*axes[:at], None, *axes[at:])
    at = dim % len(axes)
    return (*axes[:at], *axes[at + 1 :]) if axes[at] is None else None


def _rewrite(packed: _Packed) -> None:
    """Split the operand of a view into parts, and replace every node that takes one."""
    view, dim = packed.view, packed.dim
    source, width = view.all_input_nodes[0], math.prod(packed.after)
    with view.graph.inserting_before(view):
        if packed.before:
            source = _call(view, torch.unflatten, (source, dim, (*packed.before, packed.parts * width)))
        at = dim + len(packed.before)  # the axis of the view that counts the parts
        split = _call(view, torch.split, (source, [width] * packed.parts, at))
        parts = {}
        for number in sorted({taken.part % packed.parts for taken in packed.taken}):
            part = _call(view, operator.getitem, (split, number))
            parts[number] = _call(view, torch.unflatten, (part, at, packed.after)) if len(packed.after) > 1 else part
    for taken in packed.taken:
        with view.graph.inserting_before(taken.node):
            made = parts[taken.part % packed.parts]
            order = [axis - (axis > at) for axis in taken.axes if axis is not None]
            if order != list(range(len(order))):
                made = _call(view, torch.permute, (made, order))
            for place, axis in enumerate(taken.axes):
                made = _call(view, torch.unsqueeze, (made, place)) if axis is None else made
            made = _call(view, "contiguous", (made,)) if taken.copies else made
        taken.node.replace_all_uses_with(made)
    _erase(view)


def _erase(node: fx.Node) -> None:
    """Erase a node and everything that uses it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _call(like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Return a new call with a value in ``meta["val"]``, which belongs to the same line of the model's code as another node."""
    graph = like.graph
    made = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    values = fx.map_arg(args, lambda node: node.meta["val"])
    made.meta = dict(like.meta)
    with like.meta["val"].fake_mode:
        made.meta["val"] = getattr(values[0], target)() if isinstance(target, str) else target(*values)
    return made
