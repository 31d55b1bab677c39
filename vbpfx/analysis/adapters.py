"""Low-rank adapters (LoRA): layers A and B beside a layer W that compute y = W x + s B (A x).

They are found from the graph's structure, not from names. Only scales, casts and dropout stand between A and B. Their
output is added to the output of another layer that reads the same x. The rank is smaller than the input and the output
width. An adapter will be merged into its layer as W + s B A, which leaves no place for a bias between A and B. So the
rank is not a hidden width, and constants in the adapter's input cannot be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, fx

from vbpfx.analysis.evidence import Evidence
from vbpfx.plans.records import Consumer
from vbpfx.rules.axes import Axis
from vbpfx.rules.calls import called_module, operands_read
from vbpfx.rules.table import operator_of


class Adapter(NamedTuple):
    """The names of the weights A (``down``), B (``up``) and W, the layer that they adapt (``base``)."""

    down: str
    up: str
    base: str


def find_adapters(graph_module: fx.GraphModule, evidence: Evidence) -> list[Adapter]:
    """Return all adapters in the graph."""
    layers = {
        consumer.node: consumer
        for found in evidence.contracted.values()
        for consumer in found
        if Axis(consumer.weight, 0, True) in evidence.sizes  # a weight that is computed is not a parameter
        and consumer.routing is None  # experts are no adapters
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
    """Yield the layers that read the same input and to whose output B's output is added."""
    read = _origin(_operand(down, evidence), graph_module)
    for total in _sums_ahead(evidence.nodes[up.node], graph_module):
        for operand in total.all_input_nodes:
            for base in _layers_behind(operand, layers, graph_module, sums=True):
                if base.node not in (up.node, down.node) and _origin(_operand(base, evidence), graph_module) is read:
                    yield base


def _sums_ahead(node: fx.Node, graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the sums that a value goes into, with nothing but scales in between."""
    for user in node.users:
        if operator_of(user).adds:
            yield user
        elif _only_scales(user, graph_module):
            yield from _sums_ahead(user, graph_module)


def _layers_behind(
    node: fx.Node, layers: dict[str, Consumer], graph_module: fx.GraphModule, *, sums: bool
) -> Iterator[Consumer]:
    """Yield the layers whose output a value is, apart from scales; with ``sums`` also those in a sum of outputs."""
    if node.name in layers:
        yield layers[node.name]
    elif (sums and operator_of(node).adds) or _only_scales(node, graph_module):
        for operand in _operands(node):
            yield from _layers_behind(operand, layers, graph_module, sums=sums)


def _origin(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    """Return the node whose value this one is, apart from scales, casts and dropout."""
    while _only_scales(node, graph_module):
        (node,) = _operands(node)
    return node


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose values a call reads."""
    return [operand for operand in operands_read(node) if isinstance(operand.meta.get("val"), Tensor)]


def _only_scales(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Return whether a call returns its only operand, possibly times a number."""
    if len(_operands(node)) != 1 or not isinstance(node.meta.get("val"), Tensor):
        return False
    operator = operator_of(node, called_module(graph_module, node))
    return operator.casts or operator.hands_on or operator.scales
