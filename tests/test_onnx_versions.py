"""Files with opsets before 13 are converted, compared with the original file, and pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Net, mlp, run, substituted, values

import vbpfx
from vbpfx.onnx_graph.file import read_model

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
RATIO, KEPT = 5 / 12, 7
RANDOM = np.random.default_rng(0)


def of_opset(net: Net, opset: int, x: list[Any], y: list[Any], *, ir_version: int = 4) -> onnx.ModelProto:
    """Make a file of an older opset; before IR version 4, initializers are inputs, too."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    if ir_version < 4:
        inputs += [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in net.stored.items()
        ]
    graph = helper.make_graph(
        net.nodes,
        "net",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(a, n) for n, a in net.stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model.producer_name = "by hand"
    helper.set_model_props(model, {"kept": "yes"})
    onnx.checker.check_model(model)
    return model


def perceptron(net: Net) -> None:
    mlp(net)


def attributes(net: Net) -> None:
    """Axes, bounds and split sizes are attributes, which are inputs in opset 13."""
    net.add("Unsqueeze", ["x"], "u", axes=[1])
    net.add("Squeeze", ["u"], "s", axes=[1])
    net.add("MatMul", ["s", net.weight("W", 6, 24)], "m")
    net.add("Split", ["m"], ["left", "right"], axis=1, split=[12, 12])
    net.add("Clip", ["right"], "open", min=0.0, max=1.0)
    net.add("Mul", ["left", "open"], "gated")
    net.add("Dropout", ["gated"], "h", ratio=0.5)
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "v")
    net.add("ReduceSum", ["v"], "total", axes=[1], keepdims=1)
    net.add("Softmax", ["v"], "share", axis=1)
    net.add("Mul", ["total", "share"], "y")


def images(mode: str) -> Callable[[Net], None]:
    """Make an Upsample between two 1x1 convolutions; opset 9 does not name its coordinate mode."""

    def make(net: Net) -> None:
        net.add("Conv", ["x", net.weight("W", 12, 6, 1, 1)], "c")
        net.stored["variance"] = np.linspace(0.5, 2, 12, dtype=np.float32)
        net.add(
            "BatchNormalization", ["c", net.weight("scale", 12), net.weight("shift", 12), net.weight("mean", 12), "variance"], "n"
        )  # fmt: skip
        net.add("Relu", ["n"], "r")
        net.add("Upsample", ["r", net.vector("scales", 1, 1, 2, 2)], "h", mode=mode)
        net.add("Conv", ["h", net.weight("V", 5, 12, 1, 1)], "y")

    return make


FORMS = [
    *((perceptron, opset, (6,), -1) for opset in (7, 9, 10, 11, 12)),
    (attributes, 9, (6,), -1),
    (images("nearest"), 9, (6, 4, 4), 1),
    (images("linear"), 9, (6, 4, 4), 1),
]


@pytest.mark.parametrize(("make", "opset", "shape", "axis"), FORMS)
def test_an_earlier_opset_is_converted_and_pruned(
    make: Callable[[Net], None], opset: int, shape: tuple[int, ...], axis: int, tmp_path: Path
) -> None:
    """The written file equals the file of the earlier opset with the removed channels at their means."""
    net = Net()
    make(net)
    model = of_opset(net, opset, ["n", *shape], ["n", 5, *(2 * size for size in shape[1:])])
    onnx.save(model, tmp_path / "in.onnx")
    data, out = [RANDOM.standard_normal((16, *shape)).astype(np.float32) for _ in range(3)], tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert [(o.domain, o.version) for o in small.opset_import] == [("", 13)]
    assert (small.producer_name, small.metadata_props) == (model.producer_name, model.metadata_props)
    assert list(small.graph.input) == list(model.graph.input)
    assert list(small.graph.output) == list(model.graph.output)
    (entry,) = pruned.plan.blocks
    assert len(entry.kept) == KEPT
    hidden = np.concatenate([np.moveaxis(values(model, "h", {"x": x}), axis, -1).reshape(-1, 12) for x in data])
    reference = substituted(model, "h", axis, entry.pruned, hidden.astype(np.float64).mean(0))
    got, wanted = (run(m, {"x": data[0][:3]})[0] for m in (out, reference))
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.5, 1.7, 2.0, 2.3])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_pictures_are_resized_as_before(mode: str, factor: float, tmp_path: Path) -> None:
    """Opset 10 has one way to place and round sampling points; later opsets name theirs and have other defaults."""
    net = Net()
    net.add("Resize", ["x", net.vector("scales", 1, 1, factor, factor)], "y", mode=mode)
    size = int(np.floor(np.float32(10) * np.float32(factor)))
    model = of_opset(net, 10, ["n", 3, 10, 10], ["n", 3, size, size])
    onnx.save(model, tmp_path / "in.onnx")
    new = ir.serde.serialize_model(read_model(tmp_path / "in.onnx"))
    assert [entry.version for entry in new.opset_import] == [13]
    x = RANDOM.standard_normal((2, 3, 10, 10)).astype(np.float32)
    (got,), (wanted,) = (run(m, {"x": x}) for m in (new, model))
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()


