"""Files from ONNX Runtime's optimizer: fused operators are decomposed for the analysis and kept in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Array, Net, run, substituted, values

import vbpfx

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
RATIO, KEPT = 5 / 12, 7
MICROSOFT = "com.microsoft"
RANDOM = np.random.default_rng(0)


def file(net: Net, x: list[object], y: list[object], path: Path) -> Path:
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in net.stored.items()],
    )
    imports = [helper.make_opsetid("", net.opset), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def fused(net: Net, number: int, op_type: str, **attributes: object) -> None:
    """Replace a node by a fused operator of ONNX Runtime."""
    node = net.nodes[number]
    node.op_type, node.domain = op_type, MICROSOFT
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())


def narrowed(source: Path, dense: onnx.ModelProto, hidden: str, axis: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Prune the file, compare with the dense one with the removed channels at their means, and return the result."""
    data: list[Array] = [RANDOM.standard_normal((8, *shape)).astype(np.float32) for _ in range(3)]
    out = source.with_name("out.onnx")
    pruned = vbpfx.prune_onnx(source, data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    (entry,) = pruned.plan.blocks
    assert len(entry.kept) == KEPT
    assert not pruned.left_alone
    seen = np.concatenate([np.moveaxis(values(dense, hidden, {"x": x}), axis, -1).reshape(-1, 12) for x in data])
    reference = substituted(dense, hidden, axis, entry.pruned, seen.astype(np.float64).mean(0))
    x = data[0][:3]
    (got,), (wanted,), (before,) = (run(m, {"x": x}) for m in (out, reference, dense))
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()
    assert np.abs(before - wanted).max() > 100 * ROUNDING * np.abs(wanted).max()
    return onnx.load(out)


def test_what_the_optimizer_makes_of_convolutions(tmp_path: Path) -> None:
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1)], "c")
    net.add("Relu", ["c"], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 1, 1)], "v")
    net.add("Relu", ["v"], "y")
    dense = net.model(["n", 4, 6, 6], ["n", 5, 6, 6])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "in.onnx"), 4
    onnxruntime.InferenceSession(dense.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(tmp_path / "in.onnx").graph.node] == ["FusedConv", "FusedConv"]
    small = narrowed(tmp_path / "in.onnx", dense, "h", 1, (4, 6, 6))
    assert [n.op_type for n in small.graph.node] == ["FusedConv", "FusedConv"]


def test_a_convolution_with_a_sum_in_it_takes_the_fold_as_its_bias(tmp_path: Path) -> None:
    """The operator computes relu(V h + z), so the fold must not go behind the activation."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 5, 1, 1)], "c")
    net.add("Sigmoid", ["c"], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 1, 1)], "v")
    net.add("Add", ["v", "x"], "s")
    net.add("Relu", ["s"], "y")
    dense = net.model(["n", 5, 6, 6], ["n", 5, 6, 6])
    del net.nodes[3:]
    net.nodes[2].input.extend(["", "x"])
    net.nodes[2].output[0] = "y"
    fused(net, 2, "FusedConv", activation="Relu")
    narrowed(file(net, ["n", 5, 6, 6], ["n", 5, 6, 6], tmp_path / "in.onnx"), dense, "h", 1, (5, 6, 6))


def test_products_with_an_activation_or_a_factor(tmp_path: Path) -> None:
    net = Net()
    net.add("Gemm", ["x", net.weight("W", 6, 12), net.weight("b", 12)], "g")
    net.add("Relu", ["g"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "v")
    net.add("Mul", ["v", net.scalar("half", 0.5)], "y")
    dense = net.model(["n", 6], ["n", 5])
    net.nodes = [net.nodes[0], net.nodes[2]]
    net.nodes[0].output[0], net.nodes[1].output[0] = "h", "y"
    fused(net, 0, "FusedGemm", activation="Relu")
    fused(net, 1, "FusedMatMul", alpha=0.5)
    small = narrowed(file(net, ["n", 6], ["n", 5], tmp_path / "in.onnx"), dense, "h", -1, (6,))
    assert [n.op_type for n in small.graph.node] == ["FusedGemm", "FusedMatMul", "Add"]


def test_a_product_of_two_gemms_takes_the_fold_in_front_of_its_activation(tmp_path: Path) -> None:
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Tanh", ["m"], "h")
    net.add("Gemm", ["h", net.weight("V", 12, 5)], "v")
    net.add("Relu", ["v"], "y")
    dense = net.model(["n", 6], ["n", 5])
    net.nodes.pop()
    net.nodes[-1].output[0] = "y"
    fused(net, 2, "FusedGemm", activation="Relu")
    narrowed(file(net, ["n", 6], ["n", 5], tmp_path / "in.onnx"), dense, "h", -1, (6,))


def test_a_norm_of_a_sum_goes_on_counting_what_was_removed(tmp_path: Path) -> None:
    """The norm over the hidden axis adds the outputs of two layers."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "left")
    net.add("MatMul", ["x", net.weight("U", 6, 12)], "right")
    net.add("Add", ["left", "right"], "a")
    net.add("Add", ["a", net.weight("added", 12)], "s")
    net.add("LayerNormalization", ["s", net.weight("scale", 12), net.weight("shift", 12)], "h", epsilon=1e-3)
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    dense = net.model(["n", 6], ["n", 5])
    net.nodes[2:5] = [
        helper.make_node(
            "SkipLayerNormalization",
            ["left", "right", "scale", "shift", "added"],
            ["h"],
            domain=MICROSOFT,
            epsilon=1e-3,
        )
    ]
    data = [RANDOM.standard_normal((8, 6)).astype(np.float32) for _ in range(3)]
    source = file(net, ["n", 6], ["n", 5], tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(source, data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    (entry,) = pruned.plan.blocks
    means = {
        name: np.concatenate([values(dense, name, {"x": x}) for x in data]).astype(np.float64).mean(0) for name in "sh"
    }
    reference = substituted(substituted(dense, "s", -1, entry.pruned, means["s"]), "h", -1, entry.pruned, means["h"])
    (got,), (wanted,) = (run(m, {"x": data[0][:3]}) for m in (out, reference))
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()
