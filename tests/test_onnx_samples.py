"""Samples for ONNX files from .npy and .npz: named inputs of any rank, and the output of inspect for a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Net, mlp, with_biases
from PIL import Image
from typer.testing import CliRunner

import vbpfx
from vbpfx.cli import app
from vbpfx.onnx_graph.data import data_for_file
from vbpfx.pipeline.onnx_opened import typical_batch

RANDOM = np.random.default_rng(0)
Shape = list[int | str]


def taking(folder: Path, inputs: dict[str, tuple[int, Shape]]) -> Path:
    """Write a file with those inputs that returns the first one."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    first = next(iter(inputs))
    output = helper.make_tensor_value_info("y", *inputs[first])
    graph = helper.make_graph([helper.make_node("Identity", [first], ["y"])], "taking", values, [output])
    path = folder / "in.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def require_batches(found: Any, expected: list[dict[str, np.ndarray]]) -> None:
    found = list(found)
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(batch[name], array)


def test_samples_stand_where_the_file_has_them(tmp_path: Path) -> None:
    """A state with the batch as its second axis, a number and a table that are the same for all batches, and labels."""
    inputs: dict[str, tuple[int, Shape]] = {
        "x": (TensorProto.FLOAT, ["batch", 8]),
        "state": (TensorProto.FLOAT, [2, "batch", 3]),
        "rate": (TensorProto.INT64, []),
        "table": (TensorProto.FLOAT, [5, 2]),
    }
    path = taking(tmp_path, inputs)
    x, state, table = floats(10, 8), floats(2, 10, 3), floats(5, 2)
    rate = np.array(16000)
    np.savez(tmp_path / "data.npz", x=x, state=state, rate=rate, table=table, labels=np.arange(3))
    require_batches(
        data_for_file(path, tmp_path / "data.npz", batch=4),
        [{"x": x[i:j], "state": state[:, i:j], "rate": rate, "table": table} for i, j in ((0, 4), (4, 8), (8, 10))],
    )


def test_arrays_of_one_axis_more_are_batches(tmp_path: Path) -> None:
    """The axes of nodes and edges of a graph are not batch axes."""
    inputs: dict[str, tuple[int, Shape]] = {
        "nodes": (TensorProto.FLOAT, ["nodes", 8]),
        "edges": (TensorProto.INT64, [2, "links"]),
        "scale": (TensorProto.FLOAT, []),
    }
    path = taking(tmp_path, inputs)
    nodes, edges, scale = floats(3, 20, 8), RANDOM.integers(0, 20, (3, 2, 50)), floats(3)
    np.savez(tmp_path / "data.npz", nodes=nodes, edges=edges, scale=scale)
    require_batches(
        data_for_file(path, tmp_path / "data.npz", batch=32),
        [{"nodes": nodes[i], "edges": edges[i], "scale": scale[i]} for i in range(3)],
    )


def test_samples_of_a_file_that_knows_no_samples(tmp_path: Path) -> None:
    """The file takes one image without a batch axis; the data is an array of images."""
    path = taking(tmp_path, {"x": (TensorProto.FLOAT, [3, 4, 4])})
    images = floats(5, 3, 4, 4)
    np.save(tmp_path / "data.npy", images)
    found = list(data_for_file(path, tmp_path / "data.npy", batch=32))
    assert len(found) == 5
    for batch, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(batch, image)


def test_different_numbers_of_samples_are_named(tmp_path: Path) -> None:
    path = taking(tmp_path, {"x": (TensorProto.FLOAT, ["n", 8]), "z": (TensorProto.FLOAT, ["n", 2])})
    np.savez(tmp_path / "data.npz", x=floats(10, 8), z=floats(9, 2))
    with pytest.raises(
        vbpfx.CalibrationError, match=r"must all have the same number of samples, at least 1; found \{'x': 10, 'z': 9\}"
    ):
        data_for_file(path, tmp_path / "data.npz", batch=4)


def two_inputs(folder: Path) -> Path:
    """Write relu((x + scale z) W) V, with two tensor inputs and a number."""
    net = Net()
    net.add("Mul", ["z", "scale"], "zs")
    net.add("Add", ["x", "zs"], "s")
    net.add("MatMul", ["s", net.weight("W", 6, 32)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 32, 5)], "y")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        net.nodes, "net",
        [value("x", TensorProto.FLOAT, ["n", "t", 6]), value("z", TensorProto.FLOAT, ["n", 1, 6]), value("scale", TensorProto.FLOAT, [])],
        [value("y", TensorProto.FLOAT, ["n", "t", 5])],
        [numpy_helper.from_array(array, name) for name, array in net.stored.items()],
    )  # fmt: skip
    path = folder / "in.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_takes_several_inputs_of_any_rank(tmp_path: Path) -> None:
    """The kept neurons are those with the largest variances computed by hand."""
    path, data = two_inputs(tmp_path), tmp_path / "data.npz"
    x, z, scale = floats(24, 7, 6), floats(24, 1, 6), np.array(0.5, np.float32)
    np.savez(data, x=x, z=z, scale=scale)
    given = ("--data", data, "--out", tmp_path / "out.onnx", "--batch", "8", "--ratio", "0.25", "--method", "vbp")
    result = run_cli("onnx", path, *given)
    assert result.exit_code == 0, result.output
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    hidden = np.maximum((x + scale * z).astype(np.float64) @ stored["W"], 0).reshape(-1, 32)
    kept = np.sort(np.argsort(hidden.var(0))[8:])
    small = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    np.testing.assert_array_equal(small["W"], stored["W"][:, kept])


