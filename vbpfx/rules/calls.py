"""Calls in a graph: what is called, under which name, which operands are read, and which are changed."""

from __future__ import annotations

import inspect

import torch
from torch import fx, nn

from vbpfx.rules.axes import spelling
from vbpfx.rules.table import operator_of


def called_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None if it does not call a module."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def operands_read(node: fx.Node) -> list[fx.Node]:
    """Return the operands whose values a call reads, without one whose sizes, type or device alone it uses."""
    place = operator_of(node).form_of
    if place is None or place >= len(node.args):
        return node.all_input_nodes
    return [operand for operand in node.all_input_nodes if operand is not node.args[place]]


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a call changes its first operand in place, according to its name, its row or an argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = spelling(node)
    if (name.endswith("_") and not name.endswith("__")) or operator_of(node).in_place:
        return True
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature has no inplace argument either
        return False
    return bool(bound.arguments.get("inplace", False))


def describe(node: fx.Node, module: nn.Module | None) -> str:
    """Return the operator's name for messages."""
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else spelling(node)
