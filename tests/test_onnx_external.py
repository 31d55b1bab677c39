"""External data stays external in the folder of its file, and a network is never in memory twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Net, run

import vbpfx

OUTSIDE = "which is outside the folder of the file"


def wide(folder: Path) -> tuple[Path, onnx.ModelProto]:
    net = Net()
    net.add("MatMul", ["x", net.weight("up", 16, 512)], "m")
    net.add("Add", ["m", net.weight("up_bias", 512)], "a")
    net.add("Relu", ["a"], "h")
    net.add("MatMul", ["h", net.weight("down", 512, 16)], "d")
    net.add("Add", ["d", net.weight("down_bias", 16)], "y")
    model = net.model(["n", 16], ["n", 16])
    path = folder / "in.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path, onnx.load(path)


def test_external_data_stays_external(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, model = wide(tmp_path / "a")
    data = [np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)]
    out = tmp_path / "b" / "out.onnx"
    pruned = vbpfx.prune_onnx(path, data, out, ratio=0.5, method="vbp", progress=False)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    stored = {t.name: t for t in onnx.load(out, load_external_data=False).graph.initializer}
    outside = {n for n, t in stored.items() if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == {"up", "down"}
    assert (out.parent / "out.onnx.data").stat().st_size == 2 * 4 * 16 * 256
    # The result equals that from a single file.
    onnx.save(model, tmp_path / "one.onnx")
    alone = vbpfx.prune_onnx(
        tmp_path / "one.onnx", data, tmp_path / "b" / "one.onnx", ratio=0.5, method="vbp", progress=False
    )
    assert pruned.plan.blocks[0].kept == alone.plan.blocks[0].kept
    assert np.array_equal(*(run(p, {"x": data[0]})[0] for p in (out, alone.path)))


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """The dense graph's parameters are memory-mapped from the file."""
    path, _ = wide(tmp_path)
    data = [np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)]
    pruned = vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    pages = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "weights.bin" in line]
    spans = [tuple(int(end, 16) for end in entry[0].split("-")) for entry in pages]
    for name, parameter in pruned.captured.graph_module.named_parameters():
        mapped = any(start <= parameter.data_ptr() < stop for start, stop in spans)
        assert mapped == (name != "down_bias"), name


def test_the_default_export_of_torch_is_pruned(tmp_path: Path) -> None:
    """torch stores even the smallest tensors externally, and the graph maps their memory while the file is written."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)).eval()
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    x, batch = torch.randn(32, 16), torch.export.Dim("batch")
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    stored = onnx.load(path, load_external_data=False).graph.initializer
    if not all(
        tensor.data_location == TensorProto.EXTERNAL for tensor in stored
    ):  # some versions of the exporter do this
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="in.onnx.data", size_threshold=0)
    pruned = vbpfx.prune_onnx(path, [x], out, ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    hidden = model[1](model[0](x)).double().detach()
    hidden[:, list(entry.pruned)] = hidden[:, list(entry.pruned)].mean(0)
    expected = hidden @ model[2].weight.double().T + model[2].bias.double()
    (found,) = run(out, {onnx.load(path).graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-5)  # float32 against float64


def named(path: Path, location: str) -> None:
    """Set the location of the file's external data."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def absolute(path: Path, data: Path) -> None:
    named(path, str(data))


def above(path: Path, data: Path) -> None:
    named(path, f"../{data.parent.name}/{data.name}")


def linked(path: Path, data: Path) -> None:
    (path.parent / "weights.bin").symlink_to(data)


def through_a_folder(path: Path, data: Path) -> None:
    (path.parent / "folder").symlink_to(data.parent)
    named(path, f"folder/{data.name}")