def test_initializers_that_are_inputs_stay_inputs(tmp_path: Path) -> None:
    net = Net()
    mlp(net)
    net.stored["dense_1/kernel"] = np.tile(net.stored["dense_1/kernel"], (1, 6))  # too large for the converter
    net.stored["dense_1/bias"] = np.tile(net.stored["dense_1/bias"], 6)
    net.stored["dense_2/kernel"] = np.tile(net.stored["dense_2/kernel"], (6, 1))
    model = of_opset(net, 9, ["n", 6], ["n", 5], ir_version=3)
    onnx.save(model, tmp_path / "in.onnx")
    data = [RANDOM.standard_normal((16, 6)).astype(np.float32)]
    pruned = vbpfx.prune_onnx(
        tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False
    )
    small = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(small, full_check=True)
    assert {i.name for i in small.graph.input} == {i.name for i in model.graph.input}
    assert [len(entry.kept) for entry in pruned.plan.blocks] == [36]


def test_weights_beside_a_file_of_an_earlier_opset(tmp_path: Path) -> None:
    net = Net()
    mlp(net)
    model = of_opset(net, 11, ["n", 6], ["n", 5])
    outside = onnx.ModelProto()
    outside.CopyFrom(model)  # saving clears the tensors of the copy
    onnx.save(outside, tmp_path / "in.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = [RANDOM.standard_normal((16, 6)).astype(np.float32)]
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    hidden = values(model, "h", {"x": data[0]}).astype(np.float64)
    reference = substituted(model, "h", -1, pruned.plan.blocks[0].pruned, hidden.mean(0))
    got, wanted = (run(m, {"x": data[0]})[0] for m in (out, reference))
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()


def test_a_conversion_that_changes_the_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter is an external library, so its result is compared with the original file."""
    net = Net()
    mlp(net)
    onnx.save(of_opset(net, 9, ["n", 6], ["n", 5]), tmp_path / "in.onnx")
    from onnx import version_converter

    convert = version_converter.convert_version

    def wrongly(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        made = convert(model, version)
        next(node for node in made.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
        return made

    monkeypatch.setattr(version_converter, "convert_version", wrongly)
    data = [RANDOM.standard_normal((16, 6)).astype(np.float32)]
    with pytest.raises(
        vbpfx.CaptureError, match=r"ONNX's version converter changed what .* \(opset 9\) computes: the outputs differ"
    ):
        vbpfx.prune_onnx(tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert not (tmp_path / "out.onnx").exists()


def test_what_the_converter_does_not_take_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    mlp(net)
    onnx.save(of_opset(net, 9, ["n", 6], ["n", 5]), tmp_path / "in.onnx")
    from onnx import version_converter

    def fails(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError("No Adapter For Relu")

    monkeypatch.setattr(version_converter, "convert_version", fails)
    data = [RANDOM.standard_normal((16, 6)).astype(np.float32)]
    with pytest.raises(vbpfx.CaptureError, match=r"opset 9, .* cannot bring it to opset 13 \(No Adapter For Relu\)"):
        vbpfx.prune_onnx(tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
