"""Streams: a graph run piece by piece over all batches at once.

Methods that go block after block need every batch at one place of the network before any goes on. A stream holds, per
batch, the values that nodes still to come will read (in a network of blocks: the residual stream and little else), and
runs every node once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs
from vbpfx.graph.capture import Captured
from vbpfx.graph.fake import graph_arguments


def last_reads(nodes: Sequence[fx.Node]) -> list[int]:
    """Position of the last node that reads each node's value; its own where none does."""
    order = {node: number for number, node in enumerate(nodes)}
    return [max((order[user] for user in node.users), default=number) for number, node in enumerate(nodes)]


def held(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Bytes that a run of the nodes holds at each of them, and behind it: values that are still to be read, weights not counted."""
    ends: dict[int, int] = defaultdict(int)
    live, found = 0, []
    for number, (node, last) in enumerate(zip(nodes, last_reads(nodes), strict=True)):
        tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        size = 0 if node.op == "get_attr" else sum(t.numel() * t.element_size() for t in tensors)
        live += size
        ends[last] += size
        found.append((live, live - ends[number]))
        live -= ends[number]
    return found


def held_bytes(captured: Captured, names: Iterable[str]) -> int:
    """The most bytes per sample that a stream holds when it stands at any of the nodes."""
    nodes, wanted = list(captured.graph_module.graph.nodes), set(names)
    most = max((at for node, (at, _) in zip(nodes, held(nodes), strict=True) if node.name in wanted), default=0)
    return most // (captured.batch or captured.inputs.batch_size or 1)


class Stream:
    """A graph, and where every batch stands in it.

    Args:
        graph_module: the graph; what its modules compute may change between the pieces, its nodes may not.
        batches: the arguments of the forward call, on the graph's device. They are copied: a model may write into its
            input.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Inputs]) -> None:
        self.nodes = {node.name: node for node in graph_module.graph.nodes}
        self.order = {name: number for number, name in enumerate(self.nodes)}
        self.runs = [_Run(graph_module, batch.map(torch.clone)) for batch in batches]
        self._sequence = list(self.nodes.values())
        self._position = 0
        self._last_read = last_reads(self._sequence)

    def run_before(self, name: str) -> None:
        """Run every node that stands before a node, on all batches."""
        self._run_to(self.order[name])

    def run_through(self, name: str) -> None:
        """The same, and that node too."""
        self._run_to(self.order[name] + 1)

    def value(self, batch: int, name: str) -> Tensor:
        """A node's value in one batch; it must have run, and a node still to come must read it."""
        value = self.runs[batch].env[self.nodes[name]]
        assert isinstance(value, Tensor)
        return value

    def holds(self, name: str) -> bool:
        """Whether a node has run and its value is still there."""
        return all(self.nodes[name] in run.env for run in self.runs)

    def _run_to(self, position: int) -> None:
        for run in self.runs:
            for node in self._sequence[self._position : position]:
                with torch.no_grad():
                    run.env[node] = run.run_node(node)
                for operand in {node, *node.all_input_nodes}:
                    if self._last_read[self.order[operand.name]] <= self.order[node.name]:
                        del run.env[operand]
        self._position = max(self._position, position)


class _Run(fx.Interpreter):
    """One batch on its way."""

    def __init__(self, graph_module: fx.GraphModule, batch: Inputs) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.args_iter = iter(graph_arguments(graph_module, batch))
        self.env: dict[fx.Node, Any] = {}
