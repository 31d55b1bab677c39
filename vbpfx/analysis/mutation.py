"""In-place changes: find values that are read both before and after an in-place operator changes their memory.

A node's name stands for a value, but an in-place operator changes memory. So a name that is read before and after the
change stands for two different values, and statistics of it would mix them.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from vbpfx.rules.axes import spelling
from vbpfx.rules.ops import called_module, is_view, takes_apart


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
        if source is not None and (changes or is_view(node, module)):
            root[node] = root[source]
            if source in part:
                part[node] = part[source]
            elif takes_apart(source) and isinstance(index := node.args[1], int):
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
    if node.target is operator.setitem or is_in_place(node, called_module(graph_module, node)):
        while isinstance(operand, fx.Node):
            changed.append(operand)
            view = is_view(operand, called_module(graph_module, operand))
            operand = operand.args[0] if view and operand.args else None
    return changed


def is_in_place(node: fx.Node, module: Any) -> bool:
    """Return whether a call changes its first operand in place."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = spelling(node)
    if name.endswith("_") and not name.endswith("__"):
        return True
    if getattr(node.target, "__module__", "") == "_operator":
        return name in ("iadd", "isub", "imul", "itruediv", "ipow")
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature has no inplace argument either
        return False
    return bool(bound.arguments.get("inplace", False))
