"""Every ONNX operator of the tables: the torch functions against ONNX Runtime, at a batch size other than the captured one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_files import run

from vbpfx.data.inputs import Inputs
from vbpfx.onnx_graph import importer, table

# Rounding between different float32 kernels.
ROUNDING = 2e-6
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape)) + np.float32(0.1)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


X = floats(5, 4, 6)  # the input of most operators, whose first axis is the batch
IMAGES = floats(5, 4, 8, 8)
BOOLS = X > 0
IDS = RANDOM.integers(0, 7, (5, 3))


@dataclass
class Call:
    """A call of one operator: input ``x``, initializers ``further``, and nodes ``before`` that make other inputs of x."""

    op: str
    x: np.ndarray = field(default_factory=lambda: X)
    further: tuple[np.ndarray | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] | None = None
    domain: str = ""
    opset: int = 17
    outputs: int = 1
    before: tuple[onnx.NodeProto, ...] = ()

    def model(self) -> onnx.ModelProto:
        names = [f"c{i}" if c is not None else "" for i, c in enumerate(self.further)]
        made = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(
            self.op, self.inputs or ["x", *names], made, name="it", domain=self.domain, **self.attributes
        )
        element = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        graph = helper.make_graph(
            [*self.before, node],
            "one",
            [helper.make_tensor_value_info("x", element, ["n", *self.x.shape[1:]])],
            [onnx.ValueInfoProto(name=name) for name in made],
            [numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(self.further) if c is not None],
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(self.domain, 1)] if self.domain else []
        return helper.make_model(graph, opset_imports=imports, ir_version=9)


def each(names: str, *args: Any, **kwargs: Any) -> list[Call]:
    return [Call(name, *args, **kwargs) for name in names.split()]


def batch_of_x(names: str = "c0 c1") -> tuple[onnx.NodeProto, ...]:
    """Make the batch size as exporters do, as a vector ``n`` of one entry; ``names`` are the names of 0 and 1."""
    return (helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Slice", ["shape", *names.split()], ["n"]))


SAME_SIZE = (floats(4, 6),)
CALLS = [
    *each("Identity Dropout Relu Sigmoid Tanh Softplus Softsign Selu HardSwish Elu Celu HardSigmoid LeakyRelu Erf Neg Abs"),
    *each("Exp Sin Cos Sign Floor Ceil Round IsNaN"),
    *each("Tan Sinh Cosh Atan Asinh ThresholdedRelu Shrink"),
    *each("Asin Acos Atanh", np.tanh(X)),
    Call("Acosh", 1 + positive(5, 4, 6)),
    Call("ThresholdedRelu", attributes={"alpha": 0.3}),
    Call("Shrink", attributes={"bias": 0.2, "lambd": 0.3}),
    Call("Mean", further=(*SAME_SIZE, np.float32(0.2))),
    *each("Mish", opset=18),
    *each("Sqrt Reciprocal Log", positive(5, 4, 6)),
    *each("LeakyRelu Elu Celu HardSigmoid", attributes={"alpha": 0.3}),
    *[Call("Gelu", attributes={"approximate": a}, opset=20) for a in ("none", "tanh")],
    *each("Gelu FastGelu", domain="com.microsoft"),
    Call("Gelu", opset=20),
    *each("FastGelu BiasGelu", further=(floats(6),), domain="com.microsoft"),
    Call("QuickGelu", attributes={"alpha": 1.5}, domain="com.microsoft"),
    Call("Swish", attributes={"alpha": 1.5}, opset=24),
    *each("Add Sub Mul Div Min Max Sum", further=SAME_SIZE),
    *each("Add Sub Mul Div", further=(np.float32(2.5),)),
    *each("Add Sub Mul Div", inputs=["c0", "x"], further=(np.full(1, 2.5, np.float32),)),
    *each("Min Max Sum", further=(*SAME_SIZE, np.float32(0.2))),
    *each("Div Mod Add", np.arange(-10, 10).reshape(5, 4), (ints(3, 3, 3, 4),)),
    Call("Mod", further=SAME_SIZE, attributes={"fmod": 1}),
    Call("Pow", positive(5, 4, 6), (np.float32(3),)),
    Call("Pow", positive(5, 4, 6), SAME_SIZE),
    *each("Equal Greater GreaterOrEqual Less LessOrEqual", further=SAME_SIZE),
    *each("And Or Xor", BOOLS, (BOOLS[0],)),
    Call("Not", BOOLS),
    Call("Where", BOOLS, (floats(4, 6), np.float32(-1))),
    Call("Clip", further=(np.float32(-0.5), np.float32(0.5))),
    Call("Clip", further=(None, np.float32(0.5))),
    Call("PRelu", further=(floats(6),)),
    Call("PRelu", IMAGES, (floats(4, 1, 1),)),
    Call("Cast", attributes={"to": onnx.TensorProto.INT64}),
    Call("Cast", attributes={"to": onnx.TensorProto.BOOL}),
    Call("CastLike", further=(ints(1),)),
    Call("MatMul", further=(floats(6, 7),)),
    Call("MatMul", inputs=["c0", "x"], further=(floats(3, 4),)),
    Call("Gemm", X[:, 0], (floats(6, 7), floats(7))),
    Call("Gemm", X[:, 0], (floats(7, 6), floats(1, 7)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Call("Gemm", X[:, 0], (floats(7, 6), np.float32(2)), {"transB": 1}),
    Call("Attention", IMAGES, (floats(1, 1, 8, 8),), inputs=["x", "x", "x", "c0"], attributes={"scale": 0.3}, opset=23),
    Call("Attention", IMAGES, inputs=["x", "x", "x"], attributes={"is_causal": 1}, opset=23),
    Call("Einsum", further=(floats(6, 7),), attributes={"equation": "btc,cd->btd"}),
    Call("Conv", IMAGES, (floats(3, 4, 3, 3), floats(3)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Call("Conv", IMAGES, (floats(3, 4, 3, 3),), {"pads": [0, 1, 2, 1], "dilations": [2, 2]}),
    *[Call("Conv", IMAGES, (floats(3, 4, 3, 2),), {"auto_pad": a, "strides": [2, 1]}) for a in ("SAME_UPPER", "SAME_LOWER", "VALID")],
    Call("Conv", IMAGES, (floats(4, 2, 3, 3),), {"group": 2}),
    Call("Conv", X, (floats(3, 4, 3),)),
    Call("ConvTranspose", IMAGES, (floats(4, 3, 2, 2), floats(3)), {"strides": [2, 2], "output_padding": [1, 0]}),
    Call("LayerNormalization", further=(floats(6), floats(6))),
    Call("LayerNormalization", further=(floats(4, 6),), attributes={"axis": 1, "epsilon": 1e-3}),
    Call("RMSNormalization", further=(floats(6),), opset=23),
    Call("SimplifiedLayerNormalization", further=(floats(6),)),
    Call("SkipLayerNormalization", further=(floats(6), floats(6), floats(6)), inputs=["x", "x", "c0", "c1", "c2"], domain="com.microsoft"),
    Call("SkipLayerNormalization", further=(floats(6),), inputs=["x", "x", "c0"], domain="com.microsoft", attributes={"epsilon": 0.1}),
    Call("SkipSimplifiedLayerNormalization", 1e-4 * X, (floats(6),), inputs=["x", "x", "c0"], domain="com.microsoft"),
    Call("FusedConv", IMAGES, (floats(4, 4, 1, 1), floats(4)), {"activation": "Relu"}, ["x", "c0", "c1", "x"], domain="com.microsoft"),
    *[Call("FusedConv", IMAGES, (floats(3, 4, 3, 3),), {"activation": name, **numbers}, domain="com.microsoft")
      for name, numbers in (("LeakyRelu", {"activation_params": [0.3]}), ("Clip", {"activation_params": [-3.0, 3.0]}), ("Tanh", {}), ("Sigmoid", {}))],
    Call("FusedGemm", X[:, 0], (floats(6, 7), floats(7)), {"activation": "LeakyRelu", "activation_alpha": 0.3}, domain="com.microsoft"),
    Call("FusedMatMul", further=(floats(6, 7),), domain="com.microsoft"),
    Call("FusedMatMul", further=(floats(7, 6),), attributes={"transB": 1, "alpha": 0.5}, domain="com.microsoft"),
    Call("FusedMatMul", inputs=["x", "x"], attributes={"transA": 1}, domain="com.microsoft"),
    Call("BatchNormalization", IMAGES, (floats(4), floats(4), floats(4), positive(4))),
    Call("InstanceNormalization", IMAGES, (floats(4), floats(4))),
    Call("GroupNormalization", IMAGES, (floats(4), floats(4)), {"num_groups": 2}, opset=21),
    Call("Reshape", further=(ints(0, -1),)),
    Call("Reshape", further=(ints(-1, 2, 3),)),
    Call("Transpose", attributes={"perm": [0, 2, 1]}),
    Call("Transpose", X[:, 0]),
    *[Call("Flatten", attributes={"axis": axis}) for axis in (0, 1, 2, -1)],
    Call("Squeeze", X[:, :1]),
    Call("Squeeze", X[:, :1, :1], (ints(1, -1),)),
    Call("Unsqueeze", further=(ints(1, -1),)),
    Call("Expand", X[:, :1], (ints(4, 1),)),
    Call("Expand", further=(ints(2, 1, 4, 6),)),
    Call("Slice", further=(ints(1), ints(2**63 - 1), ints(-1))),
    Call("Slice", further=(ints(-3, 0), ints(-1, 4), ints(2, 1), ints(1, 2))),
    Call("Slice", further=(ints(-1), ints(-(2**63)), ints(1), ints(-1))),
    Call("Split", further=(ints(2, 4),), attributes={"axis": 2}, outputs=2),
    Call("Split", X[:, :, :5], (), {"axis": 2, "num_outputs": 2}, opset=18, outputs=2),
    Call("Concat", attributes={"axis": 1}, inputs=["x", "x"]),
    Call("Gather", IDS, (floats(7, 3),), inputs=["c0", "x"]),
    Call("Gather", further=(np.array(2),), attributes={"axis": 1}),
    Call("Gather", further=(np.array([[1, 0], [2, -1]]),), attributes={"axis": 1}),
    Call("GatherElements", X, (RANDOM.integers(0, 4, (2, 3, 6)),), {"axis": 1}),
    Call("GatherND", X, (np.array([[0, 1], [1, 3]]),)),
    Call("ArrayFeatureExtractor", X[:, 0], (ints(3, 1),), domain="ai.onnx.ml"),
    Call("Range", further=(ints(0), ints(1), np.array(0), np.array(1)), inputs=["c2", "m", "c3"],
         before=(*batch_of_x(), helper.make_node("Squeeze", ["n"], ["m"]))),
    Call("ConstantOfShape", further=(ints(0), ints(1)), inputs=["n"], before=batch_of_x()),
    Call("Tile", further=(ints(1, 2, 3),)),
    Call("Pad", further=(ints(0, 1, 0, 0, 0, 2), np.float32(7))),
    Call("Pad", further=(ints(0, 0, 1, 0, 0, 2),), attributes={"mode": "reflect"}),
    Call("Pad", further=(ints(1, 2), None, ints(2)), opset=18),
    Call("Trilu", further=(np.array(1),)),
    Call("Trilu", attributes={"upper": 0}),
    *each("ReduceMean ReduceMax ReduceMin ReduceLogSumExp ReduceL2 ReduceL1 ReduceSumSquare", attributes={"axes": [-1]}),
    *each("ReduceMean ReduceMax", attributes={"axes": [1, 2], "keepdims": 0}),
    *each("ReduceMean ReduceL2", further=(ints(1),), opset=18),
    Call("ReduceSum", further=(ints(2),), attributes={"keepdims": 0}),
    Call("ReduceSum"),
    Call("ReduceProd", attributes={"axes": [1, 2], "keepdims": 0}),
    *each("GlobalAveragePool GlobalMaxPool", IMAGES),
    *each("Softmax LogSoftmax LpNormalization", attributes={"axis": 1}),
    *each("Softmax LogSoftmax LpNormalization"),
    Call("CumSum", further=(np.array(1),)),
    *each("ArgMax ArgMin", attributes={"axis": 2, "keepdims": 0}),
    Call("TopK", further=(ints(3),), outputs=2),
    Call("AveragePool", IMAGES, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Call("AveragePool", IMAGES, (), {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}),
    Call("MaxPool", IMAGES, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Call("MaxPool", IMAGES, (), {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "ceil_mode": 1}),
    Call("LpPool", IMAGES, (), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "p": 3}),
    *each("GlobalLpPool", IMAGES),
    Call("ReduceLogSum", positive(5, 4, 6), attributes={"axes": [1]}),
    *[Call("GridSample", IMAGES, (np.tanh(floats(1, 3, 7, 2)), ints(0), ints(1), ints(3, 7, 2)), {"mode": m, "padding_mode": p, "align_corners": a}, ["x", "g"],
           opset=16, before=(*batch_of_x(names="c1 c2"), helper.make_node("Concat", ["n", "c3"], ["t"], axis=0),
           helper.make_node("Expand", ["c0", "t"], ["g"])))
      for m, p, a in (("bilinear", "zeros", 0), ("nearest", "border", 1))],
    *[Call("Resize", IMAGES, (None, vector(1, 1, *scale)), {"mode": mode, "coordinate_transformation_mode": how})
      for mode in ("nearest", "linear", "cubic") for how in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
      for scale in ((2, 3), (0.6, 1.25))],
    *[Call("Resize", IMAGES, (None, vector(1, 1, 1.5, 0.3)), {"nearest_mode": mode})
      for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")],
    *[Call("Resize", IMAGES, (ints(0), ints(2), ints(5, 11)), {"mode": mode}, ["x", "", "", "t"], before=(
      *batch_of_x(), helper.make_node("Concat", ["n", "c2"], ["t"], axis=0))) for mode in ("nearest", "linear")],
    Call("Resize", IMAGES, (None, vector(1, 1, 1.7, 1.7)), {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}),
    Call("Resize", IMAGES, (None, vector(), ints(9, 11)), {"mode": "linear", "axes": [2, 3]}, opset=18),
    Call("Resize", IMAGES, (None, vector(1, 1, 1.3, 0.7)), {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}, opset=19),
    Call("Resize", X, (None, vector(1, 1, 2))),
    Call("Shape"),
    Call("Shape", attributes={"start": -2, "end": 3}),
    Call("Size"),
]  # fmt: skip


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


# Arithmetic on sizes before a Reshape reads them: reversed, transposed, multiplied, selected, and cast back and forth.
SIZES = [
    Call("Reshape", further=(ints(-1), ints(-(2**63)), ints(0), ints(1, -1)), inputs=["x", "t"], before=(
        node("Shape", "x", "s"), node("Slice", "s c0 c1 c2 c0", "r"), node("Reshape", "r c3", "m"),
        node("Transpose", "m", "n", perm=[1, 0]), node("Squeeze", "n", "t"))),
    Call("Reshape", further=(ints(0, 2), np.array(1), ints(0), ints(2)), inputs=["x", "t"], before=(
        node("Shape", "x", "s"), node("Gather", "s c0", "some"), node("ReduceProd", "some", "p", keepdims=1),
        node("Gather", "s c1", "one"), node("Unsqueeze", "one c2", "u"), node("Div", "u c3", "h"), node("Mul", "h c3", "k"),
        node("Concat", "p k", "t", axis=0))),
    Call("Expand", further=(ints(-1, -1, -1),), inputs=["x", "t"], before=(
        node("Shape", "x", "s"), node("Shape", "s", "count"), node("ConstantOfShape", "count", "zeros"),
        node("Cast", "zeros", "z", to=onnx.TensorProto.INT64), node("Equal", "s c0", "marked"), node("Where", "marked z s", "t"))),
    Call("Reshape", further=(ints(-1), np.float32(2)), inputs=["x", "t"], before=(
        node("Shape", "x", "s", start=0, end=2), node("Cast", "s", "f", to=onnx.TensorProto.FLOAT), node("Pow", "f c1", "q"),
        node("Sqrt", "q", "root"), node("Cast", "root", "i", to=onnx.TensorProto.INT64), node("Sub", "i c0", "more"),
        node("Add", "more c0", "same"), node("Neg", "same", "minus"), node("Neg", "minus", "plus"), node("Max", "plus c0", "most"),
        node("Concat", "most c0", "t", axis=0))),
]  # fmt: skip


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-6)
    return float(np.where(found == expected, 0, np.abs(found - expected)).max(initial=0) / scale)


@pytest.mark.parametrize("call", CALLS + SIZES, ids=lambda call: f"{call.op} {call.attributes or ''}")
def test_an_operator(call: Call) -> None:
    model = call.model()
    imported = importer.import_graph(
        ir.serde.deserialize_model(model), Inputs((), {"x": torch.from_numpy(call.x[:3].copy())})
    )
    found = imported.graph_module(torch.from_numpy(call.x.copy()))
    expected = run(model, {"x": call.x})
    for one, other in zip(found if isinstance(found, (tuple, list)) else [found], expected, strict=True):
        assert difference(one.detach().numpy() if isinstance(one, torch.Tensor) else np.array(one), other) < ROUNDING


def test_every_row_is_tried() -> None:
    assert {table.name_of(call.op, call.domain) for call in CALLS} == set(table._OPERATORS)
