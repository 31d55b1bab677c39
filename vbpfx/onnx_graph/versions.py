"""Files of earlier opsets, brought to the one that the operator tables begin at.

ONNX's own converter does it. Where it goes wrong, the file is mended here; whoever has data holds the result against the file
as it was (:func:`vbpfx.prune_onnx` does).
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import version_converter

from vbpfx.errors import CaptureError, first_line

OLDEST_OPSET = 7  # what ONNX Runtime promises to run
READ_FROM = 13
_CONVERTED = "vbpfx.converted_from"
_RESIZED_ALIKE = 11  # from there on Resize says how coordinates are transformed
# Larger tensors stay where they are: the converter reads numbers such as scales and axes, and copies what it is given.
_LARGEST_NUMBERS = 1024


def opset_of(model: ir.Model) -> int:
    """The version of ONNX's own operators that the file is written in; 0 where it names none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def converted_from(model: ir.Model) -> int | None:
    """The opset of the file that a model was converted from; None where it was not."""
    return model.meta.get(_CONVERTED)


def converted(model: ir.Model, path: Path) -> ir.Model:
    """The model in an opset that the operator tables know: itself, or what ONNX's converter makes of it.

    Raises:
        CaptureError: it is too old, or the converter does not take it.
    """
    opset = opset_of(model)
    if opset >= READ_FROM:
        return model
    if opset < OLDEST_OPSET:
        raise CaptureError(
            f"{path} is of opset {opset}, the oldest that is supported is {OLDEST_OPSET}: export it anew with opset "
            f"{READ_FROM} or a newer one"
        )
    try:
        new = _convert(model)
    except Exception as error:  # a library in C++ with kinds of its own
        raise CaptureError(
            f"{path} is of opset {opset}, and ONNX's version converter cannot bring it to opset {READ_FROM} "
            f"({first_line(error)}): export it anew with opset {READ_FROM} or a newer one"
        ) from error
    if opset < _RESIZED_ALIKE:
        for node in new.graph.all_nodes():
            if node.op_type == "Resize" and "coordinate_transformation_mode" not in node.attributes:
                _resize_as_before(node)
    new.meta[_CONVERTED] = opset
    return new


def _resize_as_before(node: ir.Node) -> None:
    """State what Resize did before opset 11: places of samples are divided by the scale, and rounded down, or up where it shrinks."""
    stated = {"coordinate_transformation_mode": "asymmetric"}
    if node.attributes.get_string("mode", "nearest") == "nearest":
        scales = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
        shrinks = scales is not None and bool((scales.numpy() < 1).any())
        stated["nearest_mode"] = "ceil" if shrinks else "floor"
    for name, value in stated.items():
        node.attributes[name] = ir.AttrString(name, value)


def _convert(model: ir.Model) -> ir.Model:
    """By ONNX's converter, which never sees the large tensors."""
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _LARGEST_NUMBERS
    }
    listed = {str(value.name) for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.name not in weights:
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    for name, tensor in weights.items():
        value = model.graph.initializers.pop(name)
        value.const_value, value.shape, value.type = None, ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        if name not in listed:
            model.graph.inputs.append(value)
    proto = version_converter.convert_version(ir.serde.serialize_model(model), READ_FROM)
    imports = [onnx.helper.make_opsetid("", READ_FROM)]
    proto.ir_version = max(proto.ir_version, onnx.helper.find_min_ir_version_for(imports))
    new = ir.serde.deserialize_model(proto)
    for value in list(new.graph.inputs):
        if (name := str(value.name)) in weights:
            if name not in listed:
                new.graph.inputs.remove(value)
            value.const_value = weights[name]
            new.graph.register_initializer(value)
    return new
