"""Convert: apply a plan to the captured graph."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from vbpfx.errors import ArtifactError
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.graph.edit import finish, require_sizes
from vbpfx.plans.records import Plan
from vbpfx.rewrite.carry import carry
from vbpfx.rewrite.narrow import Removed, carried, gone, narrowed, new_biases, removed_channels, require_same_structure
from vbpfx.rules.layers import matrix_product
from vbpfx.rules.parts import split_axis
from vbpfx.rules.table import operator_of


def convert(captured: Captured, plan: Plan, *, share: bool = False) -> fx.GraphModule:
    """Return a new, smaller GraphModule without the removed neurons, whose constants are folded into the consumers.

    Every consumer gets W' = W[:, K] + W[:, P] B and b' = b + W[:, P] a, plus the plan's corrections. A bias is created
    if the layer had none.

    Args:
        captured: the dense graph. It is not changed.
        plan: the neurons to keep (K), and a and B, which replace the others (P).
        share: do not copy parameters that are not narrowed, but share them with the model. Use it for inference, or if
            the model hardly fits into memory. Buffers are never shared.

    Raises:
        ArtifactError: the plan was made for another model, or on a graph of another front end.
    """
    require_same_structure(captured.fingerprint, plan, captured.reference)
    if plan.frontend != captured.frontend:
        raise ArtifactError(
            f"the plan was made on a graph captured with frontend={plan.frontend!r}, this graph with {captured.frontend!r}: capture "
            f"the model with the same front end, or use apply_plan"
        )
    small = narrowed(captured.graph_module, plan, share)
    assert isinstance(small, fx.GraphModule)
    nodes = {node.name: node for node in small.graph.nodes}
    removed = removed_channels(plan)
    _state_sizes(nodes, plan, removed)
    _narrow_meta(small, removed)
    _state_scales(captured, nodes, plan)
    _pass_biases(small, nodes, plan)
    for name, (reduction, constants) in carried(plan).items():
        carry(small, nodes[name], reduction.kind, constants)
    require_sizes(small, captured)
    finish(small)
    return small


def _state_scales(captured: Captured, nodes: dict[str, fx.Node], plan: Plan) -> None:
    """Pass the dense network's scale to calls of attention that would compute another from the narrowed width."""
    for entry in plan.blocks:
        for factor in entry.block.factors:
            if factor.scales and factor.role == "query":
                width = captured.nodes[factor.source.node].meta["val"].shape[factor.source.axis]
                nodes[factor.node].update_kwarg("scale", 1.0 / math.sqrt(width))


def _state_sizes(nodes: dict[str, fx.Node], plan: Plan, removed: Removed) -> None:
    """Correct every number among the calls' arguments that counts channels of a narrowed axis."""
    found = (literal for entry in plan.blocks for literal in entry.block.literals if not literal.of_module)
    literals = {(literal.node, literal.path): literal for literal in found}
    for name in {node for node, _ in literals}:
        if operator_of(nodes[name]).takes_apart:
            _state_parts(nodes[name])
    for literal in literals.values():
        node, (field, *path) = nodes[literal.node], literal.path
        count = literal.stop - literal.start - gone(literal, removed)
        setattr(node, str(field), _replaced(getattr(node, str(field)), path, count))


def _state_parts(node: fx.Node) -> None:
    """Turn a chunk, or a split into parts of one size, into a split that states the size of every part."""
    dim = split_axis(node)
    if isinstance(node.target, torch._ops.OpOverload):
        node.target = torch.ops.aten.split_with_sizes.default
    else:
        node.target = "split" if node.op == "call_method" else torch.split
    source = node.all_input_nodes[0]
    node.args, node.kwargs = (source, [part.shape[dim] for part in node.meta["val"]], dim), {}


def _replaced(value: Any, path: list[str | int], count: int) -> Any:
    if not path:
        dense = value.meta["val"] if isinstance(value, fx.Node) else value
        return -count if dense < 0 else count  # a slice may count from the end
    head, *rest = path
    if isinstance(value, dict):
        return {k: _replaced(v, rest, count) if k == head else v for k, v in value.items()}
    if isinstance(value, slice):
        ends = {"start": value.start, "stop": value.stop}
        ends[str(head)] = _replaced(ends[str(head)], rest, count)
        return slice(ends["start"], ends["stop"], value.step)
    return _made_like(value, [_replaced(v, rest, count) if i == head else v for i, v in enumerate(value)])


def _made_like(value: Any, entries: list[Any]) -> Any:
    """Return the entries in a sequence of the same type as ``value``. Named tuples take them as separate arguments."""
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _narrow_meta(small: fx.GraphModule, removed: Removed) -> None:
    nodes = {node.name: node for node in small.graph.nodes}
    for (name, axis, of_parameter), positions in removed.items():
        if of_parameter:
            continue
        value = nodes[name].meta["val"]
        shape = list(value.shape)
        shape[axis] -= len(positions)
        with value.fake_mode:
            nodes[name].meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    tensors = named_tensors(small)
    for node in nodes.values():
        if node.op == "get_attr" and str(node.target) in tensors:
            node.meta["val"] = node.meta["val"].fake_mode.from_tensor(tensors[str(node.target)], static_shapes=True)
        if isinstance(node.meta.get("val"), (tuple, list)):
            taken = [user for user in node.users if user.target is operator.getitem and isinstance(user.args[1], int)]
            parts = {user.args[1]: user.meta["val"] for user in taken}
            node.meta["val"] = _made_like(node.meta["val"], [parts.get(i, v) for i, v in enumerate(node.meta["val"])])


def _pass_biases(small: fx.GraphModule, nodes: dict[str, fx.Node], plan: Plan) -> None:
    """Make the graph use the new biases: as an argument of a functional layer, as a sum behind a matrix product.

    A module needs no change, because it uses its own bias.
    """
    consumers = new_biases(plan)
    in_front = {name for name, c in consumers.items() if nodes[name].args[0] is not nodes[c.source.node]}
    for name, consumer in consumers.items():
        node = nodes[name]
        if node.op == "call_module":
            continue
        with small.graph.inserting_before(node):
            bias = small.graph.get_attr(consumer.bias)
        mode = node.meta["val"].fake_mode
        bias.meta["val"] = mode.from_tensor(small.get_parameter(consumer.bias), static_shapes=True)
        if operator_of(node).rule is matrix_product:
            _add_behind(small, node, bias, column=name in in_front)
        elif len(node.args) > 2:
            node.update_arg(2, bias)
        else:
            node.update_kwarg("bias", bias)


def _add_behind(small: fx.GraphModule, node: fx.Node, bias: fx.Node, *, column: bool) -> None:
    """Add the bias to a matrix product: x @ W + b, or W @ x + b[:, None] with ``column``, for a weight on the left."""
    with small.graph.inserting_after(bias):
        if column:
            upright = small.graph.call_function(torch.unsqueeze, (bias, -1))
            upright.meta["val"] = bias.meta["val"].unsqueeze(-1)
            bias = upright
    with small.graph.inserting_after(node):
        total = small.graph.call_function(torch.add, (node, bias))
    total.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
