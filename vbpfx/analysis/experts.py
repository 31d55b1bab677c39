"""Experts: find out whether the hidden axis of a mixture's experts can be narrowed, and with which parameters.

Every expert has the same number of hidden channels and keeps the same number of them, but each keeps its own. This is exact if every
parameter on the axis has an entry for every expert, and if all calls and parameters agree on which rows belong to which expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import networkx as nx
from torch import fx

from vbpfx.analysis.evidence import Evidence, depends
from vbpfx.plans.records import Consumer, ParameterAxis, Reduction, ValueAxis
from vbpfx.rules.axes import Axis
from vbpfx.rules.routing import Routing
from vbpfx.rules.table import operator_of

# The node and the reason why an axis cannot be narrowed.
Obstacle = tuple[str, str]


def touches_experts(produced: Sequence[str], consumers: Sequence[Consumer], evidence: Evidence) -> bool:
    """Return whether experts make or read an axis."""
    return any(c.routing is not None for c in consumers) or any(name in evidence.experts_read for name in produced)


def find_experts(
    width: int,
    produced: Sequence[str],
    consumers: Sequence[Consumer],
    reductions: Sequence[Reduction],
    parameters: Sequence[ParameterAxis],
    values: Sequence[ValueAxis],
    evidence: Evidence,
) -> int | Obstacle:
    """Return the number of experts whose hidden axis this is, or why it cannot be narrowed.

    Args:
        width: the number of channels of one expert.
        produced: the weights that make the axis.
        consumers, reductions: what reads it.
        parameters, values: the places of its channels.
    """
    for name in produced:
        if name not in evidence.experts_read:
            return consumers[0].node, f"experts read it, and {name}, which is not divided among experts, makes it"
    for consumer in consumers:
        if consumer.routing is None:
            return (
                consumer.node,
                f"experts make it, and {consumer.weight}, which is not divided among experts, reads it",
            )
        if consumer.routing.kind == "all":
            return consumer.node, "all experts read the same rows of it, so they could not keep channels of their own"
        whole = evidence.sizes[Axis(consumer.weight, consumer.weight_axis, True)]
        if (consumer.source.start, consumer.source.step, whole) != (0, 1, width):
            return consumer.node, "experts read it together with other channels"
    first = consumers[0]
    assert first.routing is not None
    if width < 2:
        return first.node, "every expert has a single hidden channel"
    experts = first.routing.experts
    if any((c.weight, c.bias) != (first.weight, first.bias) for c in consumers):
        return first.node, "several layers of the experts read it"
    if reductions:
        return reductions[0].node, "a statistic is taken over the hidden channels of experts"
    stack = Axis(first.weight, 0, True)
    if first.bias and not _is_bias_of_experts(first, consumers, experts, stack, evidence):
        return first.node, f"{first.bias} is not the bias of these experts alone"
    for entry in parameters:
        if (
            evidence.sizes[Axis(entry.name, 0, True)] != experts
            or entry.axis == 0
            or not _is_stack(entry.name, stack, evidence)
        ):
            return "", f"all experts share {entry.name}, so they could not keep channels of their own"
    return _disagreement(consumers, values, evidence) or experts


def _is_stack(name: str, stack: Axis, evidence: Evidence) -> bool:
    """Return whether every call that uses a parameter reads the entries of experts from its first axis."""
    if evidence.experts_read[name] == set(evidence.uses[name]):
        return True
    first = Axis(name, 0, True)
    return first in evidence.graph and nx.has_path(evidence.graph, first, stack)


def _is_bias_of_experts(
    first: Consumer, consumers: Sequence[Consumer], experts: int, stack: Axis, evidence: Evidence
) -> bool:
    outputs = evidence.sizes[Axis(first.weight, 3 - first.weight_axis, True)]
    shape = tuple(evidence.sizes.get(Axis(first.bias, dim, True)) for dim in range(2))
    own = first.bias not in evidence.tied and len(evidence.uses[first.bias]) == len(consumers)
    return own and shape == (experts, outputs) and _is_stack(first.bias, stack, evidence)


def _disagreement(consumers: Sequence[Consumer], values: Sequence[ValueAxis], evidence: Evidence) -> Obstacle | None:
    """Return the node at which rows of one expert meet channels of another, and the reason; None if there is none."""
    keys: dict[fx.Node, tuple[str, object]] = {}
    carriers = sorted({evidence.nodes[value.node] for value in values}, key=lambda n: evidence.position[n.name])
    beside = [n for c in consumers if c.total for n in _sources(evidence.nodes[c.total]) if n.name in evidence.lookups]
    divided = [evidence.routed[n.name] for n in (*carriers, *beside) if n.name in evidence.routed]
    roots = {_root(evidence.nodes[routing.by]) for routing in divided if routing.kind == "ids"}
    rows: dict[tuple[str, object], list[Axis]] = defaultdict(list)  # of every call of the experts
    for node in carriers:
        own = evidence.routed.get(node.name)
        found = {keys[source] for source in _sources(node) if source in keys}
        if own is not None:
            found.add(_key(own, roots, evidence))
        if len(found) > 1:
            return node.name, "channels of several experts meet there"
        keys |= dict.fromkeys([node], found.pop()) if found else {}
        if node in keys and keys[node][0] == "rows" and node.name not in evidence.lookups:
            rows[keys[node]].append(Axis(node.name, 0))
    for consumer in consumers:
        assert consumer.routing is not None
        node = evidence.nodes[consumer.source.node]
        if keys.get(node) != _key(consumer.routing, roots, evidence):
            return consumer.node, "the experts that make it and those that read it may be different ones"
        if consumer.routing.kind in ("ids", "offsets"):
            rows[keys[node]].append(Axis(node.name, 0))
        bias = (
            [n for n in _sources(evidence.nodes[consumer.total]) if n.name in evidence.lookups]
            if consumer.total
            else []
        )
        if any(_key(evidence.routed[n.name], roots, evidence) != keys[node] for n in bias):
            return consumer.total, "the bias of another expert is added to it"
    for axes in rows.values():
        together = nx.node_connected_component(evidence.graph, axes[0])
        moved = next((axis for axis in axes if axis not in together), None)
        if moved is not None:
            return moved.owner, "its rows are moved to other places between the layers of the experts"
    return None


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the values that a call reads, with the call that made several values in place of one of them."""
    return list(node.all_input_nodes) + [
        b for a in node.all_input_nodes if operator_of(a).takes_apart for b in a.all_input_nodes
    ]


def _key(routing: Routing, roots: set[fx.Node], evidence: Evidence) -> tuple[str, object]:
    """Return a value that is equal for two divisions of rows among experts if they are the same."""
    if routing.kind == "one":
        return "one", routing.at
    if routing.kind not in ("ids", "offsets"):
        return routing.kind, None
    node = _root(evidence.nodes[routing.by])
    if routing.kind == "offsets":  # offsets are counted from the ids of the rows
        node = next(
            (
                ids
                for ids in roots
                if node is ids or depends(node, {ids}, evidence.position[ids.name], evidence.position)
            ),
            node,
        )
    return "rows", node


def _root(node: fx.Node) -> fx.Node:
    """Return the node whose values these are, apart from shape and type."""
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], fx.Node):
        row = operator_of(node)
        if not (row.casts or row.hands_on or row.reads_sizes):
            break
        node = node.args[0]
    return node
