"""Apply a plan to the ONNX graph: write back the narrowed fx graph's tensors, and correct the sizes in the file.

Everything that the plan does not touch stays as it was: names, opset, metadata, the operators and their order. If
several layers share a tensor and only some of them are narrowed, these get a copy of their own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, fx

from vbpfx.errors import ExportError
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.onnx_graph.builder import Array, FileTensor, StatedNumber, constant_of
from vbpfx.onnx_graph.carried import carry
from vbpfx.onnx_graph.edit import OnnxEdit
from vbpfx.onnx_graph.importer import Imported
from vbpfx.plans.records import Consumer, Plan, SizeLiteral
from vbpfx.rewrite.narrow import carried, new_biases


def rewrite(model: ir.Model, imported: Imported, captured: Captured, plan: Plan, small: fx.GraphModule) -> None:
    """Narrow the imported ONNX model, in place.

    Args:
        small: the narrowed fx graph. It shares the tensors that are not narrowed with the dense one.

    Raises:
        ExportError: a size that has to change cannot be changed in the file.
    """
    if carried(plan):
        ShapeInferencePass()(model)  # the corrections of statistics need to know their precision
    file = OnnxEdit(model)
    dense, narrow = named_tensors(captured.graph_module), named_tensors(small)
    for name, stored in imported.stored.items():
        if name in dense and not _same(dense[name], narrow[name]):
            file.replace(stored, _as_stored(narrow[name], stored))
    _state_sizes(file, imported, captured, plan, small)
    for name, consumer in new_biases(plan).items():
        array = narrow[consumer.bias].detach().cpu().numpy()
        array = array.astype(precision_of(imported, consumer), copy=False)
        _add_bias(file, imported, captured.nodes[name], consumer, array)
    for name, (reduction, constants) in carried(plan).items():
        carry(file, imported.made_by[name][0], reduction.kind, constants)
    file.finish(keep={node for nodes in imported.strange.values() for node in nodes})


def round_as_stored(imported: Imported, plan: Plan, small: fx.GraphModule) -> None:
    """Round the narrowed graph's tensors in place to the precision in which the file stores them.

    Raises:
        ExportError: a value is outside the range of float16.
    """
    narrow = named_tensors(small)
    halves = [name for name, stored in imported.stored.items() if stored.dtype == np.float16 and name in narrow]
    halves += [c.bias for c in new_biases(plan).values() if precision_of(imported, c) == np.float16]
    for name in halves:
        rounded = narrow[name].detach().half().to(narrow[name].dtype)
        if not bool(rounded.isfinite().all()):
            raise ExportError(
                f"{name} overflows float16 once the removed neurons are folded into it; prune the file in float32, and "
                f"convert the result"
            )
        if not _same(narrow[name], rounded):
            narrow[name].data.copy_(rounded)


def precision_of(imported: Imported, consumer: Consumer) -> np.dtype[Any]:
    """Return the precision in which the file computes a layer."""
    stored = imported.stored.get(consumer.weight)
    return np.dtype(np.float32) if stored is None else stored.computed


def _same(dense: Tensor, narrow: Tensor) -> bool:
    return narrow is dense or (narrow.shape == dense.shape and bool((narrow == dense).all()))


def _as_stored(tensor: Tensor, stored: FileTensor) -> Array:
    array = tensor.detach().cpu().numpy().astype(stored.dtype, copy=False)
    if stored.layout == "transposed":
        return array.T
    if stored.layout == "flat":
        return array.reshape(*stored.shape[:-1], -1)
    return array


def _state_sizes(file: OnnxEdit, imported: Imported, captured: Captured, plan: Plan, small: fx.GraphModule) -> None:
    """Correct every number in the file that counts channels of a narrowed axis."""
    narrowed = {node.name: node for node in small.graph.nodes}
    changes: dict[tuple[ir.Node, int, int], dict[int, int]] = defaultdict(dict)
    for entry in plan.blocks:
        for literal in entry.block.literals:
            place = imported.places.get((literal.node, literal.path), ...)
            if place is None or literal.of_module:
                continue
            before, after = (_at(nodes[literal.node], literal.path) for nodes in (captured.nodes, narrowed))
            if before == after:
                continue
            if isinstance(before, fx.Node):
                _state_computed(file, literal, place, after)
                continue
            match place:
                case StatedNumber(node=node, where=str(name)):
                    node.attributes[name] = ir.AttrInt64(name, after)
                case StatedNumber(node=node, where=int(where), index=index, length=length):
                    changes[node, where, length][index] = after - before
                case _:
                    raise ExportError(
                        f"node {literal.node} states a number of channels that cannot be changed in the file; leave the block out with "
                        f"exclude={entry.block.name!r}"
                    )
    for (node, where, length), differences in changes.items():
        if where >= len(node.inputs) or node.inputs[where] is None:  # a Split without stated sizes
            fx_node = next(n for n in narrowed.values() if imported.made_by.get(n.name, (None,))[0] is node)
            sizes: Any = fx_node.args[1]
            node.attributes.pop("num_outputs", None)
            file.set_input(node, where, file.store(f"{node.name}_sizes", np.array(sizes, np.int64)))
            continue
        _change(file, node, where, length, differences)


def _state_computed(file: OnnxEdit, literal: SizeLiteral, place: Any, number: int) -> None:
    """Replace a number that the file computes from a narrowed size by a constant."""
    match place:
        case StatedNumber(node=node, where=int(where), length=1):
            value = node.inputs[where]
            assert value is not None
            node.replace_input_with(where, file.store(f"{value.name}_narrow", np.array([number], np.int64)))
        case _:
            raise ExportError(
                f"node {literal.node} computes a number of channels together with other numbers, so it cannot be replaced in "
                f"the file; leave its block out with exclude="
            )


def _change(file: OnnxEdit, node: ir.Node, where: int, length: int, differences: dict[int, int]) -> None:
    """Change numbers in a node's input: a constant is replaced, and to a computed value the difference is added."""
    value = node.inputs[where]
    assert value is not None
    array = constant_of(value)
    if array is not None:
        new = np.array(array)
        for index, difference in differences.items():
            new.reshape(-1)[index] += difference
        node.replace_input_with(where, file.store(f"{value.name}_narrow", new))
        return
    delta = np.zeros(length, np.int64)
    for index, difference in differences.items():
        delta[index] = difference
    addend = file.store(f"{value.name}_difference", delta)
    node.replace_input_with(where, file.insert(node, "Add", [value, addend], f"{value.name}_narrow"))