@pytest.mark.parametrize("relative", [False, True], ids=["whole path", "name in the working directory"])
@pytest.mark.parametrize("point", [absolute, above, linked, through_a_folder])
def test_data_outside_the_folder_is_not_read(
    point: Callable[[Path, Path], None], relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrusted file must not make us read other files. The data is valid, so without a check it would be pruned."""
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir()
    elsewhere.mkdir()
    path, _ = wide(inside)
    (inside / "weights.bin").rename(elsewhere / "weights.bin")
    point(path, elsewhere / "weights.bin")
    if relative:
        monkeypatch.chdir(inside)
        path = Path("in.onnx")
    data = [np.zeros((4, 16), np.float32)]
    with pytest.raises(
        vbpfx.ArtifactError, match=f"in.onnx keeps up in .*{OUTSIDE}.*put a copy of the data into its folder"
    ):
        vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, progress=False)
    assert not (tmp_path / "out.onnx").exists()


def test_data_that_is_a_hard_link_is_not_read(tmp_path: Path) -> None:
    """A hard link does not show which other file it is."""
    path, _ = wide(tmp_path)
    os.link(tmp_path / "weights.bin", tmp_path / "other.bin")
    with pytest.raises(vbpfx.ArtifactError, match=r"keeps up in 'weights.bin', which is also .*hard link.*put a copy"):
        vbpfx.prune_onnx(path, [np.zeros((4, 16), np.float32)], tmp_path / "out.onnx", ratio=0.5, progress=False)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    path, _ = wide(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "weights.bin").rename(tmp_path / "data" / "all.bin")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "data" / "all.bin")
    data = [np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)]
    pruned = vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert pruned.plan.widths == {"up->down": 256}


def outside(array: np.ndarray, name: str, path: Path) -> onnx.TensorProto:
    """Append an array to a data file and return an external tensor that refers to it."""
    tensor = numpy_helper.from_array(array, name)
    offset = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, path.name, offset, array.nbytes)
    tensor.ClearField("raw_data")
    return tensor


def scattered(folder: Path) -> Path:
    """External tensors in unusual places: in a Constant and in the branches of an If."""
    random = np.random.default_rng(0)
    values = {
        "up": random.standard_normal((16, 512)).astype(np.float32),
        "down": random.standard_normal((512, 16)).astype(np.float32),
        "shift": np.ones(512, np.float32),
    }
    value = helper.make_tensor_value_info
    stored = {name: outside(array, name, folder / "weights.bin") for name, array in values.items()}
    branches = {
        name: helper.make_graph(
            [helper.make_node("Add", ["d", name], [f"{name}_d"])], name, [],
            [value(f"{name}_d", TensorProto.FLOAT, ["n", 16])],
            [outside(np.full(16, shift, np.float32), name, folder / "weights.bin")],
        )
        for name, shift in (("one", 1), ("two", 2))
    }  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["shift"], value=stored["shift"]),
        helper.make_node("MatMul", ["x", "up"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["d"]),
        helper.make_node("If", ["which"], ["y"], then_branch=branches["one"], else_branch=branches["two"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["n", 16]), value("which", TensorProto.BOOL, [])]
    outputs = [value("y", TensorProto.FLOAT, ["n", 16])]
    graph = helper.make_graph(nodes, "scattered", inputs, outputs, [stored["up"], stored["down"]])
    path = folder / "in.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    return path


def test_external_data_of_constants_and_branches(tmp_path: Path) -> None:
    """The written file is self-contained and does not refer to the data of the original one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = scattered(tmp_path / "a")
    x = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    data = [{"x": x, "which": np.array(True)}]
    pruned = vbpfx.prune_onnx(path, data, tmp_path / "b" / "out.onnx", ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    random = np.random.default_rng(0)
    up, down = (random.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in ((16, 512), (512, 16)))
    hidden = np.maximum(x.astype(np.float64) @ up + 1, 0)
    hidden[:, list(entry.pruned)] = hidden[:, list(entry.pruned)].mean(0)
    for which, shift in ((True, 1), (False, 2)):
        (found,) = run(pruned.path, {"x": x, "which": np.array(which)})
        expected = hidden @ down + shift
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("place", ["Constant", "branch"])
def test_outside_the_folder_in_constants_and_branches(place: str, tmp_path: Path) -> None:
    path = scattered(tmp_path)
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == ("Constant" if place == "Constant" else "If"))
    tensor = node.attribute[0].t if place == "Constant" else node.attribute[0].g.initializer[0]
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    data = [{"x": np.zeros((4, 16), np.float32), "which": np.array(True)}]
    with pytest.raises(vbpfx.ArtifactError, match=f"'../weights.bin', {OUTSIDE}"):
        vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, progress=False)