def test_the_command_takes_the_parts_of_a_method(tmp_path: Path) -> None:
    """Neurons are chosen by the norms of their weights without compensation, and an unknown mask is an error."""
    path, data, out = tmp_path / "in.onnx", tmp_path / "x.npy", tmp_path / "out.onnx"
    onnx.save(with_biases(), path)
    np.save(data, floats(16, 6))
    parts = ("--criterion", "magnitude", "--allocation", "global", "--compensation", "none", "--runtime", "none")
    result = run_cli("onnx", path, "--data", data, "--out", out, "--ratio", "0.5", "--method", "vbp", *parts)
    assert result.exit_code == 0, result.output
    stored, small = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer} for file in (path, out)
    )
    squares = {name: np.square(array.astype(np.float64)) for name, array in stored.items()}
    kept = np.sort(np.argsort(squares["dense_1/kernel"].sum(0) + squares["dense_2/kernel"].sum(1))[6:])
    np.testing.assert_array_equal(small["dense_1/kernel"], stored["dense_1/kernel"][:, kept])
    np.testing.assert_array_equal(small["dense_2/bias"], stored["dense_2/bias"])
    unknown = run_cli("onnx", path, "--data", data, "--out", out, "--ratio", "0.5", "--mask", "nowhere")
    assert unknown.exit_code == 1
    assert "mask='nowhere' is not an input of the captured graph" in " ".join(unknown.output.split())


def test_inspect_shows_the_blocks_and_all_refusals_of_a_file(tmp_path: Path) -> None:
    net = Net()
    mlp(net, bias=False)
    net.add("Reshape", ["y", net.integers("as_image", -1, 5, 1, 1)], "c0")
    for i in range(10):  # padded convolutions whose inputs cannot be narrowed: no bias makes a channel of them constant
        net.add("Conv", [f"c{i}", net.weight(f"conv{i}", 5, 5, 3, 3)], f"d{i}", pads=[1, 1, 1, 1])
        net.add("Relu", [f"d{i}"], f"c{i + 1}")
    path = tmp_path / "in.onnx"
    model = net.model(["n", 6], ["n", 5])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("c10", TensorProto.FLOAT, ["n", 5, 1, 1]))
    onnx.save(model, path)
    result = run_cli("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [(b["name"], b["width"]) for b in found["blocks"]] == [("dense_1_kernel->dense_2_kernel", 12)]
    assert found["params"] == 6 * 12 + 12 + 12 * 5 + 10 * 5 * 5 * 9
    assert found["macs"] == 6 * 12 + 12 * 5 + 10 * 5 * 5 * 9
    reason = "a padded or transposed convolution reads it"
    assert len([r for r in found["refusals"] if reason in r["reason"]]) == 10
    assert " ".join(run_cli("inspect", path).output.split()).count(reason) == 10


def test_inspect_asks_for_samples_where_the_file_does_not_say_how_long_they_are(tmp_path: Path) -> None:
    path = two_inputs(tmp_path)
    result = run_cli("inspect", path)
    assert result.exit_code == 1
    assert (
        "in.onnx does not give the size of every axis of its input 'x' (n, t, 6). Pass samples: --data" in result.output
    )
    np.savez(tmp_path / "data.npz", x=floats(4, 7, 6), z=floats(4, 1, 6), scale=np.array(0.5, np.float32))
    result = run_cli("inspect", path, "--data", tmp_path / "data.npz", "--json")
    assert [b["width"] for b in json.loads(result.output)["blocks"]] == [32]
    result = run_cli("inspect", path, "--shape", "7x6")
    assert result.exit_code == 1
    assert "is an ONNX file" in result.output


def test_typical_batches_are_of_the_stated_types_and_sizes(tmp_path: Path) -> None:
    onnx.save(with_biases(), tmp_path / "in.onnx")
    (array,) = typical_batch(tmp_path / "in.onnx").values()
    assert (array.shape, array.dtype) == ((2, 6), np.float32)
    path = taking(tmp_path, {"ids": (TensorProto.INT64, [1, 9]), "which": (TensorProto.BOOL, [])})
    found = typical_batch(path)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        "ids": ((1, 9), np.dtype(np.int64)), "which": ((), np.dtype(bool)),
    }  # fmt: skip


