"""The open axes of a file's inputs: which of them are one axis, and which the samples stand along.

A file names its open axes. Those of one name are alike: ``batch`` may stand first in one input and second in another, a state
of a recurrent network. Those of different names are not: a graph's nodes and its edges.
"""

from __future__ import annotations

import onnx_ir as ir


def open_negative_sizes(model: ir.Model) -> None:
    """Make a size below nothing an open axis: PaddlePaddle writes -1 for one, and ONNX Runtime reads it so."""
    graphs = [model.graph, *model.graph.subgraphs()]
    values = [value for graph in graphs for value in (*graph.inputs, *graph.outputs)]
    values += [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in values:
        sizes = list(value.shape or ())
        if any(isinstance(size, int) and size < 0 for size in sizes):
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in sizes])


def names_of_axes(value: ir.Value, axes: int) -> list[str | None]:
    """What an input calls each of so many axes: "" for an open one without a name, None for one of fixed size."""
    sizes = list(value.shape) if value.shape is not None else [None] * axes
    return [None if isinstance(size, int) else str(getattr(size, "value", size) or "") for size in sizes]
