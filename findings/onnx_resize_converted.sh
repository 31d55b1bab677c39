#!/usr/bin/env bash
# onnx 1.23.2, onnx.version_converter: Upsample of opset 9 and Resize of opset 10 compute other values once they are converted to 13.
#
# Expected: the converted file computes the same values as the original. Before opset 11 there was only one way to place the
# sampling points: the index is divided by the scale, and mode="nearest" rounds down (ONNX Runtime rounds up if the picture shrinks).
# Seen: the converter does not set coordinate_transformation_mode and nearest_mode, so opset 13 uses its defaults ("half_pixel",
# "round_prefer_floor"). mode="linear" differs at every factor; mode="nearest" agrees at whole factors and differs at 1.7.
# What to do: set coordinate_transformation_mode="asymmetric" and, with mode="nearest", nearest_mode="floor" ("ceil" where the picture
# shrinks) on the converted nodes, and compare both files on data.
#
# The script installs the packages in a temporary folder, converts the files, runs them in ONNX Runtime, and fails if the
# description above is no longer true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnx==1.23.2 onnxruntime==1.30.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter

onnxruntime.set_default_logger_severity(3)
picture = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)


def network(operator: str, opset: int, mode: str, factor: float) -> onnx.ModelProto:
    value, size = helper.make_tensor_value_info, int(5 * factor)
    scales = numpy_helper.from_array(np.array([1, 1, factor, factor], np.float32), "scales")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "scales"], ["y"], mode=mode)], "g",
        [value("x", TensorProto.FLOAT, [1, 2, 5, 5])], [value("y", TensorProto.FLOAT, [1, 2, size, size])], [scales],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": picture})[0]


for operator, opset in (("Upsample", 9), ("Resize", 10)):
    for mode, factor, alike in (("nearest", 2, True), ("nearest", 1.7, False), ("linear", 2, False), ("linear", 1.7, False)):
        old = network(operator, opset, mode, factor)
        apart = np.abs(run(old) - run(version_converter.convert_version(old, 13))).max()
        print(f"{operator} of opset {opset}, {mode}, by {factor}: the converted file differs by {apart:.3f}")
        assert (apart < 1e-5) == alike, "the converter has changed"
PYTHON
# Printed, 2 + 2 times: nearest by 2: 0.000; nearest by 1.7: 3.629; linear by 2: 1.284; linear by 1.7: 0.881
