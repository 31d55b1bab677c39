"""In-place changes: find values that are read both before and after an in-place operator changes their memory.

A node's name stands for a value, but an in-place operator changes memory. So a name that is read before and after the
change stands for two different values, and statistics of it would mix them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx

from vbpfx.rules.calls import called_module, is_in_place
from vbpfx.rules.table import operator_of


def read_after_mutation(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """Find every node whose memory is changed by a later in-place call and that is read again after this call.

    Returns:
        node -> name of the in-place call. Views of the same memory count as the same value.
    """
    position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    part: dict[fx.Node, tuple[fx.Node, Any]] = {}  # a part of a chunk, split or unbind -> that call and the index
    aliases: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    found: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        module = called_module(graph_module, node)
        changes = source is not None and isinstance(node.meta.get("val"), Tensor) and is_in_place(node, module)
        root[node] = node
        if source is not None and (changes or operator_of(node, module).view):
            root[node] = root[source]
            if source in part:
                part[node] = part[source]
            elif operator_of(source).takes_apart and isinstance(index := node.args[1], int):
                part[node] = (source, index % len(source.meta["val"]))
        if changes:
            for alias in aliases[root[node]]:
                if not _apart(part.get(alias), part.get(node)) and any(
                    position[u] > position[node] for u in alias.users
                ):
                    found[alias] = node.name
        aliases[root[node]].append(node)
    return found


def _apart(a: tuple[fx.Node, Any] | None, b: tuple[fx.Node, Any] | None) -> bool:
    """Return whether two views are different parts of the same chunk, split or unbind, so that they share no memory."""
    return a is not None and b is not None and a[0] is b[0] and a[1] != b[1]


def changed_by(node: fx.Node, graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the values whose memory a call changes in place: its first operand, and what this is a view of."""
    changed: list[fx.Node] = []
    operand = node.args[0] if node.args else None
    if is_in_place(node, called_module(graph_module, node)):
        while isinstance(operand, fx.Node):
            changed.append(operand)
            view = operator_of(operand, called_module(graph_module, operand)).view
            operand = operand.args[0] if view and operand.args else None
    return changed