def _photographs(folder: Path, count: int, side: int = 12) -> np.ndarray:
    """Grey and coloured images in a folder for each of two classes; what they hold, (count, side, side, 3), by name."""
    pixels = RANDOM.integers(0, 256, (count, side, side, 3), np.uint8)
    for number, image in enumerate(pixels):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{number % 2}" / f"{number}.png")
    return np.concatenate([pixels[::2], pixels[1::2]])


def test_a_folder_of_images_is_read_for_a_file_of_one_image(tmp_path: Path) -> None:
    """Pixels over 255, less 0.5, over 0.25, at the size that the file states, in whole batches where their size is fixed."""
    pixels = _photographs(tmp_path / "photos", 10)
    expected = ((pixels / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    how: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop": 1.0}
    for samples, sizes in ((["n"], [8, 2]), ([4], [4, 4])):
        path = taking(tmp_path, {"x": (TensorProto.FLOAT, [*samples, 3, 12, 12])})
        found = [batch[0].numpy() for batch in data_for_file(path, tmp_path / "photos", batch=8, **how)]
        assert [len(batch) for batch in found] == sizes
        if samples == ["n"]:
            np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
    open_sizes = taking(tmp_path, {"x": (TensorProto.FLOAT, ["n", 3, "h", "w"])})
    with pytest.raises(
        vbpfx.CalibrationError, match="does not state the height and the width of its images; pass shape="
    ):
        data_for_file(open_sizes, tmp_path / "photos")
    (batch,) = data_for_file(open_sizes, tmp_path / "photos", shape=(3, 6, 6), limit=2)
    assert batch[0].shape == (2, 3, 6, 6)
    two = taking(tmp_path, {"x": (TensorProto.FLOAT, ["n", 3, 8, 8]), "z": (TensorProto.FLOAT, ["n", 2])})
    with pytest.raises(vbpfx.CalibrationError, match=r"takes 'x' \(n, 3, 8, 8\), 'z' \(n, 2\). Pass an .npz"):
        data_for_file(two, tmp_path / "photos")
    fixed = taking(tmp_path, {"x": (TensorProto.FLOAT, [16, 3, 12, 12])})
    with pytest.raises(
        vbpfx.CalibrationError, match=r"takes batches of 16 samples, and .*photos has 10; pass at least 16"
    ):
        data_for_file(fixed, tmp_path / "photos")


def test_samples_of_a_file_are_limited(tmp_path: Path) -> None:
    """So many of the samples, along their own axis and in their order; options of images are refused."""
    path = taking(tmp_path, {"x": (TensorProto.FLOAT, ["t", "n"]), "state": (TensorProto.FLOAT, [2, "t"])})
    x, data = np.arange(20.0, dtype=np.float32).reshape(10, 2), tmp_path / "data.npz"
    np.savez(data, x=x, state=np.stack([x[:, 0], x[:, 1]]))
    taken = np.sort(np.random.default_rng(3).permutation(10)[:5])
    found = data_for_file(path, data, batch=3, limit=5, seed=3)
    assert str(found) == f"5 of 10 samples from {data}"
    require_batches(found, [{"x": x[k], "state": x[k].T} for k in (taken[:3], taken[3:])])
    with pytest.raises(
        vbpfx.CalibrationError, match=r"mean is for a folder of images, and .*data\.npz is something else"
    ):
        data_for_file(path, data, mean=(0.5,))
    with pytest.raises(vbpfx.CalibrationError, match="limit must be at least 1, found 0"):
        data_for_file(path, data, limit=0)


def test_the_command_takes_a_folder_of_images(tmp_path: Path) -> None:
    """The same neurons as from the pixels by hand."""
    pixels = _photographs(tmp_path / "photos", 24, 4)
    net = Net()
    net.add("Flatten", ["x"], "flat")
    net.add("MatMul", ["flat", net.weight("W", 48, 32)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 32, 5)], "y")
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(net.model(["n", 3, 4, 4], ["n", 5]), path)
    given = ("--data", tmp_path / "photos", "--mean", "0.5", "--std", "0.25", "--crop", "1", "--batch", "8")
    result = run_cli("onnx", path, *given, "--out", out, "--ratio", "0.25", "--method", "vbp")
    assert result.exit_code == 0, result.output
    assert "24 images from" in result.stderr
    x = ((pixels / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).reshape(24, 48)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    kept = np.sort(np.argsort(np.maximum(x @ stored["W"].astype(np.float64), 0).var(0))[8:])
    small = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    np.testing.assert_array_equal(small["W"], stored["W"][:, kept])
