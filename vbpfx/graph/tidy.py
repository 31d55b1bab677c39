"""Normalise a traced graph: bring calls and arguments into one form, replace nodes by values, add and drop checks."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx._symbolic_trace import _assert_is_none

# The name that torch.export gives to the module with the guards on inputs.
INPUT_GUARDS = "_guards_fn"


def drop_input_checks(graph: fx.Graph) -> None:
    """Erase torch.export's checks of inputs, which do not affect the result, but bind the graph to one precision."""
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten._assert_tensor_metadata.default, INPUT_GUARDS) and not node.users:
            graph.erase_node(node)


_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_plain(value: Any) -> bool:
    """Return whether a graph can hold and compare a value: numbers, strings, dtypes, devices, containers of them."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    return isinstance(value, _PLAIN)


def require_constants(graph: fx.Graph, constants: Mapping[fx.Node, Any]) -> None:
    """Add checks that arguments which are not tensors have the values that tracing has fixed.

    Args:
        graph: the graph, which is changed in place.
        constants: placeholder -> the value with which it was traced. Values that are not plain data are not checked.
    """
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1] if inputs else None):
        for node, value in reversed(list(constants.items())):
            if not is_plain(value) or value != value:  # NaN equals nothing, so it cannot be checked
                continue
            why = (
                f"argument {node.target} was {value!r} when the network was captured, and the graph computes what the model does with "
                f"that: pass it again, or capture the model with the other value"
            )
            if value is None:
                graph.call_function(_assert_is_none, (node, why))
                continue
            checked = graph.call_function(torch._assert, (None, why))
            with graph.inserting_before(checked):
                checked.args = (graph.call_function(operator.eq, (node, value)), why)


def replace_by(node: fx.Node, value: Any) -> None:
    """Replace a node by a value, which may be or contain other nodes, and erase the node."""

    def replaced(argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: value if n is node else n)

    for user in list(node.users):
        user.args, user.kwargs = replaced(user.args), replaced(user.kwargs)
    node.graph.erase_node(node)


def follow_inputs(graph: fx.Graph, device: torch.device, names: Collection[Any]) -> None:
    """Make the graph create tensors on the device of its inputs, where tracing recorded the model's device.

    Args:
        device: the model's device.
        names: the names of the arguments that are tensors.
    """
    same = {device, torch.device(device.type)}
    nodes = [node for node in graph.nodes if same & set(filter(_is_device, (*node.args, *node.kwargs.values())))]
    inputs = graph.find_nodes(op="placeholder")
    given = next((node for node in inputs if node.target in names), None)
    if not nodes or given is None:
        return
    with graph.inserting_after(inputs[-1]):
        asked = graph.call_function(getattr, (given, "device"))
    for node in nodes:
        node.args = tuple(asked if _is_device(v) and v in same else v for v in node.args)
        node.kwargs = {name: asked if _is_device(v) and v in same else v for name, v in node.kwargs.items()}


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device)


# The positions of tensors among a call's arguments, by torch's argument names; and NumPy's argument names -> torch's.
_PLACES = {"input": 0, "tensors": 0, "other": 1, "mat2": 1}
_OF_ATTENTION = {"query": 0, "key": 1, "value": 2}
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def order_arguments(graph: fx.Graph) -> None:
    """Pass tensors as positional arguments in all calls, so that later code need not look at keyword arguments."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        places = _OF_ATTENTION if node.target is F.scaled_dot_product_attention else _PLACES
        while (name := next((n for n in kwargs if places.get(n) == len(args)), None)) is not None:
            args.append(kwargs.pop(name))
        if node.op == "call_method" or str(getattr(node.target, "__module__", "")).startswith(("torch", "None")):
            kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items()}
        node.args, node.kwargs = tuple(args), kwargs
