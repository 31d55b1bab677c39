"""Kinds of blocks: classify a block by how its layers and operators are arranged, and never by names."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.evidence import Evidence, depends, find_evidence
from vbpfx.graph.capture import named_tensors
from vbpfx.plans.records import Block
from vbpfx.rules.axes import Axis
from vbpfx.rules.table import operator_of


def kinds(analysis: Analysis) -> dict[str, str]:
    """Return the kind of every block, such as ``"MLP"``, ``"gated MLP"``, ``"token-mixing MLP"`` or ``"convolution"``."""
    evidence = find_evidence(analysis.captured)
    tensors = named_tensors(analysis.captured.reference)
    is_token_axis = _token_axes(evidence)
    return {block.name: _kind(block, tensors, evidence, is_token_axis) for block in analysis.blocks}


def calls(block: Block, analysis: Analysis) -> int:
    """Return how often the network runs the block: the calls of the consumer that is called most often."""
    if block.factors:
        return len({factor.node for factor in block.factors})
    weights = [consumer.weight for consumer in {c.node: c for c in block.consumers}.values()]
    return max(weights.count(weight) for weight in weights)


def _kind(block: Block, tensors: dict[str, Tensor], evidence: Evidence, is_token_axis: Callable[[Axis], bool]) -> str:
    if block.kind == "query":
        return f"queries and keys, {block.groups} heads" if block.groups > 1 else "queries and keys, alike in all heads"
    if block.kind == "value":
        return (
            f"values of attention, {block.groups} heads"
            if block.groups > 1
            else "values of attention, alike in all heads"
        )
    own = {*block.producers, *(consumer.weight for consumer in block.consumers)}
    between = {entry.name for entry in block.parameters} - own
    if block.has_experts:
        base = "experts"
    elif any(max(tensors[name].shape[2:], default=1) > 1 for name in own):
        base = "convolution"
    elif any(max(tensors[name].shape[2:], default=1) > 1 for name in between):
        base = "inverted bottleneck"  # a depthwise convolution between pointwise ones
    else:
        base = "MLP"
    mixing = "token-mixing " if any(map(is_token_axis, _read_by(block.producers, evidence))) else ""
    spans = [(carrier.node, carrier.axis) for carrier in block.carriers]
    multiplied = _multiplies_two(block, evidence)
    excited = multiplied and _makes_again(block, evidence)
    gated = (multiplied and not excited) or len(set(spans)) < len(spans)
    beside = [("squeeze-and-excite", excited), ("a norm between", bool(block.reductions))]
    return ", ".join([f"{mixing}{'gated ' if gated else ''}{base}", *(what for what, there in beside if there)])


def _read_by(weights: tuple[str, ...], evidence: Evidence) -> list[Axis]:
    """Return the axes that these weights sum over."""
    return [axis for axis, found in evidence.contracted.items() if any(c.weight in weights for c in found)]


def _multiplies_two(block: Block, evidence: Evidence) -> bool:
    """Return whether the block multiplies two values from different layers; x * sigmoid(x) is not a gate."""
    makers: dict[fx.Node, frozenset[str]] = {}
    for name, axis, *_ in block.carriers:
        node = evidence.nodes[name]
        operands = [makers[source] for source in node.all_input_nodes if source in makers]
        if operator_of(node).joins == "product" and len(operands) > 1 and operands[0] != operands[1]:
            return True
        made = evidence.producing.get(Axis(name, axis))
        makers[node] = frozenset((name,)) if made else frozenset().union(*operands)
    return False


def _makes_again(block: Block, evidence: Evidence) -> bool:
    """Return whether a layer that produces the axis depends on an earlier value of the same axis."""
    carriers = {evidence.nodes[carrier.node] for carrier in block.carriers}
    makers = {
        evidence.nodes[n] for node, axis, *_ in block.carriers for n in evidence.producing.get(Axis(node, axis), ())
    }
    start = min(evidence.position[node.name] for node in carriers)
    return any(depends(maker, carriers, start, evidence.position) for maker in makers)


def _token_axes(evidence: Evidence) -> Callable[[Axis], bool]:
    """Return a function that tells whether an axis counts positions.

    It does if no weight produced it where it first appears, and it is not the feature axis of an input.
    """
    verdicts: dict[Axis, bool] = {}

    def judge(axis: Axis) -> bool:
        if axis not in verdicts:
            together = nx.node_connected_component(evidence.graph, axis)
            values = [a for a in together if not a.is_parameter]
            first = min(values, key=lambda a: evidence.position[a.owner])
            verdicts.update(dict.fromkeys(values, _is_born_of_no_weight(first, evidence)))
        return verdicts[axis]

    return judge


def _is_born_of_no_weight(axis: Axis, evidence: Evidence) -> bool:
    node = evidence.nodes[axis.owner]
    dims = node.meta["val"].ndim
    weighted = any(evidence.position[node.name] in positions for positions in evidence.uses.values())
    if node.op == "placeholder" or weighted:  # a layer without a rule: which axis its weights produce is not known
        return axis.dim != (1 if dims > 3 else dims - 1)
    return not any(other.is_parameter for other in evidence.graph.neighbors(axis))
