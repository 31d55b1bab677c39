"""The order in which streams run a graph: all calls of a layer stand together, so that one fit can use all of them.

A siamese network sends two inputs through the same layers, so it calls every layer twice. Its graph runs the first
input through all layers before the second; here both advance together. If one call of a layer needs the output of
another call (weights that are used again later, as in ALBERT), no such order exists, and the layer is not fitted.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.mutation import changed_by
from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import finish
from vbpfx.plans.records import Consumer

# All calls of one layer.
Calls = tuple[Consumer, ...]


@dataclass(frozen=True)
class Schedule:
    """An order of computation.

    Attributes:
        captured: the captured graph with its nodes in that order; they keep their names.
        layers: the calls of every layer that can be fitted, in that order.
    """

    captured: Captured
    layers: tuple[Calls, ...]


def schedule(analysis: Analysis) -> Schedule:
    """Return the order for an analysis's graph. It is the graph's own order if every layer is called once."""
    calls: dict[str, list[Consumer]] = defaultdict(list)
    for layer in analysis.layers:
        calls[layer.weight].append(layer)
    captured = analysis.captured
    several = [[captured.nodes[c.node] for c in found] for found in calls.values() if len(found) > 1]
    if not several:
        return Schedule(captured, tuple((layer,) for layer in analysis.layers))
    graph_module = captured.graph_module
    if any(changed_by(node, graph_module) for node in graph_module.graph.nodes):
        # a value that is changed in place must be read before or after the change, as in the graph, so nothing is moved
        order, together = list(graph_module.graph.nodes), set[fx.Node]()
    else:
        order, together = _side_by_side(list(graph_module.graph.nodes), several)
    position = {node.name: number for number, node in enumerate(order)}
    layers = [tuple(c) for c in calls.values() if len(c) == 1 or captured.nodes[c[0].node] in together]
    layers.sort(key=lambda c: position[c[0].node])
    return Schedule(replace(captured, graph_module=_ordered(graph_module, order)), tuple(layers))


def bring_together(graph_module: fx.GraphModule, layers: Iterable[Calls]) -> None:
    """Move the calls of each layer, in place, to where the last of them stands.

    Nodes that were inserted between the calls then come before all of them.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for calls in layers:
        for call in calls[:-1]:
            nodes[calls[-1].node].prepend(nodes[call.node])
    finish(graph_module)


def _side_by_side(nodes: Sequence[fx.Node], groups: Sequence[Sequence[fx.Node]]) -> tuple[list[fx.Node], set[fx.Node]]:
    """Return the nodes in an order in which groups stand together, and the members of the groups for which this worked.

    The order is that of ``nodes``, but a member of a group waits until the whole group can run. When only waiting nodes
    are left, the group that has waited longest is given up: its members run one by one.
    """
    number = {node: n for n, node in enumerate(nodes)}
    group_of = {node: n for n, group in enumerate(groups) for node in group}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [number[node] for node in nodes if not missing[node]]
    waiting: dict[int, list[fx.Node]] = defaultdict(list)
    order: list[fx.Node] = []
    given_up: set[int] = set()

    def run(node: fx.Node) -> None:
        order.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, number[user])

    while ready or waiting:
        if not ready:
            first = min(waiting, key=lambda group: number[waiting[group][0]])
            given_up.add(first)
            for node in waiting.pop(first):
                heapq.heappush(ready, number[node])
        node = nodes[heapq.heappop(ready)]
        group = group_of.get(node)
        if group is None or group in given_up:
            run(node)
            continue
        waiting[group].append(node)
        if len(waiting[group]) == len(groups[group]):
            for member in waiting.pop(group):
                run(member)
    return order, {node for node, group in group_of.items() if group not in given_up}


def _ordered(graph_module: fx.GraphModule, order: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a copy of the graph whose nodes stand in the given order. It shares all parameters."""
    copied = share_parameters(graph_module)
    nodes = {node.name: node for node in copied.graph.nodes}
    for before, after in itertools.pairwise(order):
        nodes[before.name].append(nodes[after.name])
    finish(copied)
    return copied
