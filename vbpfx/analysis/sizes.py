"""Sizes: find the numbers in a graph that are computed from shapes, and the axes whose sizes they are computed from.

A model may read a hidden width at run time. If it passes this size to a view, the view follows the narrowed axis
without changes. If it computes from it where to cut an axis (``h[..., : h.shape[-1] // 2]``), the narrowed graph holds
the new number in its place. Any other use makes a result depend on the width, so the axis cannot be narrowed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from vbpfx.data.inputs import holds_tensor
from vbpfx.rules.axes import Axis, Names, SizeRead, operand_of
from vbpfx.rules.table import Argument, operator_of

# Modules whose functions compute numbers from numbers.
_ARITHMETIC = ("_operator", "math", "builtins")


def read_sizes(graph: fx.Graph, names: Names) -> dict[fx.Node, SizeRead]:
    """Return every node whose value is a number or a shape computed from shapes, with the axes it was computed from."""
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
    reads = operator_of(node).reads
    if reads == "kind":
        return SizeRead((), plain=False)
    if operand is not None and reads == "sizes":
        dim = Argument(1, "dim").given(node)
        if dim is None or node.target is getattr:
            return SizeRead(tuple(operand.axes), plain=True, pure=True)
        if isinstance(dim, int):
            return SizeRead((operand.axis(dim),), plain=True, pure=True)
    if node.target is operator.getitem and isinstance(source, fx.Node) and source in sizes and sizes[source].plain:
        return _entry(sizes[source], node.args[1])
    axes: dict[Axis, None] = {}
    for argument in node.all_input_nodes:
        argument_operand = operand_of(argument, names)
        read_from = sizes[argument].axes if argument in sizes else argument_operand.axes if argument_operand else ()
        axes |= dict.fromkeys(read_from)
    arithmetic = getattr(node.target, "__module__", "") in _ARITHMETIC and not isinstance(node.target, str)
    pure = arithmetic and all(argument in sizes and sizes[argument].pure for argument in node.all_input_nodes)
    return SizeRead(tuple(axes), plain=False, pure=pure) if axes else None


def _entry(read: SizeRead, index: Any) -> SizeRead:
    if isinstance(index, int):
        return SizeRead((read.axes[index],), plain=True, pure=True)
    if isinstance(index, slice) and not any(isinstance(e, fx.Node) for e in (index.start, index.stop, index.step)):
        return SizeRead(read.axes[index], plain=True, pure=True)
    return SizeRead(read.axes, plain=False)


def is_share(number: fx.Node, sizes: Mapping[fx.Node, SizeRead], count: int, size: int, width: int) -> bool:
    """Return whether code that computes a number from an axis's size gets the right number at every width of the block.

    Args:
        number: the node that the code computes.
        sizes: the result of :func:`read_sizes`.
        count: the number's value in the dense network, a count of channels.
        size: the axis's size in the dense network, a multiple of ``width``.
        width: the block's width in the dense network.
    """
    try:
        found = (abs(_at_width(number, sizes, size // width * kept)) * width for kept in range(1, width + 1))
        return all(n == count * kept for kept, n in enumerate(found, 1))
    except (ArithmeticError, ValueError):  # the code fails at some width
        return False


def _at_width(node: Any, sizes: Mapping[fx.Node, SizeRead], width: int) -> Any:
    """Return the value that a node, which is computed from one axis's size, has if this size is ``width``."""
    if not isinstance(node, fx.Node):
        return node
    if sizes[node].plain:
        return width
    return node.target(*(_at_width(argument, sizes, width) for argument in node.args))  # type: ignore[operator]
