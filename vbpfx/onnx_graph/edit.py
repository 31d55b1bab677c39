"""Edit an ONNX graph: replace tensors, insert nodes, and clean up at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from vbpfx.onnx_graph.builder import Array, FileTensor

# The first IR version in which initializers need not be listed among the inputs.
_INITIALIZERS_ALONE = 4


class OnnxEdit:
    """An ONNX graph that is being edited. Call :meth:`finish` after the last edit."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        graphs = [self.graph, *self.graph.subgraphs()]
        values = [
            *(value for graph in graphs for value in graph.inputs),
            *(out for node in self.graph.all_nodes() for out in node.outputs),
        ]
        self._names = {str(value.name) for value in values} | {name for graph in graphs for name in graph.initializers}

    def free_name(self, name: str) -> str:
        """Return the name, with a number added if it is taken."""
        taken, number = name, 1
        while taken in self._names:
            number += 1
            taken = f"{name}_{number}"
        self._names.add(taken)
        return taken

    def store(self, name: str, array: Array) -> ir.Value:
        """Add an initializer and return its value."""
        name = self.free_name(name)
        tensor = _tensor(name, array)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def replace(self, stored: FileTensor, array: Array) -> None:
        """Replace the tensor at the node inputs that a parameter stands for; other readers keep the old tensor."""
        value, uses = stored.value, set(stored.uses)
        name = str(value.name)
        if stored.cast is not None:
            uses = {(self._own_cast(stored.cast, uses), 0)}
        if value.is_graph_output() or {(use.node, use.idx) for use in value.uses()} != uses:
            new = self.store(f"{name}_narrow", array)
            for node, index in uses:
                node.replace_input_with(index, new)
            return
        tensor = _tensor(name, array)
        producer = value.producer()
        if producer is None:
            value.const_value = tensor
        else:
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", tensor)
        value.shape = ir.Shape(array.shape)

    def _own_cast(self, cast: ir.Node, uses: Collection[tuple[ir.Node, int]]) -> ir.Node:
        """Return a Cast of the same tensor that only these inputs read: the given one, or a new one."""
        read = cast.outputs[0]
        if not read.is_graph_output() and {(use.node, use.idx) for use in read.uses()} == uses:
            return cast
        made = ir.Value(name=self.free_name(f"{read.name}_narrow"), type=read.type)
        name = self.free_name(f"{made.name}_node")
        own = ir.Node("", "Cast", [cast.inputs[0]], list(cast.attributes.values()), outputs=[made], name=name)
        self.graph.insert_after(cast, own)
        for node, index in uses:
            node.replace_input_with(index, made)
        return own

    def insert(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int
    ) -> ir.Value:
        """Insert a new node in front of ``before`` and return its output."""
        made = ir.Value(name=self.free_name(name))
        listed = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        self.graph.insert_before(
            before, ir.Node("", op_type, inputs, listed, outputs=[made], name=self.free_name(f"{name}_node"))
        )
        return made

    def replace_value(self, node: ir.Node, make: Callable[[ir.Node], ir.Value]) -> None:
        """Replace a node's first output for all its readers.

        Args:
            make: is given a node, inserts new nodes in front of it, and returns the new value. It may read the old
                value.
        """
        value = node.outputs[0]
        readers = list(value.uses())
        mark = ir.Node("", "Identity", [value])
        self.graph.insert_after(node, mark)
        new = make(mark)
        self.graph.remove(mark, safe=True)
        for use in readers:
            use.node.replace_input_with(use.idx, new)
        new.type, new.shape = value.type, value.shape
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = new
                new.name, value.name = value.name, new.name

    def set_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Set an input of a node, which need not have had this input before."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def finish(self, keep: Collection[ir.Node] = ()) -> None:
        """Remove unused nodes, and infer the shapes of all values anew.

        Args:
            keep: nodes whose outputs keep their recorded shapes, because shape inference does not know their operators.
        """
        RemoveUnusedNodesPass()(self.model)
        self.model.ir_version = max(self.model.ir_version, _INITIALIZERS_ALONE)
        kept = {*self.graph.inputs, *self.graph.outputs, *self.graph.initializers.values()}
        for node in self.graph:
            for output in node.outputs:
                if output not in kept and node not in keep:
                    output.shape = None
        stated = {output: output.shape for output in self.graph.outputs}
        ShapeInferencePass()(self.model)
        for output, shape in stated.items():  # the pass gives names to open axes; the outputs keep their own
            output.shape = shape


def _tensor(name: str, array: Array) -> ir.TensorProtocol:
    """Return the array as an ONNX tensor. An array that is not contiguous is copied only while it is written."""
    if array.flags.c_contiguous:
        return ir.tensor(array, name=name)
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(array), name=name),
        dtype=ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
    )
