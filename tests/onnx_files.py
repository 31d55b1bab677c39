"""Handmade ONNX files in the style of producers other than torch, and an oracle that does not use torch.fx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


class Net:
    """A graph under construction: nodes and initializers in order, with weights drawn from one generator."""

    def __init__(self, opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, Array] = {}
        self.random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> str:
        self.stored[name] = (self.random.standard_normal(shape) / np.sqrt(max(1, shape[0]))).astype(np.float32)
        return name

    def vector(self, name: str, *values: float, dtype: Any = np.float32) -> str:
        self.stored[name] = np.array(values, dtype)
        return name

    def scalar(self, name: str, value: float) -> str:
        self.stored[name] = np.array(value, np.float32)
        return name

    def integers(self, name: str, *values: int) -> str:
        return self.vector(name, *values, dtype=np.int64)

    def add(self, op_type: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> None:
        made = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op_type, inputs, made, name=f"n{len(self.nodes)}_{op_type}", **attributes))

    def model(
        self, x: list[int | str], y: list[int | str], functions: Sequence[onnx.FunctionProto] = ()
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
            [numpy_helper.from_array(array, name) for name, array in self.stored.items()],
        )
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
        model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=9)
        model.producer_name = "by hand"
        helper.set_model_props(model, {"kept": "yes"})
        onnx.checker.check_model(model)
        return model


@dataclass(frozen=True)
class Case:
    """A model with the expected properties of its one block.

    ``hidden`` is the value that the consumer layers read, ``axis`` its hidden axis, and ``width`` the length of that axis. If
    they read it behind a norm, ``before_norm`` is the value that the norm reads.
    """

    name: str
    make: Callable[[], onnx.ModelProto]
    shape: tuple[int, ...]
    hidden: str = "h"
    axis: int = -1
    width: int = 12
    before_norm: str | None = None


def mlp(net: Net, *, bias: bool = True) -> None:
    net.add("MatMul", ["x", net.weight("dense_1/kernel", 6, 12)], "m1")
    net.add("Add", ["m1", net.weight("dense_1/bias", 12)], "a1")
    net.add("Relu", ["a1"], "h")
    net.add("MatMul", ["h", net.weight("dense_2/kernel", 12, 5)], "m2" if bias else "y")
    if bias:
        net.add("Add", ["m2", net.weight("dense_2/bias", 5)], "y")


def with_biases() -> onnx.ModelProto:
    net = Net()
    mlp(net)
    return net.model(["n", 6], ["n", 5])


def without_bias() -> onnx.ModelProto:
    """The last product has no bias, so the fold has to add a sum behind it."""
    net = Net()
    mlp(net, bias=False)
    return net.model(["n", "t", 6], ["n", "t", 5])


def gemms() -> onnx.ModelProto:
    """Gemm nodes with a transposed and an untransposed weight, a bias of shape (1, 12), no bias, and a scaled product."""
    net = Net()
    net.add("Gemm", ["x", net.weight("A", 6, 12), net.weight("B", 1, 12)], "g")
    net.add("Tanh", ["g"], "h")
    net.add("Gemm", ["h", net.weight("C", 5, 12)], "c", transB=1)
    net.add("Gemm", ["h", net.weight("D", 12, 5), net.weight("E", 5)], "d", alpha=0.5, beta=2.0)
    net.add("Add", ["c", "d"], "y")
    return net.model(["n", 6], ["n", 5])


def constants() -> onnx.ModelProto:
    """All weights are Constant nodes, listed after the products that read them if allowed; GELU is written out."""
    net = Net(opset=13)
    for name, shape in (("W1", (6, 12)), ("b1", (12,)), ("W2", (12, 5))):
        net.weight(name, *shape)
        net.add("Constant", [], name, value=numpy_helper.from_array(net.stored.pop(name), name))
    net.add("MatMul", ["x", "W1"], "m1")
    net.add("Add", ["b1", "m1"], "a1")
    net.add("Div", ["a1", net.scalar("root2", 2**0.5)], "scaled")
    net.add("Erf", ["scaled"], "erf")
    net.add("Add", ["erf", net.vector("one", 1.0)], "shifted")
    net.add("Mul", ["a1", "shifted"], "both")
    net.add("Mul", ["both", net.scalar("half", 0.5)], "h")
    net.add("MatMul", ["h", "W2"], "m2")
    net.add("Add", ["m2", net.weight("b2", 5)], "y")
    return net.model(["n", 6], ["n", 5])


def depthwise() -> onnx.ModelProto:
    """1x1 convolution, depthwise convolution whose ``group`` is the width, batch norm, slope per channel, 1x1 convolution."""
    net = Net()
    net.add("Conv", ["x", net.weight("expand.weight", 12, 4, 1, 1)], "e", kernel_shape=[1, 1])
    net.add("Conv", ["e", net.weight("depth.weight", 12, 1, 3, 3), net.weight("depth.bias", 12)], "d", group=12)
    net.stored["var"] = np.linspace(0.5, 2, 12, dtype=np.float32)
    net.add(
        "BatchNormalization",
        ["d", net.weight("scale", 12), net.weight("shift", 12), net.weight("mean", 12), "var"],
        "n",
    )
    net.add("PRelu", ["n", net.weight("slope", 12, 1, 1)], "h")
    net.add("Conv", ["h", net.weight("project.weight", 5, 12, 1, 1)], "y", kernel_shape=[1, 1])
    return net.model(["n", 4, 6, 6], ["n", 5, 4, 4])


def gate(opset: int) -> onnx.ModelProto:
    """A packed gate, split by a Split node without explicit sizes."""
    net = Net(opset)
    net.add("MatMul", ["x", net.weight("W", 6, 24)], "m")
    net.add("Split", ["m"], ["value", "gate"], axis=-1, **({"num_outputs": 2} if opset >= 18 else {}))
    net.add("Sigmoid", ["gate"], "open")
    net.add("Mul", ["value", "open"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    return net.model(["n", 6], ["n", 5])


def sliced_gate() -> onnx.ModelProto:
    """A packed gate, split by slices; both read the boundary between the halves from one initializer."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 24)], "m")
    net.integers("zero", 0), net.integers("middle", 12), net.integers("last", 2**63 - 1), net.integers("axis", -1)
    net.add("Slice", ["m", "zero", "middle", "axis"], "value")
    net.add("Slice", ["m", "middle", "last", "axis"], "gate")
    net.add("Sigmoid", ["gate"], "open")
    net.add("Mul", ["value", "open"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    return net.model(["n", 6], ["n", 5])


def computed_gate() -> onnx.ModelProto:
    """A packed gate, split at half of the width that the file reads from the shape of the value."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 24)], "m")
    net.integers("zero", 0), net.integers("last", 2**63 - 1), net.integers("axis", -1)
    net.add("Shape", ["m"], "shape")
    net.add("Gather", ["shape", net.integers("second", 1)], "width")
    net.add("Div", ["width", net.integers("two", 2)], "middle")
    net.add("Slice", ["m", "zero", "middle", "axis"], "value")
    net.add("Slice", ["m", "middle", "last", "axis"], "gate")
    net.add("Sigmoid", ["gate"], "open")
    net.add("Mul", ["value", "open"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    return net.model(["n", 6], ["n", 5])


def reshaped() -> onnx.ModelProto:
    """One reshape states the width beside sizes read from the input; another states only the width."""
    net = Net()
    net.add("Flatten", ["x"], "rows", axis=2)
    net.add("MatMul", ["rows", net.weight("W", 6, 12)], "m")
    net.add("Reshape", ["m", net.integers("as_rows", -1, 12)], "r")
    net.add("Shape", ["x"], "shape")
    net.add("Gather", ["shape", net.vector("first", 0, dtype=np.int64)], "n")
    net.add("Concat", ["n", net.integers("tokens", 3), net.integers("width", 12)], "target", axis=0)
    net.add("Reshape", ["r", "target"], "tokens_apart")
    net.add("HardSwish", ["tokens_apart"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    return net.model(["n", 3, 6], ["n", 3, 5])


def in_front() -> onnx.ModelProto:
    """Token mixing with the weights as left factors, so that the new bias is a column."""
    net = Net()
    net.add("MatMul", [net.weight("W", 12, 6), "x"], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", [net.weight("V", 5, 12), "h"], "y")
    return net.model(["n", 6, 4], ["n", 5, 4])


def normed(kind: str) -> onnx.ModelProto:
    """A norm over the hidden axis, whose statistics must still count the removed channels."""
    net = Net(23 if kind == "RMSNormalization" else 17)
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Add", ["m", net.weight("b", 12)], "h")
    inputs = ["h", net.weight("scale", 12), *([net.weight("shift", 12)] if kind == "LayerNormalization" else [])]
    net.add(kind, inputs, "normed", epsilon=1e-3)
    net.add("MatMul", ["normed", net.weight("V", 12, 5)], "y")
    return net.model(["n", 6], ["n", 5])


def summed() -> onnx.ModelProto:
    """A sum and a mean over the hidden axis beside the layer that reads that axis."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Softplus", ["m"], "h")
    net.add("ReduceSum", ["h", net.integers("axis", -1)], "total")
    net.add("ReduceMean", ["h"], "mean", axes=[-1])
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "v")
    net.add("Add", ["v", "total"], "w")
    net.add("Mul", ["w", "mean"], "y")
    return net.model(["n", 6], ["n", 5])


