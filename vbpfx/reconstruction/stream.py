"""Streams: run a graph in stages, each stage over all batches before the next one begins.

Reconstruction works block after block, so all batches must reach a place in the network before any goes on. For every
batch a stream holds the values that later nodes will read (in most networks the residual stream and little else). Every
node runs once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.memory import last_reads


class Stream:
    """A graph that runs in stages, with the values that every batch has at the present stage.

    Args:
        graph_module: the graph. Between two stages its modules may change what they compute, but its nodes must stay.
        batches: the arguments of the forward call, on the graph's device. They are copied, since a model may write into
            its input.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Inputs]) -> None:
        self.nodes = {node.name: node for node in graph_module.graph.nodes}
        self.order = {name: number for number, name in enumerate(self.nodes)}
        self.runs = [_Run(graph_module, batch) for batch in batches]
        self._sequence = list(self.nodes.values())
        self._position = 0
        self._last_read = last_reads(self._sequence)

    def run_before(self, name: str) -> None:
        """Run every node before the named node, on all batches."""
        self._run_to(self.order[name])

    def run_through(self, name: str) -> None:
        """Run every node up to and including the named node, on all batches."""
        self._run_to(self.order[name] + 1)

    def value(self, batch: int, name: str) -> Tensor:
        """Return a node's value in one batch. The node must have run, and a node that has not run yet must read it."""
        value = self.runs[batch].env[self.nodes[name]]
        assert isinstance(value, Tensor)
        return value

    def holds(self, name: str) -> bool:
        """Return whether a node has run and its value is still held."""
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
    """An interpreter that runs one batch through the graph."""

    def __init__(self, graph_module: fx.GraphModule, batch: Inputs) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.args_iter = _copies(graph_arguments(graph_module, batch))
        self.env: dict[fx.Node, Any] = {}


def _copies(arguments: Sequence[Any]) -> Iterator[Any]:
    """Yield a copy of every argument when it is asked for, so that nothing but the run holds it."""
    for argument in arguments:
        yield pytree.tree_map_only(Tensor, torch.clone, argument)
