"""Replace every If with a constant condition by the branch that it takes, as ONNX Runtime does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

# Operators that may stand between a constant condition and the If that reads it.
_OF_CONDITIONS: dict[str, Callable[[bool], bool]] = {"Identity": bool, "Cast": bool, "Not": lambda value: not value}


def take_constant_branches(model: ir.Model) -> None:
    """Replace every If that always takes the same branch, including nested ones, by that branch."""
    names = Counter(str(value.name) for graph in model.graphs() for value in _values(graph))
    while pending := [(n, c) for n in model.graph if n.op_type == "If" and (c := _constant(n.inputs[0])) is not None]:
        for node, condition in pending:
            _take(model.graph, node, node.attributes["then_branch" if condition else "else_branch"].as_graph(), names)


def _constant(value: ir.Value | None) -> bool | None:
    """Return the value of a constant condition, or None if the condition is computed."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type in _OF_CONDITIONS and producer.domain in ("", "ai.onnx"):
        found = _constant(producer.inputs[0])
        return None if found is None else _OF_CONDITIONS[producer.op_type](found)
    tensor = get_const_tensor(value)
    return bool(np.asarray(tensor.numpy()).reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]


def _take(graph: ir.Graph, node: ir.Node, branch: ir.Graph, names: Counter[str]) -> None:
    """Move a branch's nodes and weights in front of its If, and let the readers of the If read the branch's outputs."""
    results = list(branch.outputs)
    for value in list(branch.initializers.values()):
        branch.initializers.pop(str(value.name))
        _rename(value, names)
        graph.register_initializer(value)
    for inner in list(branch):
        branch.remove(inner)
        graph.insert_before(node, inner)
        for value in inner.outputs:
            if value.name:
                _rename(value, names)
    for made, result in zip(node.outputs, results, strict=True):
        copy = ir.Node("", "Identity", [result], outputs=[ir.Value(name=made.name, type=made.type, shape=made.shape)])
        graph.insert_before(node, copy)
        for use in list(made.uses()):
            use.node.replace_input_with(use.idx, copy.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is made:
                graph.outputs[index] = copy.outputs[0]
    graph.remove(node, safe=True)


def _rename(value: ir.Value, names: Counter[str]) -> None:
    """Rename a value of a branch if its name is not unique; two branches may use the same names."""
    name, number = str(value.name), 1
    if names[name] == 1:
        return
    while f"{name}_{number}" in names:
        number += 1
    value.name = f"{name}_{number}"
    names[value.name] += 1
