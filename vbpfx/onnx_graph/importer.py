"""Import an ONNX graph as an executable torch.fx graph whose calls the operator table knows.

Nothing is traced. Every ONNX node becomes one or more torch functions that compute the same, and the initializers
become parameters that share the file's memory. An operator that is in no table, or is used in a way that its row does
not support, becomes a call of ONNX Runtime (:mod:`vbpfx.onnx_graph.unknown`), which the analysis refuses by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_logging
from vbpfx.errors import CaptureError, first_line
from vbpfx.graph.fake import sentinel
from vbpfx.onnx_graph.builder import (
    ArgumentPath,
    Builder,
    Constant,
    FileTensor,
    Sizes,
    StatedNumber,
    Value,
    constant_of,
    is_matrix,
    is_setting,
)
from vbpfx.onnx_graph.elementwise import FLOATS
from vbpfx.onnx_graph.file import true_inputs
from vbpfx.onnx_graph.runtime import session_with
from vbpfx.onnx_graph.sizes import SIZE_OPERATORS, takes_sizes
from vbpfx.onnx_graph.table import name_of, translation_of
from vbpfx.onnx_graph.unknown import OnnxCall, Probe, unknown
from vbpfx.onnx_graph.versions import opset_of


@dataclass(frozen=True)
class Imported:
    """An imported ONNX graph: the fx graph, and how its parts correspond to those of the file.

    Attributes:
        graph_module: the fx graph; its arguments are named after the inputs.
        arguments: input of the file -> argument of the graph.
        value_of: fx node -> the ONNX value that it computes. Nodes that compute no value of the file are missing.
        stored: parameter -> the tensor in the file.
        places: (fx node, path of a number among its arguments) -> where the file states that number.
        made_by: fx node -> the ONNX nodes that it computes.
        strange: operator name -> its nodes that have no torch function and are computed by ONNX Runtime.
    """

    graph_module: fx.GraphModule
    arguments: Mapping[str, str]
    value_of: Mapping[str, str]
    stored: Mapping[str, FileTensor]
    places: Mapping[tuple[str, ArgumentPath], StatedNumber | None]
    made_by: Mapping[str, tuple[ir.Node, ...]]
    strange: Mapping[str, list[ir.Node]]


def open_file(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session on a model.

    Raises:
        CaptureError: ONNX Runtime rejects the model. The message names an operator that neither it nor vbpfx knows, or
            an input that no node computes.
    """
    for node in model.graph:
        for value in node.inputs:
            if value is not None and not (value.producer() or value.is_graph_input() or value.is_initializer()):
                raise CaptureError(
                    f"{_named(node)} cannot be computed: no node computes its input {value.name!r}; if that is a sparse "
                    f"initializer, store it as a dense one"
                )
    try:
        return session_with(model, folder, ())
    except CaptureError as error:
        if not (strange := _strange(model)):
            raise
        raise _without_function(strange[0], error) from error


def import_graph(model: ir.Model, example: Inputs, folder: Path = Path()) -> Imported:
    """Import an ONNX model as an fx graph, for any batch size if the file allows it.

    Args:
        example: one batch, keyed by the names of the inputs. Its values matter only if the file holds unknown
            operators: then the file is run, to learn the shapes of their outputs.
        folder: the folder of the file's external data.

    Raises:
        CaptureError: the file holds an unknown operator and does not run in ONNX Runtime, or the graph cannot be built.
    """
    strange = _strange(model)
    probe = Probe(model, folder, example)
    try:
        probe.look_at(strange)
    except CaptureError as error:
        raise _without_function(strange[0], error) from error
    sizes = {size for value in model.graph.initializers.values() for size in value.const_value.shape.numpy()}  # type: ignore[union-attr]
    sizes |= {int(size) for tensor in example.tensors for size in tensor.shape}
    if example.batch_size is not None:
        samples = sentinel(sizes)
        _, large = example.each(lambda t, axis: t if axis is None else _with_size(t, axis, samples))
        try:
            with quiet_logging():
                return _build(model, large, probe)
        except CaptureError:  # a graph that is fixed to its batch size can still be built at that size
            pass
    with quiet_logging():
        return _build(model, example.kwargs, probe)


def _with_size(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.new_empty(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])


def _strange(model: ir.Model) -> list[ir.Node]:
    """Return the nodes whose operators are not in the table."""
    return [node for node in model.graph if node.op_type != "Constant" and translation_of(node) is None]


