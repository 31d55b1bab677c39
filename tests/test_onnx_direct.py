"""Pruning from ONNX to ONNX: the narrowed file computes what the plan says, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_files import CASES, Case, Net, run, substituted, values

import vbpfx

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
# 7 of the 12 channels are kept: no size of a correct result occurs in the dense file.
RATIO, KEPT = 5 / 12, 7


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(model, path)
    return path


def batches(shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((8, *shape)).astype(np.float32) for _ in range(3)]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_file_computes_what_the_plan_says(case: Case, tmp_path: Path) -> None:
    """The reference is the dense file with the removed channels replaced by their means in ONNX Runtime."""
    model, data = case.make(), batches(case.shape)
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method="vbp", progress=False)
    assert pruned.observed_by == "ONNX Runtime"
    (entry,) = pruned.plan.blocks
    assert (entry.block.width, len(entry.kept)) == (case.width, KEPT)
    seen = np.concatenate([values(model, case.hidden, {"x": x}) for x in data])
    rows = np.moveaxis(seen, case.axis, -1).reshape(-1, case.width).astype(np.float64)
    if case.before_norm is None:  # otherwise the variance of the norm's input counts, too
        assert entry.pruned == tuple(sorted(np.argsort(rows.var(0))[:-KEPT].tolist()))
    reference = model
    if case.before_norm is not None:  # statistics use means of the norm's input, the layer those of its output
        before = np.concatenate([values(model, case.before_norm, {"x": x}) for x in data]).astype(np.float64)
        reference = substituted(model, case.before_norm, -1, entry.pruned, before.mean(0))
    reference = substituted(reference, case.hidden, case.axis, entry.pruned, rows.mean(0))
    x = batches(case.shape, seed=1)[0][:5]
    (found,), (wanted,), (dense,) = (run(m, {"x": x}) for m in (out, reference, model))
    assert relative(found, wanted) < ROUNDING
    assert relative(wanted, dense) > 100 * ROUNDING  # otherwise the comparison proves nothing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_plan_does_not_touch_stays(case: Case, tmp_path: Path) -> None:
    model, out = onnx.shape_inference.infer_shapes(case.make()), tmp_path / "out.onnx"  # with all shapes
    source = saved(model, tmp_path)
    before = source.read_bytes()
    vbpfx.prune_onnx(source, batches(case.shape), out, ratio=RATIO, method="vbp", progress=False)
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]
    assert list(small.graph.input) == list(model.graph.input)
    assert [o.name for o in small.graph.output] == ["y"]
    assert small.graph.output[0].type == model.graph.output[0].type
    assert (small.opset_import, small.producer_name, small.metadata_props) == (
        model.opset_import,
        model.producer_name,
        model.metadata_props,
    )
    stored = [numpy_helper.to_array(t) for t in small.graph.initializer if t.name != "width"]  # a sum corrects it
    stored += [numpy_helper.to_array(n.attribute[0].t) for n in small.graph.node if n.op_type == "Constant"]
    assert not [a.shape for a in stored if {case.width, 2 * case.width} & set(a.shape)]
    assert not [a for a in stored if a.dtype == np.int64 and {case.width, 2 * case.width} & set(a.reshape(-1).tolist())]


def test_reconstruction_runs_on_the_files_graph(tmp_path: Path) -> None:
    """method="auto" refits the following layers and has a smaller error on the calibration data than the mean alone."""
    case = CASES[0]
    model, data = case.make(), batches(case.shape)
    errors = {}
    for method in ("vbp", "auto"):
        out = tmp_path / f"{method}.onnx"
        pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method=method, progress=False)
        assert bool(pruned.plan.corrections) == (method == "auto")
        errors[method] = np.mean([(run(out, {"x": x})[0] - run(model, {"x": x})[0]) ** 2 for x in data])
    assert errors["auto"] < 0.8 * errors["vbp"]


def test_initializers_among_the_inputs(tmp_path: Path) -> None:
    """Before IR version 4, every file listed its initializers among the inputs."""
    case = CASES[0]
    model = case.make()
    model.ir_version, model.opset_import[0].version = 3, 13
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(
        saved(model, tmp_path), batches(case.shape), out, ratio=RATIO, method="vbp", progress=False
    )
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert [i.name for i in small.graph.input] == [i.name for i in model.graph.input]
    assert {len(entry.kept) for entry in pruned.plan.blocks} == {KEPT}


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Activation", ["m"], "h", domain="local")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "y")
    net.nodes[1].domain = "local"
    inside = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["b"])]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Activation", ["a"], ["b"], inside, imports)
    model = net.model(["n", 6], ["n", 5], functions=[function])
    data, out = batches((6,)), tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method="vbp", progress=False)
    assert not onnx.load(out).functions
    hidden = np.concatenate([values(model, "h", {"x": x}) for x in data]).astype(np.float64)
    reference = substituted(model, "h", -1, pruned.plan.blocks[0].pruned, hidden.mean(0))
    assert relative(run(out, {"x": data[0]})[0], run(reference, {"x": data[0]})[0]) < ROUNDING


def test_reconstruction_at_a_fixed_batch(tmp_path: Path) -> None:
    """A reshape fixes the batch size, so no part of the file runs at another size and no batch is split."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "v")
    net.add("Reshape", ["v", net.integers("rows", 8, 5)], "y")
    source = saved(net.model([8, 6], [8, 5]), tmp_path)
    pruned = vbpfx.prune_onnx(source, batches((6,)), tmp_path / "out.onnx", ratio=RATIO, samples=9, progress=False)
    assert pruned.plan.corrections
    assert pruned.captured.batch is None


def test_a_bias_takes_the_fold_where_there_is_one(tmp_path: Path) -> None:
    case, out = CASES[0], tmp_path / "out.onnx"
    model = case.make()
    vbpfx.prune_onnx(saved(model, tmp_path), batches(case.shape), out, ratio=RATIO, method="vbp", progress=False)
    small = onnx.load(out)
    assert [n.op_type for n in small.graph.node] == [n.op_type for n in model.graph.node]
    assert [t.name for t in small.graph.initializer] == [t.name for t in model.graph.initializer]


def convolutional() -> onnx.ModelProto:
    net = Net()
    net.add("Conv", ["x", net.weight("stem", 16, 3, 1, 1), net.weight("stem_bias", 16)], "s")
    net.add("Relu", ["s"], "a")
    net.add("Conv", ["a", net.weight("wide", 64, 16, 1, 1), net.weight("wide_bias", 64)], "w")
    net.add("Relu", ["w"], "b")
    net.add("Conv", ["b", net.weight("head", 4, 64, 1, 1), net.weight("head_bias", 4)], "y")
    return net.model(["n", 3, 4, 4], ["n", 4, 4, 4])


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({}, 8),
        ({"runtime": "onnxruntime", "method": "vbp"}, 8),
        ({"runtime": "openvino"}, 16),
        ({"round_to": 4}, 4),
        ({"round_to": 1}, 1),
        ({"method": "vbp"}, 1),
    ],
)
def test_widths_are_multiples_that_the_runtime_is_fast_at(
    options: dict[str, Any], multiple: int, tmp_path: Path
) -> None:
    """Widths are rounded for ONNX Runtime by default; under the paper's method only if a runtime is named."""
    path, data = saved(convolutional(), tmp_path), batches((3, 4, 4))
    given = {"ratio": 0.3, "allocation": "equal", "progress": False} | options
    pruned = vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", **given)
    stored = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    widths = (stored["stem"][0], stored["wide"][0])
    assert sum(widths) < 80
    assert not [w for w in widths if w % multiple]
    assert bool(pruned.report.advice) == (multiple % 8 != 0)
    if multiple == 1:
        assert sum(widths) == 56
