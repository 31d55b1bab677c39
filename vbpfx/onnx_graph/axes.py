"""The open axes of a file's inputs: which of them are one axis, and which the samples stand along.

A file names its open axes. Those of one name are alike: ``batch`` may stand first in one input and second in another, a state
of a recurrent network. Those of different names are not: a graph's nodes and its edges.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """What an input calls each of so many axes: "" for an open one without a name ("?" is none), None for one of fixed size."""
    sizes = list(value.shape) if value.shape is not None else [None] * axes
    return [None if isinstance(size, int) else str(getattr(size, "value", size) or "").strip("?") for size in sizes]


def stated_axes_of_samples(inputs: Sequence[ir.Value]) -> dict[str, int | None]:
    """Input -> the axis that its samples stand along, as far as the file says so: the one called as the first axis of the first input is.

    Where that has no name, the first axis of every input whose first axis is open, or of the same fixed size. None where there is
    no such axis: the input is not one of every sample.
    """
    first = next((value for value in inputs if value.shape), None)
    size = first.shape[0] if first is not None and first.shape else None
    called = names_of_axes(first, 1)[0] if first is not None else ""
    found: dict[str, int | None] = {}
    for value in inputs:
        names = names_of_axes(value, 1)
        if called and called in names:
            found[str(value.name)] = names.index(called)
        elif value.shape is None or not names:
            found[str(value.name)] = 0 if value.shape is None else None
        elif called is None:
            found[str(value.name)] = 0 if value.shape[0] == size else None
        else:  # an axis of another name is another one
            found[str(value.name)] = 0 if names[0] == "" or (names[0] and not called) else None
    return found
