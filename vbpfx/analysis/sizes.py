"""Where the numbers in a graph come from that were read off shapes.

A hidden width that is read at run time may state the shape of a view, which then follows the narrowed
axis by itself. Anywhere else it is a number whose value changes with the width, and the axis must stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from vbpfx.data.inputs import holds_tensor
from vbpfx.rules.axes import Axis, Names, SizeRead, operand_of

_SAYS_NOTHING_OF_SIZES = frozenset({"device", "dtype", "ndim", "dim", "ndimension", "layout", "requires_grad",
                                    "is_floating_point", "is_cuda", "get_device", "element_size"})  # fmt: skip


def read_sizes(graph: fx.Graph, names: Names) -> dict[fx.Node, SizeRead]:
    """Every node whose value is a number or a shape computed from shapes, with the axes it was read from."""
    sizes: dict[fx.Node, SizeRead] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op not in ("call_function", "call_method") or holds_tensor(value):
            continue
        read = _read(node, sizes, names)
        if read is not None:
            sizes[node] = read
    return sizes


def _read(node: fx.Node, sizes: dict[fx.Node, SizeRead], names: Names) -> SizeRead | None:
    source = node.args[0] if node.args else None
    operand = operand_of(source, names) if isinstance(source, fx.Node) else None
    attribute = node.args[1] if node.target is getattr else node.target
    if attribute in _SAYS_NOTHING_OF_SIZES:
        return SizeRead((), plain=False)
    if operand is not None and attribute in ("shape", "size", torch.ops.aten.sym_size.int):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if attribute == "shape" or dim is None:
            return SizeRead(tuple(operand.axes), plain=True)
        if isinstance(dim, int):
            return SizeRead((operand.axis(dim),), plain=True)
    if node.target is operator.getitem and isinstance(source, fx.Node) and source in sizes and sizes[source].plain:
        return _entry(sizes[source], node.args[1])
    axes: dict[Axis, None] = {}
    for argument in node.all_input_nodes:
        argument_operand = operand_of(argument, names)
        read_from = sizes[argument].axes if argument in sizes else argument_operand.axes if argument_operand else ()
        axes |= dict.fromkeys(read_from)
    return SizeRead(tuple(axes), plain=False) if axes else None


def _entry(read: SizeRead, index: Any) -> SizeRead:
    if isinstance(index, int):
        return SizeRead((read.axes[index],), plain=True)
    if isinstance(index, slice) and not any(isinstance(e, fx.Node) for e in (index.start, index.stop, index.step)):
        return SizeRead(read.axes[index], plain=True)
    return SizeRead(read.axes, plain=False)
