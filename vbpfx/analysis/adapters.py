"""Adapters of low rank beside a layer: y = W x + s B (A x), two layers that are one with the layer that they adapt.

Read off the graph, not off names: nothing but scales, casts and dropout stands between A and B, what they make is added to what
another layer makes of the same x, and the rank is smaller than what goes in and comes out. Merging W + s B A leaves no place for a
bias between the two, so their rank is not a hidden width, and what they read cannot be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, fx, nn

from vbpfx.analysis.evidence import Evidence
from vbpfx.plans.records import Consumer
from vbpfx.rules.axes import Axis, spelling
from vbpfx.rules.ops import called_module, is_cast, is_sum, operands_read


class Adapter(NamedTuple):
    """The layers A (``down``), B (``up``) and the one that they adapt, by their weights."""

    down: str
    up: str
    base: str


def find_adapters(graph_module: fx.GraphModule, evidence: Evidence) -> list[Adapter]:
    """Every adapter of the graph."""
    layers = {
        consumer.node: consumer
        for found in evidence.contracted.values()
        for consumer in found
        if Axis(consumer.weight, 0, True) in evidence.sizes  # a computed weight is nobody's parameter
    }
    return [
        Adapter(down.weight, up.weight, base.weight)
        for up in layers.values()
        for down in _layers_behind(_operand(up, evidence), layers, graph_module, sums=False)
        if _is_low_rank(down, up, evidence)
        for base in _beside(up, down, layers, graph_module, evidence)
    ]


def _operand(layer: Consumer, evidence: Evidence) -> fx.Node:
    return evidence.nodes[layer.source.node]


def _is_low_rank(down: Consumer, up: Consumer, evidence: Evidence) -> bool:
    rank = evidence.sizes[Axis(up.weight, up.weight_axis, True)]
    ends = (Axis(down.weight, down.weight_axis, True), Axis(up.weight, 1 - up.weight_axis, True))
    return all(rank < evidence.sizes[end] for end in ends)


def _beside(
    up: Consumer, down: Consumer, layers: dict[str, Consumer], graph_module: fx.GraphModule, evidence: Evidence
) -> Iterator[Consumer]:
    """The layers of the same input that B's value is added to."""
    read = _origin(_operand(down, evidence), graph_module)
    for total in _sums_ahead(evidence.nodes[up.node], graph_module):
        for operand in total.all_input_nodes:
            for base in _layers_behind(operand, layers, graph_module, sums=True):
                if base.node not in (up.node, down.node) and _origin(_operand(base, evidence), graph_module) is read:
                    yield base


def _sums_ahead(node: fx.Node, graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The sums that a value goes into, unchanged but for its scale."""
    for user in node.users:
        if is_sum(user):
            yield user
        elif _only_scales(user, graph_module):
            yield from _sums_ahead(user, graph_module)


def _layers_behind(
    node: fx.Node, layers: dict[str, Consumer], graph_module: fx.GraphModule, *, sums: bool
) -> Iterator[Consumer]:
    """The layers whose values a value is, but for scales, and, with ``sums``, a sum of."""
    if node.name in layers:
        yield layers[node.name]
    elif (sums and is_sum(node)) or _only_scales(node, graph_module):
        for operand in _operands(node):
            yield from _layers_behind(operand, layers, graph_module, sums=sums)


def _origin(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    """What a value was before casts and dropout."""
    while _only_scales(node, graph_module):
        (node,) = _operands(node)
    return node


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values a call reads."""
    return [operand for operand in operands_read(node) if isinstance(operand.meta.get("val"), Tensor)]


_HAND_ON = ("contiguous", "clone", "detach", "alias")


def _only_scales(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the call hands on its one operand, times a number at most."""
    if len(_operands(node)) != 1 or not isinstance(node.meta.get("val"), Tensor):
        return False
    if (module := called_module(graph_module, node)) is not None:
        return isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))
    name = spelling(node).strip("_") if node.op in ("call_function", "call_method") else ""
    return is_cast(node) or "dropout" in name or name in (*_HAND_ON, "mul", "imul", "div", "truediv")
