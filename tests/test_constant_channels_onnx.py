"""Padded and transposed convolutions from ONNX to ONNX: constant channels in files of torch and of other producers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_direct
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_files import Array, Net, run, substituted
from onnxruntime.transformers.float16 import convert_float_to_float16
from oracle import randomize
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import vbpfx
from vbpfx.outputs.differences import relative_error

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
# The file rounds every value to 11 bits at about ten consecutive nodes; the reference does not.
HALF = 1e-2


def normed(net: Net, x: str, width: int, name: str, *shared: str) -> str:
    """Add a BatchNormalization; its scale, mean and variance may be stored already."""
    scale, mean, variance = shared or (f"{name}_scale", f"{name}_mean", f"{name}_variance")
    if not shared:
        net.vector(scale, *net.random.uniform(0.5, 1.5, width))
        net.vector(mean, *net.random.uniform(-0.3, 0.3, width))
        net.vector(variance, *net.random.uniform(0.5, 1.5, width))
    net.vector(f"{name}_shift", *net.random.uniform(0.5, 1.5, width))
    net.add("BatchNormalization", [x, scale, f"{name}_shift", mean, variance], name)
    return name


def with_norm(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    net.add("Conv", ["x", net.weight("W", 12, 4, 3, 3)], "c", pads=[1, 1, 1, 1])
    net.add("Relu", [normed(net, "c", 12, "b")], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 3, 3)], "y", pads=[1, 1, 1, 1])
    return net.model(["n", 4, "a", "b"], ["n", 5, "c", "d"])


def folded(kind: str = "Conv") -> onnx.ModelProto:
    """The norm is folded into the bias of the first convolution, as simplifiers do; the second is strided and dilated."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1), net.vector("B", *net.random.uniform(0.5, 1.5, 12))], "c")
    net.add("Relu", ["c"], "h")
    if kind == "Conv":
        reader, windows = net.weight("V", 5, 12, 3, 3), {"pads": [2, 3, 2, 3], "strides": [2, 1], "dilations": [1, 2]}
    else:
        reader, windows = (
            net.weight("V", 12, 5, 3, 3),
            {"pads": [1, 0, 1, 0], "strides": [2, 2], "output_padding": [1, 0]},
        )
    net.add(kind, ["h", reader, net.weight("D", 5)], "y", **windows)
    return net.model(["n", 4, "a", "b"], ["n", 5, "c", "d"])


def pooled() -> onnx.ModelProto:
    """Pooling with padding that averages do not count, a slope per channel, and a gate between the convolutions."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1), net.vector("B", *net.random.uniform(0.5, 1.5, 12))], "c")
    net.stored["slope"] = net.random.uniform(0.1, 0.5, (12, 1, 1)).astype(np.float32)
    net.add("PRelu", ["c", "slope"], "p")
    net.add("MaxPool", ["p"], "m", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    net.add("AveragePool", ["m"], "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=0)
    net.add("Sigmoid", ["a"], "s")
    net.add("Mul", ["a", "s"], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 3, 3)], "y", pads=[1, 1, 1, 1])
    return net.model(["n", 4, "a", "b"], ["n", 5, "c", "d"])


def shared_weight() -> onnx.ModelProto:
    """One weight is read by a padded node and by one that does not pad."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1), net.vector("B", *net.random.uniform(0.5, 1.5, 12))], "c")
    net.add("Relu", ["c"], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 3, 3)], "first", pads=[1, 1, 1, 1])
    net.add("Conv", ["h", "V"], "inner")
    net.add("Pad", ["inner", net.integers("around", 0, 0, 1, 1, 0, 0, 1, 1)], "second")
    net.add("Add", ["first", "second"], "y")
    return net.model(["n", 4, "a", "b"], ["n", 5, "c", "d"])


def padded_in_front() -> onnx.ModelProto:
    """Uneven padding is a call of its own in the graph, and constants behind it go into the bias."""
    net = Net()
    net.add("Conv", ["x", net.weight("W", 12, 4, 1, 1), net.vector("B", *net.random.uniform(0.5, 1.5, 12))], "c")
    net.add("Relu", ["c"], "r")
    net.add("Pad", ["r", net.integers("around", 0, 0, 1, 0, 0, 0, 2, 1)], "h")
    net.add("Conv", ["h", net.weight("V", 5, 12, 3, 3)], "y")
    return net.model(["n", 4, "a", "b"], ["n", 5, "c", "d"])