def resized(*, by_size: bool) -> onnx.ModelProto:
    """A Resize between two convolutions, by scales or to sizes, one of which states the number of channels."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1)], "c")
    net.add("Relu", ["c"], "r")
    if by_size:
        net.add("Shape", ["x"], "shape")
        net.add("Gather", ["shape", net.integers("first", 0)], "n")
        net.add("Concat", ["n", net.integers("width", 12, 5, 9)], "sizes", axis=0)
        net.add("Resize", ["r", "", "", "sizes"], "h", mode="linear")
    else:
        net.add("Resize", ["r", "", net.vector("scales", 1, 1, 2, 2)], "h", coordinate_transformation_mode="asymmetric")
    net.add("Conv", ["h", net.weight("V", 5, 12, 1, 1)], "y")
    return net.model(["n", 4, 4, 4], ["n", 5, *((5, 9) if by_size else (8, 8))])


def shared_matrix() -> onnx.ModelProto:
    """One pair of layers is applied to two inputs: one weight, two calls."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "first")
    net.add("MatMul", ["h", "V"], "second")
    net.add("Sigmoid", ["second"], "open")
    net.add("Mul", ["first", "open"], "y")
    return net.model(["n", 6], ["n", 5])


CASES = (
    Case("MatMul and Add", with_biases, (6,)),
    Case("no bias, tokens", without_bias, (3, 6)),
    Case("Gemm", gemms, (6,)),
    Case("Constant nodes, opset 13", constants, (6,)),
    Case("depthwise", depthwise, (4, 6, 6), axis=1),
    Case("Split, opset 13", lambda: gate(13), (6,)),
    Case("Split, opset 18", lambda: gate(18), (6,)),
    Case("Slice", sliced_gate, (6,)),
    Case("Slice at a computed place", computed_gate, (6,)),
    Case("Reshape", reshaped, (3, 6)),
    Case("weights in front", in_front, (6, 4), axis=1),
    Case("LayerNormalization", lambda: normed("LayerNormalization"), (6,), hidden="normed", before_norm="h"),
    Case("RMSNormalization", lambda: normed("RMSNormalization"), (6,), hidden="normed", before_norm="h"),
    Case("sum and mean", summed, (6,)),
    Case("Resize by scales", lambda: resized(by_size=False), (4, 4, 4), axis=1),
    Case("Resize to sizes", lambda: resized(by_size=True), (4, 4, 4), axis=1),
    Case("one weight, two calls", shared_matrix, (6,)),
)  # fmt: skip


