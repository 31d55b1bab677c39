"""Residual sums: where a layer's output is added to the residual stream.

They are found from the graph's structure. A path leads from a layer's output y through views, scales and dropout to a
sum z = stream + s * P y + c, whose other operand was computed before the layer ran. P rearranges entries, s scales them
one by one, and c shifts them. To change the sum z by w, change the layer's output y by P^T (w / s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vbpfx.graph.capture import Captured
from vbpfx.reconstruction.stream import Stream
from vbpfx.rules.calls import called_module
from vbpfx.rules.table import operator_of


@dataclass(frozen=True)
class ResidualSum:
    """The place where a layer's output is added to the residual stream.

    Attributes:
        stream: name of the node that the layer's output is added to.
        way: names of the nodes between the layer and the sum, in order; empty if all of them return their operand
            unchanged.
    """

    stream: str
    way: tuple[str, ...]


def find_residual_sum(captured: Captured, layer: str) -> ResidualSum | None:
    """Return the residual sum that alone reads a layer's output; None if there is none, or there are other readers.

    Args:
        layer: name of the node that calls the layer.
    """
    start = node = captured.nodes[layer]
    way: list[str] = []
    while True:
        users = [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]
        if len(users) != 1:
            return None
        user = users[0]
        if (stream := _other_operand(user, node)) is not None:
            while stream > start and _hands_on(captured, stream):
                stream = stream.all_input_nodes[0]
            hands_on = all(_hands_on(captured, captured.nodes[name]) for name in way)
            return ResidualSum(stream.name, () if hands_on else tuple(way)) if stream < start else None
        if not _is_affine(captured, user, node):
            return None
        way.append(user.name)
        node = user


def pull_back(stream: Stream, batch: int, layer: str, residual: ResidualSum, y: Tensor, wish: Tensor) -> Tensor | None:
    """Return the change of the layer's output y that changes the residual sum by ``wish``.

    Return None if it cannot be computed: a value on the path to the sum is not there yet, or has no derivative.
    """
    if not residual.way:
        return wish
    run = stream.runs[batch]

    def along(value: Tensor) -> Tensor:
        before = stream.nodes[layer]
        for name in residual.way:
            node = stream.nodes[name]
            known = {before: value} | {n: run.env[n] for n in node.all_input_nodes if n in run.env and n is not before}
            saved, run.env = run.env, known
            try:
                for n in node.all_input_nodes:
                    _compute(run, n)
                value = run.run_node(node)
            finally:
                run.env = saved
            before = node
        return value

    try:
        with torch.enable_grad():
            at = y.detach().clone().requires_grad_()
            z = along(at)
            with torch.no_grad():
                scale = along(torch.ones_like(y)) - along(torch.zeros_like(y))
            # vjp(w) = P^T (s w), and vjp(s 1) = P^T s^2
            (numerator,) = torch.autograd.grad(z, at, wish.to(z), retain_graph=True)
            (denominator,) = torch.autograd.grad(z, at, scale)
    except (KeyError, RuntimeError):  # a value is not computed yet, or an operator writes into its operand
        return None
    return torch.where(denominator.abs() > 1e-12, numerator / denominator, 0.0)


def _compute(run: fx.Interpreter, node: fx.Node) -> None:
    """Compute a node's value if it depends on parameters alone and is not there yet."""
    if node not in run.env and _of_parameters(node):
        for n in node.all_input_nodes:
            _compute(run, n)
        run.env[node] = run.run_node(node)


def _of_parameters(node: fx.Node) -> bool:
    """Return whether a node's value depends on parameters alone, and not on the model's inputs."""
    return node.op == "get_attr" or (
        node.op in ("call_function", "call_method") and all(map(_of_parameters, node.all_input_nodes))
    )


def _hands_on(captured: Captured, node: fx.Node) -> bool:
    """Return whether a call returns its only operand unchanged in eval mode."""
    return operator_of(node, called_module(captured.graph_module, node)).hands_on


def _other_operand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return what ``user`` adds to ``node``; None if ``user`` is not a plain sum of two tensors of the same shape."""
    if operator_of(user).joins != "addition":
        return None
    if len(user.all_input_nodes) != 2 or len(user.args) != 2 or user.kwargs:
        return None
    (other,) = (n for n in user.all_input_nodes if n is not node)
    shapes = [v.shape if isinstance(v := n.meta.get("val"), Tensor) else None for n in (user, node, other)]
    return other if None not in shapes and len(set(shapes)) == 1 else None


def _is_affine(captured: Captured, user: fx.Node, node: fx.Node) -> bool:
    """Return whether a call maps every entry of a node's value to one entry of its own, by a scale and a shift."""
    operator = operator_of(user, called_module(captured.graph_module, user))
    if operator.scales:
        others = [n for n in user.all_input_nodes if n is not node]
        return all(map(_of_parameters, others)) and (user.args[0] is node or operator.joins == "product")
    return (operator.affine or operator.hands_on or operator.view) and user.args[0] is node