def _without_function(node: ir.Node, error: CaptureError) -> CaptureError:
    return CaptureError(
        f"vbpfx does not support {_named(node)}, and {error}; prune the PyTorch model instead of the file"
    )


def _named(node: ir.Node) -> str:
    return f"operator {node.op_type} (domain {node.domain or 'ai.onnx'}, node {node.name!r})"


def _build(model: ir.Model, example: Mapping[str, Tensor], probe: Probe) -> Imported:
    b = Builder(opset_of(model), model.opset_imports)
    inputs = true_inputs(model)
    arguments = {str(value.name): b.placeholder(value, example[str(value.name)]).name for value in inputs}
    value_of = {argument: name for name, argument in arguments.items()}
    value_of |= {b.values[value].name: str(value.name) for value in inputs}  # type: ignore[union-attr]
    nodes = list(model.graph)
    constants = [node.outputs[0] for node in nodes if node.op_type == "Constant"]
    # Constants come first: a bias may come after the node to which it is added.
    for value in (*model.graph.initializers.values(), *constants):
        array = constant_of(value)
        assert array is not None
        b.values[value] = Constant(array, value)
    for node in nodes:
        source = node.inputs[0] if node.op_type in ("Identity", "Cast") and node.inputs else None
        constant = b.values.get(source) if source is not None else None
        if isinstance(constant, Constant) and node.op_type == "Identity":
            b.values[node.outputs[0]] = constant
        elif isinstance(constant, Constant) and not is_setting(constant):
            to = FLOATS.get(ir.DataType(node.attributes["to"].as_int()))
            read_alike = constant.array.ndim == 1 or is_matrix(constant.array) or len(node.outputs[0].uses()) == 1
            if to is not None and constant.array.dtype.kind == "f" and read_alike:
                b.values[node.outputs[0]] = Constant(constant.array.astype(to), constant.value, node)
    for node in nodes:
        if node.outputs[0] in b.values:
            continue
        results = _run(b, node, probe)
        for output, result in zip(node.outputs, results, strict=False):
            b.values[output] = result
            made = b.made_by.get(result.name) if isinstance(result, fx.Node) else None
            # A layer that absorbed an Add as its bias computes the output of the Add.
            if isinstance(result, fx.Node) and made and made[0] is node:
                computed = output if len(made) == 1 else made[-1].outputs[0]
                value_of.setdefault(result.name, str(computed.name))
    outputs = [_output(b, value) for value in model.graph.outputs]
    b.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    b.graph.eliminate_dead_code()
    b.graph.lint()
    module = fx.GraphModule(b.root, b.graph, "OnnxGraph")
    strange: dict[str, list[ir.Node]] = {}
    for call in b.graph.nodes:
        if isinstance(call.target, OnnxCall):
            strange.setdefault(call.target.__name__, []).append(b.made_by[call.name][0])
    return Imported(module.eval(), arguments, value_of, b.stored, b.places, b.made_by, strange)


def _run(b: Builder, node: ir.Node, probe: Probe) -> tuple[Value, ...]:
    """Translate one node and return its outputs. Errors are raised with the name of the node."""
    b.node, b.hint = node, str(node.outputs[0].name)
    try:
        translation = translation_of(node)
        if translation is None:
            return unknown(b, probe)
        given = [b.values[value] for value in node.inputs if value is not None]
        if given and all(isinstance(v, Constant) and is_setting(v) for v in given):
            return tuple(Constant(array) for array in _fold(node, b))
        try:
            of_sizes = SIZE_OPERATORS.get(name_of(node.op_type, node.domain))
            if of_sizes is not None and takes_sizes(b):
                return (of_sizes(b),)
            result = translation(b)
            results: tuple[Value, ...] = result if isinstance(result, tuple) else (result,)
            if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
                raise CaptureError("another node reads one of its optional outputs, which are not supported")
            return results
        except CaptureError as error:  # the row does not support this use, and says why
            return unknown(b, probe, str(error))
    except Exception as error:  # torch functions may raise any exception
        raise CaptureError(f"{_named(node)} cannot be computed: {first_line(error)}") from error


def _fold(node: ir.Node, b: Builder) -> Iterable[Any]:
    """Compute a node that reads only constants, with ONNX's reference implementation."""
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
