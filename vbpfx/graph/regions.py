"""Handle regions of a model's code that run under a setting: autocast, or gradients switched on or off.

A graph holds calls, but no settings. If a region's setting changes no value, its calls become part of the graph. A
region in which autocast computes in another precision is refused, because the graph would compute something else.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import fx

from vbpfx.errors import CaptureError
from vbpfx.graph.source import line_of_node
from vbpfx.graph.tidy import replace_by


class AutocastRegionError(CaptureError):
    """A region of the model's code runs in autocast, which no front end can capture."""


def autocast_state(devices: Collection[str]) -> dict[str, torch.dtype]:
    """Return device type -> the precision of autocast on it, for the devices on which autocast is switched on now."""
    known = filter(torch.amp.is_autocast_available, devices)
    return {device: torch.get_autocast_dtype(device) for device in known if torch.is_autocast_enabled(device)}


def autocast_devices(device: torch.device) -> frozenset[str]:
    """Return the device types whose autocast changes what the model computes.

    A model on the meta device has no values yet. It may later run on the CPU or on a GPU, so both are returned.
    """
    return frozenset({"cpu", "cuda"} if device.type == "meta" else {device.type})


def refuse_autocast(inside: dict[str, torch.dtype], place: str = "") -> NoReturn:
    """Raise the error for an autocast region, which says what to remove.

    Args:
        inside: the :func:`autocast_state` in the region.
        place: the line of code, or "" if it is not known.
    """
    if inside:
        precision = " and ".join(
            f"torch.autocast({d!r}, dtype={t}), which computes its layers in {str(t).removeprefix('torch.')}"
            for d, t in inside.items()
        )
    else:
        precision = "torch.autocast(enabled=False) while capture itself was called in torch.autocast"
    raise AutocastRegionError(
        f"a part of the model's forward runs in {precision}; a graph has no such regions, so the result would not compute what the "
        f"model does. Take the autocast region out of forward, prune the model in the precision of its weights, and put "
        f"torch.autocast around the calls of the result" + (f"\n    at {place}" if place else "")
    )


# Operators for regions under one of these settings, and for regions marked for checkpointing or for compilers -> the
# index of the argument that is the region's graph.
_SUBGRAPH_AT = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1, "invoke_subgraph": 0, "wrap": 0,
                "wrap_activation_checkpoint": 0, "tag_activation_checkpoint": 0}  # fmt: skip


def inline_regions(graph_module: fx.GraphModule, devices: Collection[str]) -> None:
    """Replace every region whose setting changes no value by the calls inside it.

    Args:
        graph_module: the graph, which is changed in place.
        devices: the device types from :func:`autocast_devices`.

    Raises:
        AutocastRegionError: a region computes in another precision on one of the devices.
    """
    graph = graph_module.graph
    while (node := next((n for n in graph.nodes if _name(n) in _SUBGRAPH_AT), None)) is not None:
        name = _name(node)
        if name == "wrap_with_autocast":
            _require_no_effect(node, graph_module, devices)
        _inline(graph_module, node, _SUBGRAPH_AT[name])
    for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        graph.erase_node(node)


def _name(node: fx.Node) -> str:
    """Return the name of a node's higher-order operator, or "" for any other node."""
    return str(node.target.__name__) if isinstance(node.target, torch._ops.HigherOrderOperator) else ""


def _region(graph_module: fx.GraphModule, reference: Any) -> fx.GraphModule:
    """Return the region's graph that a get_attr node refers to."""
    found = graph_module.get_submodule(str(reference.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _require_no_effect(node: fx.Node, graph_module: fx.GraphModule, devices: Collection[str]) -> None:
    given: tuple[Any, ...] = node.args
    device, dtype, enabled = given[:3]
    outside = autocast_state(devices)
    inside = {d: t for d, t in outside.items() if d != device}
    if enabled and device in devices:
        inside[str(device)] = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))
    if inside != outside:
        calls = _region(graph_module, node.args[_SUBGRAPH_AT["wrap_with_autocast"]]).graph.nodes
        refuse_autocast(inside, next(filter(None, map(line_of_node, [*calls, node])), ""))


def _inline(graph_module: fx.GraphModule, node: fx.Node, at: int) -> None:
    """Replace a node that runs a region by the calls of the region's graph, which is its argument at index ``at``."""
    graph, reference = graph_module.graph, node.args[at]
    assert isinstance(reference, fx.Node)
    region = _region(graph_module, reference)
    operands = node.args[at + 1 + (_name(node) == "invoke_subgraph") :]
    values: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=True))
    result: Any = None
    with graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = fx.map_arg(inner.args[0], values.__getitem__)
                continue
            values[inner] = graph.node_copy(inner, values.__getitem__)
            if inner.op in ("get_attr", "call_module"):
                values[inner].target = f"{reference.target}.{inner.target}"
    for user in list(node.users):
        if user.target is operator.getitem and not isinstance(result, fx.Node):
            replace_by(user, result[user.args[1]])
    replace_by(node, result)
    if not reference.users:
        graph.erase_node(reference)
