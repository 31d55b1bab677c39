"""A plan carried out on the ONNX graph: the tensors of the narrowed fx graph under their names in the file, and the numbers.

Everything that the plan does not touch stays as it was: names, opset, metadata, the operators and their order. A tensor that
several layers share and that is narrowed for some of them is stored anew for these.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from torch import Tensor, fx

from vbpfx.capture import Captured, named_tensors
from vbpfx.errors import ExportError
from vbpfx.narrow import new_biases
from vbpfx.onnx_graph.builder import Array, Place, Stored
from vbpfx.onnx_graph.importer import Imported
from vbpfx.records import Consumer, Plan


def rewrite(model: ir.Model, imported: Imported, captured: Captured, plan: Plan, small: fx.GraphModule) -> None:
    """Narrow the model that was imported, in place.

    Args:
        small: the narrowed fx graph, which shares with the dense one what is not narrowed.

    Raises:
        ExportError: a number that has to change is stated in a way that is not understood.
    """
    file = _File(model)
    dense, narrow = named_tensors(captured.graph_module), named_tensors(small)
    for name, stored in imported.stored.items():
        if name in dense and not _same(dense[name], narrow[name]):
            file.replace(stored, _as_stored(narrow[name], stored))
    _state_sizes(file, imported, captured, plan, small)
    for name, consumer in new_biases(plan).items():
        _add_bias(file, imported, captured.nodes[name], consumer, narrow[consumer.bias])
    file.finish()


def _same(dense: Tensor, narrow: Tensor) -> bool:
    return narrow is dense or (narrow.shape == dense.shape and bool((narrow == dense).all()))


def _as_stored(tensor: Tensor, stored: Stored) -> Array:
    array = tensor.detach().cpu().numpy()
    if stored.layout == "transposed":
        return array.T
    if stored.layout == "flat":
        shape = stored.value.shape
        ahead = len(shape) - 1 if shape is not None else 0
        return array.reshape(*[1] * ahead, -1)
    return array


class _File:
    """The ONNX graph under change."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        values = [*self.graph.inputs, *(out for node in self.graph for out in node.outputs)]
        self._names = {str(value.name) for value in values} | set(self.graph.initializers)

    def free_name(self, name: str) -> str:
        taken, number = name, 1
        while taken in self._names:
            number += 1
            taken = f"{name}_{number}"
        self._names.add(taken)
        return taken

    def store(self, name: str, array: Array) -> ir.Value:
        """A new initializer."""
        name = self.free_name(name)
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def replace(self, stored: Stored, array: Array) -> None:
        """Another tensor for the inputs that a parameter stands for."""
        value, uses = stored.value, set(stored.uses)
        name = str(value.name)
        if value.is_graph_output() or {(use.node, use.idx) for use in value.uses()} != uses:
            new = self.store(f"{name}_narrow", array)
            for node, index in uses:
                node.replace_input_with(index, new)
            return
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        producer = value.producer()
        if producer is None:
            value.const_value = tensor
        else:
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", tensor)
        value.shape = ir.Shape(array.shape)

    def insert(self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str) -> ir.Value:
        """A new node in front of another."""
        node = ir.Node(
            "", op_type, inputs, outputs=[ir.Value(name=self.free_name(name))], name=self.free_name(f"{name}_node")
        )
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def add_behind(self, node: ir.Node, addend: ir.Value) -> None:
        """A sum that takes the place of a node's value, for whoever reads it."""
        value = node.outputs[0]
        total = ir.Value(name=self.free_name(f"{value.name}_biased"), type=value.type, shape=value.shape)
        readers = list(value.uses())
        addition = ir.Node("", "Add", [value, addend], outputs=[total], name=self.free_name(f"{node.name}_bias"))
        self.graph.insert_after(node, addition)
        for use in readers:
            use.node.replace_input_with(use.idx, total)
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = total
                total.name, value.name = value.name, total.name

    def finish(self) -> None:
        """Nothing that is unused, and shapes that are true."""
        RemoveUnusedNodesPass()(self.model)
        kept = {*self.graph.inputs, *self.graph.outputs, *self.graph.initializers.values()}
        for node in self.graph:
            for output in node.outputs:
                if output not in kept:
                    output.shape = None
        ShapeInferencePass()(self.model)