def run(model: onnx.ModelProto | Path, feeds: Mapping[str, Array]) -> list[Array]:
    file = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [np.asarray(found) for found in session.run(None, dict(feeds))]


def values(model: onnx.ModelProto, name: str, feeds: Mapping[str, Array]) -> Array:
    """Return an intermediate value of the graph."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(shown, feeds)[-1]


def substituted(model: onnx.ModelProto, name: str, axis: int, removed: Sequence[int], means: Array) -> onnx.ModelProto:
    """Return the dense model with channels of a value replaced by constants for all nodes that read it."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    mask = np.ones(len(means), np.float32)
    mask[list(removed)] = 0
    behind = 0 if axis == -1 else len(model.graph.input[0].type.tensor_type.shape.dim) - axis - 1
    shape = (-1, *[1] * behind)
    constants = {f"{name}_mask": mask, f"{name}_means": (means * (1 - mask)).astype(np.float32)}
    changed.graph.initializer.extend(numpy_helper.from_array(a.reshape(shape), n) for n, a in constants.items())
    nodes = list(changed.graph.node)
    place = next(i for i, node in enumerate(nodes) if name in node.output)
    for node in nodes:
        for i, used in enumerate(node.input):
            if used == name:
                node.input[i] = f"{name}_substituted"
    nodes[place + 1 : place + 1] = [
        helper.make_node("Mul", [name, f"{name}_mask"], [f"{name}_masked"]),
        helper.make_node("Add", [f"{name}_masked", f"{name}_means"], [f"{name}_substituted"]),
    ]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed
