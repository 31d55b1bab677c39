"""ONNX files that cannot be pruned: a one-line reason, and unchanged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Net, depthwise, mlp, with_biases
from typer.testing import CliRunner

import vbpfx
from vbpfx.cli import app

DATA = [np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plain(folder: Path, model: onnx.ModelProto | None = None, *, external: bool = False) -> Path:
    path = folder / "in.onnx"
    onnx.save(model or with_biases(), path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def text(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.write_text("this is not a model")
    return path


def empty(folder: Path) -> Path:
    path = folder / "in.onnx"
    path.write_bytes(b"")
    return path


def truncated(folder: Path) -> Path:
    path = plain(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def without_data(folder: Path) -> Path:
    path = plain(folder, external=True)
    (folder / "weights.bin").unlink()
    return path


def with_half_of_its_data(folder: Path) -> Path:
    path = plain(folder, external=True)
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[: len(data) // 2])
    return path


def old(folder: Path) -> Path:
    model = with_biases()
    model.opset_import[0].version = 6
    return plain(folder, model)


def without_a_block(folder: Path) -> Path:
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 5)], "y")
    return plain(folder, net.model(["n", 6], ["n", 5]))


def quantized(folder: Path) -> Path:
    """Write a file whose weight is stored as integers with a scale."""
    net = Net()
    mlp(net)
    weight = net.stored.pop("dense_1/kernel")
    net.stored |= {"q": np.clip(weight * 64, -127, 127).astype(np.int8), "s": np.array(1 / 64, np.float32)}
    net.nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["dense_1/kernel"], name="dequantize"))
    return plain(folder, net.model(["n", 6], ["n", 5]))


def custom(folder: Path) -> Path:
    net = Net()
    mlp(net)
    model = net.model(["n", 6], ["n", 5])
    model.graph.node[2].op_type, model.graph.node[2].domain = "Swirl", "my.company"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    return plain(folder, model)


def bfloat16(folder: Path) -> Path:
    net = Net()
    mlp(net)
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 5])],
        [numpy_helper.from_array(a.astype(ml_dtypes.bfloat16), n) for n, a in net.stored.items()],
    )
    return plain(folder, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def functions_of_another_opset(folder: Path) -> Path:
    node = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("mine", "Act", ["a"], ["b"], [node], [helper.make_opsetid("", 13)])
    net = Net()
    mlp(net)
    net.nodes[2].op_type, net.nodes[2].domain = "Act", "mine"
    model = with_biases()
    del model.graph.node[:]
    model.graph.node.extend(net.nodes)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return plain(folder, model)


def random(folder: Path) -> Path:
    net = Net()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("RandomNormalLike", ["m"], "noise")
    net.add("Add", ["m", "noise"], "y")
    return plain(folder, net.model(["n", 6], ["n", 5]))


def sparse(folder: Path) -> Path:
    model = with_biases()
    stored = next(t for t in model.graph.initializer if t.name == "dense_1/kernel")
    array = numpy_helper.to_array(stored).reshape(-1)
    model.graph.initializer.remove(stored)
    places = numpy_helper.from_array(np.arange(len(array)))
    entries = numpy_helper.from_array(array, "dense_1/kernel")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(entries, places, [6, 12]))
    return plain(folder, model)


FILES: list[tuple[Callable[[Path], Path], type[Exception], str]] = [
    (lambda folder: folder / "in.onnx", vbpfx.ArtifactError, "cannot read .*No such file"),
    (text, vbpfx.ArtifactError, "not an ONNX file, or it is damaged"),
    (empty, vbpfx.ArtifactError, "not an ONNX file, or it is damaged"),
    (truncated, vbpfx.ArtifactError, "not an ONNX file, or it is damaged"),
    (without_data, vbpfx.ArtifactError, "keeps dense_1/kernel in weights.bin, which cannot be read"),
    (with_half_of_its_data, vbpfx.ArtifactError, "in weights.bin, which is too short"),
    (old, vbpfx.CaptureError, "has opset 6, and the oldest that is supported is 7"),
    (without_a_block, vbpfx.AnalysisError, "no block that can be narrowed"),
    (quantized, vbpfx.CaptureError, r"is quantized \(DequantizeLinear, node 'dequantize'\)"),
    (custom, vbpfx.CaptureError, r"does not support operator Swirl \(domain my.company, node 'n2_Relu'\), and .*Swirl"),
    (functions_of_another_opset, vbpfx.CaptureError, r"in.onnx cannot be inlined: Opset mismatch .*mine::Act"),
    (random, vbpfx.CaptureError, r"draws random numbers \(RandomNormalLike, node 'n5_RandomNormalLike'\)"),
    (sparse, vbpfx.CaptureError, r"operator MatMul .*no node computes its input 'dense_1/kernel'; if that is a sparse"),
    (
        bfloat16,
        vbpfx.CaptureError,
        "has the type bfloat16, and ONNX Runtime does not compute in bfloat16 on the CPU. Convert",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), FILES, ids=lambda v: getattr(v, "__name__", None))
def test_a_file_that_cannot_be_pruned(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        vbpfx.prune_onnx(path, DATA, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert contents(tmp_path) == before


BATCHES: list[tuple[Any, type[Exception], str]] = [
    ([], vbpfx.CalibrationError, "calibration data is empty"),
    (DATA[0], vbpfx.CalibrationError, r"takes the shape \(n, 6\), a batch has \(6,\)"),
    ([DATA[0][:, :5]], vbpfx.CalibrationError, r"'x' takes the shape \(n, 6\), a batch has \(8, 5\)"),
    ([*DATA, DATA[0][:, :5]], vbpfx.CalibrationError, r"'x' takes the shape \(n, 6\), a batch has \(8, 5\)"),
    ([DATA[0].astype(np.int64)], vbpfx.CalibrationError, "'x' takes float32, the data is int64"),
    ([{"images": DATA[0]}], vbpfx.CalibrationError, "lacks the input 'x'; it holds 'images', the file takes 'x'"),
    ([()], vbpfx.CalibrationError, "a batch has 0 arrays, the file takes 1: 'x'"),
    ([np.full((8, 6), np.nan, np.float32)], vbpfx.CalibrationError, "NaN or infinite"),
]


@pytest.mark.parametrize(("data", "error", "message"), BATCHES, ids=[m for *_, m in BATCHES])
def test_data_that_does_not_fit(data: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = plain(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert contents(tmp_path) == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    path = plain(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (
        ("missing/out.onnx", "there is no folder"),
        ("folder", "it is a folder"),
        ("file/o", "no folder"),
    ):
        with pytest.raises(vbpfx.ArtifactError, match=message):
            vbpfx.prune_onnx(path, DATA, tmp_path / out, ratio=0.5, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "in.onnx"]


def test_an_impossible_budget_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(vbpfx.BudgetError):
        vbpfx.prune_onnx(tmp_path / "no such file", DATA, tmp_path / "out.onnx", ratio=1.5)


def test_a_file_may_be_replaced_by_its_own_narrow_self(tmp_path: Path) -> None:
    path = plain(tmp_path)
    size = path.stat().st_size
    vbpfx.prune_onnx(path, DATA, path, ratio=0.5, method="vbp", progress=False)
    assert path.stat().st_size < size
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_two_files_are_never_replaced_at_once(tmp_path: Path) -> None:
    """A crash between renaming external data and the file that refers to it would leave neither usable."""
    path = tmp_path / "in.onnx"
    onnx.save(with_biases(), path, save_as_external_data=True, location="in.onnx.data", size_threshold=0)
    before = contents(tmp_path)
    with pytest.raises(vbpfx.ArtifactError, match="two files cannot be replaced at once; choose another name"):
        vbpfx.prune_onnx(path, DATA, path, ratio=0.5, progress=False)
    assert contents(tmp_path) == before


def test_a_written_file_that_is_wrong_never_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vbpfx.onnx_graph import rewrite

    monkeypatch.setattr(rewrite, "new_biases", lambda plan: {})  # simulates a missing fold
    net = Net()
    mlp(net, bias=False)
    path = plain(tmp_path, net.model(["n", 6], ["n", 5]))
    before = contents(tmp_path)
    with pytest.raises(vbpfx.ExportError, match="differs from the narrowed graph by"):
        vbpfx.prune_onnx(path, DATA, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert contents(tmp_path) == before


def test_a_written_file_that_the_checker_rejects_never_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was read is valid."""
    from vbpfx.onnx_graph.edit import OnnxEdit

    finish = OnnxEdit.finish

    def spoiled(file: OnnxEdit, keep: Any = ()) -> None:
        finish(file, keep)
        file.graph[0].attributes["unheard_of"] = ir.AttrInt64("unheard_of", 1)

    monkeypatch.setattr(OnnxEdit, "finish", spoiled)
    path = plain(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        vbpfx.ExportError, match=r"checker rejects the narrowed file: .*unheard_of.*nothing was written"
    ):
        vbpfx.prune_onnx(path, DATA, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert contents(tmp_path) == before


def test_the_command_line(tmp_path: Path) -> None:
    path, out = plain(tmp_path), tmp_path / "out.onnx"
    np.save(tmp_path / "x.npy", DATA[0])
    np.savez(tmp_path / "x.npz", x=DATA[0])
    for data in ("x.npy", "x.npz"):
        given = ["onnx", str(path), "--data", str(tmp_path / data), "--out", str(out)]
        result = CliRunner().invoke(app, [*given, "--ratio", "0.5", "--method", "vbp", "--batch", "3"])
        assert result.exit_code == 0, result.output
        assert "hidden neurons" in result.output
        out.unlink()
    for wrong in ([], ["--ratio", "0.5", "--macs", "0.5"], ["--ratio", "half"]):
        assert CliRunner().invoke(app, [*given, *wrong]).exit_code == 2
    for data, message in (("in.onnx", "neither .npy nor .npz"), ("missing.npy", "cannot read")):
        given[3] = str(tmp_path / data)
        result = CliRunner().invoke(app, [*given, "--ratio", "0.5"])
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert not out.exists()


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    """Data comes in batches of the fixed size, and the written file keeps that size."""
    model = depthwise()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path, out = plain(tmp_path, model), tmp_path / "out.onnx"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((9, 4, 6, 6)).astype(np.float32))
    given = ["onnx", str(path), "--data", str(tmp_path / "x.npy"), "--out", str(out), "--ratio", "0.5"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert onnx.load(out).graph.input[0] == model.graph.input[0]