FILES: dict[str, Callable[[], onnx.ModelProto]] = {
    "norm, opset 13": lambda: with_norm(13),
    "norm, opset 17": lambda: with_norm(17),
    "folded": folded,
    "transposed": lambda: folded("ConvTranspose"),
    "pooling": pooled,
    "shared weight": shared_weight,
    "padded in front": padded_in_front,
}


def pictures(*size: int, seed: int = 0, count: int = 3) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((4, 4, *size)).astype(np.float32) for _ in range(count)]


def reference(model: onnx.ModelProto, pruned: vbpfx.PrunedOnnx) -> onnx.ModelProto:
    """Return the dense file with the constants of the plan in place of the removed channels."""
    (entry,) = pruned.plan.blocks
    values = np.zeros(entry.block.width)
    values[list(entry.pruned)] = entry.constants[0].numpy()
    return substituted(model, "h", 1, entry.pruned, values)


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FILES)
def test_the_file_computes_what_the_plan_says_at_every_size(name: str, tmp_path: Path) -> None:
    model, out = FILES[name](), tmp_path / "out.onnx"
    onnx.save(model, tmp_path / "in.onnx")
    pruned = vbpfx.prune_onnx(
        tmp_path / "in.onnx", pictures(6, 5), out, ratio=0.5, method="vbp", round_to=1, progress=False
    )
    (entry,) = pruned.plan.blocks
    assert entry.width == 6
    assert len(entry.constants_in) == (name != "padded in front")
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert {tuple(t.dims) for t in small.graph.initializer if t.name in "WV"} < {
        (6, 4, 3, 3), (6, 4, 1, 1), (5, 6, 3, 3), (6, 5, 3, 3)
    }  # fmt: skip
    expected = reference(model, pruned)
    for seed, size in enumerate(((6, 5), (9, 4), (4, 8)), start=1):
        (x,) = pictures(*size, seed=seed, count=1)
        (found,), (wanted,), (dense,) = (run(m, {"x": x}) for m in (out, expected, model))
        assert relative(found, wanted) < ROUNDING
        assert relative(wanted, dense) > 100 * ROUNDING


def test_norms_that_share_their_tensors(tmp_path: Path) -> None:
    """Exporters store equal tensors once. Each block sets a scale, a mean and a variance of its own."""
    net, source = Net(), "x"
    shared = (
        net.vector("small", *np.full(12, 0.1)),
        net.vector("zeros", *np.zeros(12)),
        net.vector("ones", *np.ones(12)),
    )
    for block in ("first", "second"):
        net.add("Conv", [source, net.weight(f"{block}_W", 12, 4, 3, 3)], f"{block}_c", pads=[1, 1, 1, 1])
        net.add("Relu", [normed(net, f"{block}_c", 12, f"{block}_b", *shared)], f"{block}_h")
        source = "y" if block == "second" else f"{block}_y"
        net.add("Conv", [f"{block}_h", net.weight(f"{block}_V", 4, 12, 3, 3)], source, pads=[1, 1, 1, 1])
    model, out = net.model(["n", 4, "a", "b"], ["n", 4, "c", "d"]), tmp_path / "out.onnx"
    onnx.save(model, tmp_path / "in.onnx")
    pruned = vbpfx.prune_onnx(
        tmp_path / "in.onnx",
        pictures(6, 5),
        out,
        ratio=0.5,
        method="vbp",
        allocation="equal",
        round_to=1,
        progress=False,
    )
    assert [len(entry.constants_in) for entry in pruned.plan.blocks] == [1, 1]
    expected = model
    for value, entry in zip(("first_h", "second_h"), pruned.plan.blocks, strict=True):
        means = np.zeros(12)
        means[list(entry.pruned)] = entry.constants[0].numpy()
        expected = substituted(expected, value, 1, entry.pruned, means)
    (x,) = pictures(9, 4, seed=1, count=1)
    assert relative(run(out, {"x": x})[0], run(expected, {"x": x})[0]) < ROUNDING


