"""The open axes of a file's inputs: their names, and which of them is the batch axis.

A file can give names to its open axes. Axes with the same name are the same axis: ``batch`` may be the first axis of
one input, and the second of another, such as the state of a recurrent network. Axes with different names differ, such
as the nodes and the edges of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def open_negative_sizes(model: ir.Model) -> None:
    """Turn negative sizes into open axes. PaddlePaddle writes -1 for an open axis, and ONNX Runtime reads it as one."""
    graphs = [model.graph, *model.graph.subgraphs()]
    values = [value for graph in graphs for value in (*graph.inputs, *graph.outputs)]
    values += [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in values:
        sizes = list(value.shape or ())
        if any(isinstance(size, int) and size < 0 for size in sizes):
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in sizes])


def names_of_axes(value: ir.Value, axes: int) -> list[str | None]:
    """Return an input's name for each of its axes: "" for an open axis without a name, None for an axis of fixed size.

    "?" does not count as a name. ``axes`` is the number of axes, and is used if the file states no shape.
    """
    sizes = list(value.shape) if value.shape is not None else [None] * axes
    return [None if isinstance(size, int) else str(getattr(size, "value", size) or "").strip("?") for size in sizes]


def stated_axes_of_samples(inputs: Sequence[ir.Value]) -> dict[str, int | None]:
    """Return the batch axis of every input, judging by the names and sizes in the file.

    It is the axis with the same name as the first axis of the first input. If that axis has no name, it is the first
    axis of every input whose first axis is open too, or has the same fixed size. An input without such an axis has
    None: it is not an input per sample.
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
        else:  # an axis with another name is not the batch axis
            found[str(value.name)] = 0 if names[0] == "" or (names[0] and not called) else None
    return found
