"""Convert files of earlier opsets to the oldest opset that the operator tables know.

ONNX's own converter does the work, and one mistake that it makes (in Resize) is corrected here. A caller that has data
should compare the result with the original file, as :func:`vbpfx.prune_onnx` does.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import version_converter

from vbpfx.errors import CaptureError, first_line

OLDEST_OPSET = 7  # the oldest opset that ONNX Runtime supports
READ_FROM = 13
_CONVERTED = "vbpfx.converted_from"
_RESIZED_ALIKE = 11  # from this opset on, Resize has an attribute for the coordinate transformation
# Tensors of more bytes than this are kept from the converter, which copies all it is given. It needs only small
# tensors, such as scales and axes.
_LARGEST_NUMBERS = 1024


def opset_of(model: ir.Model) -> int:
    """Return the opset of ONNX's own operators that the file uses, or 0 if the file does not name one."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def converted_from(model: ir.Model) -> int | None:
    """Return the opset of the original file if the model was converted, otherwise None."""
    return model.meta.get(_CONVERTED)


def converted(model: ir.Model, path: Path) -> ir.Model:
    """Return the model in an opset that the operator tables know: the model itself, or one made by ONNX's converter.

    Raises:
        CaptureError: the model's opset is too old, or the converter fails.
    """
    opset = opset_of(model)
    if opset >= READ_FROM:
        return model
    if opset < OLDEST_OPSET:
        raise CaptureError(
            f"{path} has opset {opset}, and the oldest that is supported is {OLDEST_OPSET}: export the model again with opset "
            f"{READ_FROM} or newer"
        )
    try:
        new = _convert(model)
    except Exception as error:  # the converter is a C++ library with exception classes of its own
        raise CaptureError(
            f"{path} has opset {opset}, and ONNX's version converter cannot bring it to opset {READ_FROM} "
            f"({first_line(error)}): export the model again with opset {READ_FROM} or newer"
        ) from error
    if opset < _RESIZED_ALIKE:
        for node in new.graph.all_nodes():
            if node.op_type == "Resize" and "coordinate_transformation_mode" not in node.attributes:
                _resize_as_before(node)
    new.meta[_CONVERTED] = opset
    return new


def _resize_as_before(node: ir.Node) -> None:
    """Write into the attributes what Resize did before opset 11.

    Coordinates are divided by the scale. In mode "nearest" they are rounded down, or up if the image shrinks.
    """
    stated = {"coordinate_transformation_mode": "asymmetric"}
    if node.attributes.get_string("mode", "nearest") == "nearest":
        scales = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
        shrinks = scales is not None and bool((scales.numpy() < 1).any())
        stated["nearest_mode"] = "ceil" if shrinks else "floor"
    for name, value in stated.items():
        node.attributes[name] = ir.AttrString(name, value)


def _convert(model: ir.Model) -> ir.Model:
    """Convert the model with ONNX's converter. Large tensors are taken out before, and put back afterwards."""
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