@pytest.mark.parametrize("name", ["norm, opset 17", "folded", "transposed"])
def test_float16_files(name: str, tmp_path: Path) -> None:
    wide = FILES[name]()
    for stored in wide.graph.initializer:
        if stored.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(stored).astype(np.float16).astype(np.float32)
            stored.CopyFrom(numpy_helper.from_array(rounded, stored.name))
    onnx.save(convert_float_to_float16(wide), tmp_path / "in.onnx")
    data = [x.astype(np.float16) for x in pictures(6, 5)]
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=0.5, method="vbp", round_to=1, progress=False)
    assert pruned.plan.blocks[0].constants_in
    assert {t.data_type for t in onnx.load(out).graph.initializer if t.name in "WV"} == {TensorProto.FLOAT16}
    x = pictures(9, 4, seed=1, count=1)[0].astype(np.float16)
    (found,) = run(out, {"x": x})
    (wanted,) = run(reference(wide, pruned), {"x": x.astype(np.float32)})
    assert relative(found, wanted) < HALF


def small_resnet() -> nn.Module:
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64)
    net.layer3, net.layer4 = nn.Identity(), nn.Identity()
    net.fc = nn.Linear(128, 5)
    return randomize(net).eval()


@pytest.mark.parametrize("dynamo", [True, False])
def test_the_same_as_through_the_model(dynamo: bool, tmp_path: Path) -> None:
    """Both exporters fold norms into convolutions, so the constant channel is made by a bias in the file."""
    data = [{"x": torch.randn(4, 3, 32, 32)} for _ in range(2)]
    model = small_resnet()
    network = onnx_direct.Network(model, data, data[0])
    onnx_direct.export(network, tmp_path / "in.onnx", dynamo=dynamo)
    direct = vbpfx.prune_onnx(
        tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False
    )
    batches = [batch["x"] for batch in data]
    through = vbpfx.prune(model, batches, ratio=0.5, method="vbp", progress=False)
    assert [e.kept for e in direct.plan.blocks] == [e.kept for e in through.plan.blocks]
    assert sum(len(e.constants_in) for e in direct.plan.blocks) == 2
    x = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        assert relative_error([torch.from_numpy(found)], [through.graph_module(x)]) < ROUNDING


def _graph() -> tuple[vbpfx.Pruned, Tensor]:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.Tanh()]
    model = randomize(nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)))
    nn.init.uniform_(model[1].bias, 1.0, 2.0)
    pruned = vbpfx.prune(model, [torch.randn(16, 3, 8, 8)], ratio=0.5, method="vbp", progress=False)
    return pruned, torch.randn(5, 3, 8, 8)


def test_an_exported_graph_computes_the_same_in_onnx_runtime(tmp_path: Path) -> None:
    pruned, x = _graph()
    assert any(entry.constants_in for entry in pruned.plan.blocks)
    session = onnxruntime.InferenceSession(str(pruned.to_onnx(tmp_path / "a.onnx")), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative_error([torch.from_numpy(found)], [pruned.graph_module(x)]) < ROUNDING


def test_a_file_that_was_narrowed_can_be_narrowed_again(tmp_path: Path) -> None:
    model = with_norm(17)
    onnx.save(model, tmp_path / "0.onnx")
    for number in range(2):
        pruned = vbpfx.prune_onnx(
            tmp_path / f"{number}.onnx", pictures(6, 5), tmp_path / f"{number + 1}.onnx", ratio=0.34, method="vbp",
            round_to=1, progress=False,
        )  # fmt: skip
    (entry,) = pruned.plan.blocks
    assert (entry.block.width, entry.width, len(entry.constants_in)) == (8, 5, 1)
    (x,) = pictures(9, 4, seed=1, count=1)
    expected = reference(onnx.load(tmp_path / "1.onnx"), pruned)
    assert relative(run(tmp_path / "2.onnx", {"x": x})[0], run(expected, {"x": x})[0]) < ROUNDING