def _at(node: fx.Node, path: tuple[str | int, ...]) -> Any:
    """Return the number at a path among a call's arguments."""
    found: Any = getattr(node, str(path[0]))
    for step in path[1:]:
        found = getattr(found, str(step)) if isinstance(found, slice) else found[step]
    return found


def _add_bias(file: OnnxEdit, imported: Imported, layer: fx.Node, consumer: Consumer, array: Array) -> None:
    """Add a bias to a layer that has none."""
    node = imported.made_by[layer.name][0]
    scale = node.attributes.get("alpha")
    takes_bias = node.op_type in ("Conv", "Gemm", "FusedConv", "FusedGemm") and (
        len(node.inputs) < 3 or node.inputs[2] is None
    )
    if takes_bias and (scale is None or scale.value == 1):
        node.attributes.pop("beta", None)
        file.set_input(node, 2, file.store(consumer.bias, array))
        return
    in_front = layer.args[0].name != consumer.source.node  # type: ignore[union-attr]
    array = array[:, None] if in_front else array
    if scale is not None:
        array = (array * np.float64(scale.value)).astype(array.dtype)
    addend = file.store(consumer.bias, array)
    value = node.outputs[0]
    file.replace_value(node, lambda before: file.insert(before, "Add", [value, addend], f"{value.name}_biased"))
