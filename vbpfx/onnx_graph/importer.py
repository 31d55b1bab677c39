"""An ONNX graph as an executable torch.fx graph whose calls the operator table knows.

Nothing is traced: every ONNX node becomes the torch function or functions that compute the same, and the initializers become
parameters in the file's own memory. An operator that stands in no table is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from vbpfx.errors import CaptureError, VbpfxError, first_line
from vbpfx.fake import sentinel
from vbpfx.onnx_graph.builder import Builder, Constant, Path, Place, Sizes, Stored, Value, constant_of
from vbpfx.onnx_graph.elementwise import ELEMENTWISE
from vbpfx.onnx_graph.file import opset_of
from vbpfx.onnx_graph.layers import LAYERS
from vbpfx.onnx_graph.reductions import REDUCTIONS
from vbpfx.onnx_graph.shapes import SHAPES
from vbpfx.onnx_graph.sizes import SIZE_OPERATORS, count, shape, takes_sizes

_OPERATORS: Mapping[str, Callable[[Builder], Any]] = {
    **ELEMENTWISE,
    **LAYERS,
    **SHAPES,
    **REDUCTIONS,
    "Shape": shape,
    "Size": count,
}
# Operators of other domains than ONNX's own that stand in the table.
_CONTRIBUTED = {
    "com.microsoft": {"Gelu", "FastGelu", "BiasGelu", "QuickGelu"},
    "ai.onnx.ml": {"ArrayFeatureExtractor"},
}


@dataclass(frozen=True)
class Imported:
    """What an ONNX graph became.

    Attributes:
        graph_module: the fx graph; its arguments have the names of the inputs.
        arguments: input of the file -> argument of the graph.
        value_of: fx node -> the ONNX value that it computes; nodes that compute none are missing.
        stored: parameter -> what it is in the file.
        places: where the file states the numbers among the calls' arguments.
        made_by: fx node -> the ONNX nodes it computes.
    """

    graph_module: fx.GraphModule
    arguments: Mapping[str, str]
    value_of: Mapping[str, str]
    stored: Mapping[str, Stored]
    places: Mapping[tuple[str, Path], Place | None]
    made_by: Mapping[str, tuple[ir.Node, ...]]


def true_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller gives: initializers may be listed among them."""
    return [value for value in model.graph.inputs if str(value.name) not in model.graph.initializers]


def import_graph(model: ir.Model, example: Mapping[str, Tensor]) -> Imported:
    """Make the fx graph, for any size of batch where the file allows it.

    Args:
        example: one batch, by the names of the inputs; only shapes and dtypes matter.

    Raises:
        CaptureError: an operator is unknown, or is used in a way that has no torch function.
    """
    first = next(iter(example.values()))
    sizes = {size for value in model.graph.initializers.values() for size in value.const_value.shape.numpy()}  # type: ignore[union-attr]
    sizes |= {int(size) for tensor in example.values() for size in tensor.shape}
    batch = first.shape[0] if first.ndim else None
    if batch is not None:
        samples = sentinel(sizes)
        large = {
            name: t.new_empty(samples, *t.shape[1:]) if t.ndim and t.shape[0] == batch else t
            for name, t in example.items()
        }
        try:
            return _build(model, large)
        except _UnsupportedError:
            raise
        except VbpfxError:  # a graph that is tied to its batch size still works at that size
            pass
    return _build(model, example)


class _UnsupportedError(CaptureError):
    """No table has the operator: no size of batch changes that."""


def _build(model: ir.Model, example: Mapping[str, Tensor]) -> Imported:
    b = Builder(opset_of(model))
    inputs = true_inputs(model)
    for value in inputs:
        b.placeholder(value, example[str(value.name)])
    value_of = {str(b.values[value].name): str(value.name) for value in inputs}  # type: ignore[union-attr]
    nodes = list(model.graph)
    constants = [node.outputs[0] for node in nodes if node.op_type == "Constant"]
    for value in (*model.graph.initializers.values(), *constants):  # first: a bias may stand behind what it is added to
        array = constant_of(value)
        assert array is not None
        b.values[value] = Constant(array, value)
    for node in nodes:
        source = node.inputs[0] if node.op_type == "Identity" else None
        if source is not None and isinstance(b.values.get(source), Constant):
            b.values[node.outputs[0]] = b.values[source]
    for node in nodes:
        if node.outputs[0] in b.values:
            continue
        results = _run(b, node)
        for output, result in zip(node.outputs, results, strict=False):
            b.values[output] = result
            made = b.made_by.get(result.name) if isinstance(result, fx.Node) else None
            if isinstance(result, fx.Node) and made and made[0] is node:  # with a sum taken in it computes that sum
                computed = output if len(made) == 1 else made[-1].outputs[0]
                value_of.setdefault(result.name, str(computed.name))
    outputs = [_output(b, value) for value in model.graph.outputs]
    b.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    b.graph.eliminate_dead_code()
    b.graph.lint()
    arguments = {str(value.name): b.values[value].name for value in inputs}  # type: ignore[union-attr]
    module = fx.GraphModule(b.root, b.graph, "OnnxGraph")
    return Imported(module.eval(), arguments, value_of, b.stored, b.places, b.made_by)


def _run(b: Builder, node: ir.Node) -> tuple[Value, ...]:
    """The node's values; what goes wrong is said of the node."""
    known = node.op_type in _OPERATORS and (
        node.domain in ("", "ai.onnx") or node.op_type in _CONTRIBUTED.get(node.domain, ())
    )
    if not known:
        raise _UnsupportedError(
            f"operator {node.op_type} (domain {node.domain or 'ai.onnx'}, node {node.name!r}) is not supported: it has no "
            f"torch function in vbpfx; prune the PyTorch model instead, or write the operator out in the file"
        )
    b.node, b.hint = node, str(node.outputs[0].name)
    try:
        given = [b.values[value] for value in node.inputs if value is not None]
        if given and all(isinstance(v, Constant) and _is_small(v) for v in given):
            return tuple(Constant(array) for array in _fold(node, b))
        if node.op_type in SIZE_OPERATORS and takes_sizes(b):
            return (SIZE_OPERATORS[node.op_type](b),)
        result = _OPERATORS[node.op_type](b)
        return result if isinstance(result, tuple) else (result,)
    except Exception as error:  # torch's functions raise whatever they raise
        raise CaptureError(
            f"operator {node.op_type} (domain {node.domain or 'ai.onnx'}, node {node.name!r}) cannot be computed: "
            f"{first_line(error)}"
        ) from error


def _is_small(constant: Constant) -> bool:
    """Whether a constant is a number, integers or computed from such: results are constants, too. Weights stay what they are."""
    return constant.value is None or constant.array.size == 1 or constant.array.dtype.kind not in "fV"


def _fold(node: ir.Node, b: Builder) -> Iterable[Any]:
    """What a node makes of constants, by ONNX's own reference implementation."""
    arrays = {str(value.name): b.values[value].array for value in node.inputs if value is not None}  # type: ignore[union-attr]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node)],
        "constant",
        [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in arrays.items()],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in node.outputs],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid(node.domain, b.opset)]
    made = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports)).run(None, arrays)
    return [np.asarray(array) for array in made]


def _output(b: Builder, value: ir.Value) -> fx.Node:
    found = b.values[value]
    if isinstance(found, Sizes):
        return b.sizes_tensor(found)
    if isinstance(found, fx.Node):
        return found
    raise CaptureError(f"output {value.name!r} does not depend on the inputs")
