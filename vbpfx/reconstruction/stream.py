"""Streams: a graph run piece by piece over all batches at once.

Methods that go block after block need every batch at one place of the network before any goes on. A stream holds, per
batch, the values that nodes still to come will read (in a network of blocks: the residual stream and little else), and
runs every node once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.held import last_reads


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
        self.runs = [_Run(graph_module, batch) for batch in batches]
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
        self.args_iter = _copies(graph_arguments(graph_module, batch))
        self.env: dict[fx.Node, Any] = {}


def _copies(arguments: Sequence[Any]) -> Iterator[Any]:
    """A copy of every argument when it is asked for: then nobody but the run holds it."""
    for argument in arguments:
        yield pytree.tree_map_only(Tensor, torch.clone, argument)