def _state_sizes(file: _File, imported: Imported, captured: Captured, plan: Plan, small: fx.GraphModule) -> None:
    """Make every number in the file that counts channels true again."""
    narrowed = {node.name: node for node in small.graph.nodes}
    changes: dict[tuple[ir.Node, int], dict[int, int]] = defaultdict(dict)
    for entry in plan.blocks:
        for literal in entry.block.literals:
            before, after = (_at(nodes[literal.node], literal.path) for nodes in (captured.nodes, narrowed))
            if before == after:
                continue
            place = imported.places.get((literal.node, literal.path), ...)
            match place:
                case None:
                    continue
                case Place(node=node, where=str(name)):
                    node.attributes[name] = ir.AttrInt64(name, after)
                case Place(node=node, where=int(where), index=index):
                    changes[node, where][index] = after - before
                case _:
                    raise ExportError(
                        f"the size that {literal.node} states has no place in the file; leave block {entry.block.name} out"
                    )
    for (node, where), differences in changes.items():
        if where >= len(node.inputs) or node.inputs[where] is None:  # a Split without sizes
            fx_node = next(n for n in narrowed.values() if imported.made_by.get(n.name, (None,))[0] is node)
            sizes: Any = fx_node.args[1]
            node.attributes.pop("num_outputs", None)
            _set_input(node, where, file.store(f"{node.name}_sizes", np.array(sizes, np.int64)))
            continue
        _change(file, node, where, differences)


def _change(file: _File, node: ir.Node, where: int, differences: dict[int, int]) -> None:
    """Other numbers in a node's input: a new constant where it is one, a sum where it is computed."""
    value = node.inputs[where]
    assert value is not None
    array = _constant(value)
    if array is not None:
        new = np.array(array)
        for index, difference in differences.items():
            new.reshape(-1)[index] += difference
        node.replace_input_with(where, file.store(f"{value.name}_narrow", new))
        return
    length = max(differences) + 1 if value.shape is None or value.shape.is_dynamic() else int(value.shape[0])  # type: ignore[arg-type]
    delta = np.zeros(length, np.int64)
    for index, difference in differences.items():
        delta[index] = difference
    addend = file.store(f"{value.name}_difference", delta)
    node.replace_input_with(where, file.insert(node, "Add", [value, addend], f"{value.name}_narrow"))


def _constant(value: ir.Value) -> Array | None:
    producer = value.producer()
    if producer is None:
        return None if value.const_value is None else value.const_value.numpy()
    if producer.op_type != "Constant":
        return None
    attribute = next(iter(producer.attributes.values()))
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value.numpy()  # type: ignore[no-any-return]
    return np.array(attribute.value, np.int64)


def _at(node: fx.Node, path: tuple[str | int, ...]) -> Any:
    """The number that stands at a path among a call's arguments."""
    found: Any = getattr(node, str(path[0]))
    for step in path[1:]:
        found = getattr(found, str(step)) if isinstance(found, slice) else found[step]
    return found


def _add_bias(file: _File, imported: Imported, layer: fx.Node, consumer: Consumer, bias: Tensor) -> None:
    """A bias for a layer that has none."""
    node, array = imported.made_by[layer.name][0], bias.detach().cpu().numpy()
    scale = node.attributes.get("alpha")
    takes_bias = node.op_type in ("Conv", "Gemm") and (len(node.inputs) < 3 or node.inputs[2] is None)
    if takes_bias and (scale is None or scale.value == 1):
        node.attributes.pop("beta", None)
        _set_input(node, 2, file.store(consumer.bias, array))
        return
    in_front = layer.args[0].name != consumer.source.node  # type: ignore[union-attr]
    array = array[:, None] if in_front else array
    if scale is not None:
        array = (array * np.float64(scale.value)).astype(array.dtype)
    file.add_behind(node, file.store(consumer.bias, array))


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
