"""float16 files are pruned with statistics and folds of higher precision and written in float16 again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import CASES, Array, Case, Net, mlp, normed, run, substituted, values
from onnxruntime.transformers.float16 import convert_float_to_float16

import vbpfx

# The file rounds every value to 11 bits, an error of at most 5e-4, at about ten consecutive nodes; the reference does not.
ROUNDING = 4e-3
RATIO, KEPT = 5 / 12, 7


def with_half_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the float32 model with its weights rounded to float16."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for stored in (
        *changed.graph.initializer,
        *(n.attribute[0].t for n in changed.graph.node if n.op_type == "Constant"),
    ):
        array = numpy_helper.to_array(stored)
        if array.dtype == np.float32:
            stored.CopyFrom(numpy_helper.from_array(array.astype(np.float16).astype(np.float32), stored.name))
    return changed


def batches(shape: tuple[int, ...], dtype: type, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((8, *shape)).astype(np.float16).astype(dtype) for _ in range(3)]


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tensors(model: onnx.ModelProto) -> dict[str, Array]:
    constants = {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | constants


@pytest.mark.parametrize("keep_io", [False, True], ids=["float16 throughout", "float32 in and out"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_file_computes_what_the_plan_says(case: Case, keep_io: bool, tmp_path: Path) -> None:
    """The reference is the float32 file with the same weights and means in place of the removed neurons."""
    wide = with_half_weights(case.make())
    model = convert_float_to_float16(wide, keep_io_types=keep_io)
    onnx.save(model, tmp_path / "in.onnx")
    data = batches(case.shape, np.float32 if keep_io else np.float16)
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False)
    assert pruned.observed_by == "ONNX Runtime"
    assert pruned.verification is not None
    assert pruned.verification.dtype == "float32"
    assert pruned.verification.error < 1e-5 < pruned.verification.effect
    (entry,) = pruned.plan.blocks
    assert len(entry.kept) == KEPT
    feeds = [{"x": x.astype(np.float32)} for x in data]
    reference = wide
    if case.before_norm is not None:
        before = np.concatenate([values(wide, case.before_norm, f) for f in feeds]).astype(np.float64)
        reference = substituted(wide, case.before_norm, -1, entry.pruned, before.mean(0))
    rows = np.concatenate([np.moveaxis(values(wide, case.hidden, f), case.axis, -1).reshape(-1, 12) for f in feeds])
    reference = substituted(reference, case.hidden, case.axis, entry.pruned, rows.astype(np.float64).mean(0))
    x = batches(case.shape, np.float16, seed=1)[0][:5]
    (found,) = run(out, {"x": x.astype(data[0].dtype)})
    (wanted,), (dense,) = (run(m, {"x": x.astype(np.float32)}) for m in (reference, wide))
    assert found.dtype == data[0].dtype
    assert relative(found, wanted) < ROUNDING
    assert relative(wanted, dense) > 10 * ROUNDING
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert list(small.graph.input) == list(model.graph.input)
    floats = {
        name: array.dtype for name, array in tensors(small).items() if array.dtype.kind == "f" and name != "scales"
    }
    sizes = tuple(sum(array.nbytes for array in tensors(m).values()) for m in (model, small))
    assert pruned.report.size == sizes
    if case.before_norm is None:  # the statistics of a norm are in float32
        assert set(floats.values()) == {np.dtype(np.float16)}


def test_what_is_stored_is_rounded_once(tmp_path: Path) -> None:
    """Kept columns are unchanged bit for bit; the folded bias equals the float64 result, rounded once to float16."""
    net = Net()
    mlp(net)
    model = convert_float_to_float16(with_half_weights(net.model(["n", 6], ["n", 5])))
    onnx.save(model, tmp_path / "in.onnx")
    data, out = batches((6,), np.float16), tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    kept, removed = list(entry.kept), list(entry.pruned)
    dense, small = tensors(model), tensors(onnx.load(out))
    assert np.array_equal(small["dense_1/kernel"], dense["dense_1/kernel"][:, kept])
    assert np.array_equal(small["dense_2/kernel"], dense["dense_2/kernel"][kept])
    hidden = np.concatenate([values(model, "h", {"x": x}) for x in data]).astype(np.float64)
    fold = dense["dense_2/bias"].astype(np.float64) + hidden.mean(0)[removed] @ dense["dense_2/kernel"][removed].astype(
        np.float64
    )
    unit = np.spacing(np.abs(fold).astype(np.float16)).astype(np.float64)
    assert (np.abs(small["dense_2/bias"] - fold) <= 0.501 * unit).all()
    assert (np.abs(dense["dense_2/bias"] - fold) > unit).any()


def stored_in_half() -> onnx.ModelProto:
    """A file with float16 weights behind casts, which computes in float32."""
    net = Net()
    mlp(net)
    for name in list(net.stored):
        net.stored[f"{name}_half"] = net.stored.pop(name).astype(np.float16)
        net.nodes.insert(0, helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    return net.model(["n", 6], ["n", 5])


def test_weights_alone_in_half(tmp_path: Path) -> None:
    """The casts are kept with float16 weights in front of them; other differences are float32 rounding."""
    model = stored_in_half()
    onnx.save(model, tmp_path / "in.onnx")
    data, out = batches((6,), np.float32), tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    small = onnx.load(out)
    assert [n.op_type for n in small.graph.node] == [n.op_type for n in model.graph.node]
    found = {name: (array.shape, array.dtype) for name, array in tensors(small).items() if name != "dense_2/bias_half"}
    half = np.dtype(np.float16)
    kept = {
        "dense_1/kernel_half": ((6, KEPT), half),
        "dense_1/bias_half": ((KEPT,), half),
        "dense_2/kernel_half": ((KEPT, 5), half),
    }
    assert kept.items() <= found.items()
    hidden = np.concatenate([values(model, "h", {"x": x}) for x in data]).astype(np.float64)
    reference = substituted(model, "h", -1, entry.pruned, hidden.mean(0))
    x = batches((6,), np.float32, seed=1)[0]
    (found_y,), (wanted,) = run(out, {"x": x}), run(reference, {"x": x})
    assert relative(found_y, wanted) < 1e-3  # the folded bias is rounded to float16, an error of 5e-4
    assert pruned.parity < 1e-6


@pytest.mark.parametrize("name", ["dense_1/kernel", "dense_1/bias"])
@pytest.mark.parametrize("how", ["a Cast of the Cast", "the Cast", "an unknown operator"])
def test_a_cast_that_others_read_whole(name: str, how: str, tmp_path: Path) -> None:
    """The layer gets its own Cast if another reader of the Cast is not narrowed."""
    model = stored_in_half()
    net = Net()
    net.nodes = list(model.graph.node)
    net.stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    net.nodes[-1].output[0] = "m"
    read = name
    if how == "a Cast of the Cast":
        net.add("Cast", [name], "again", to=TensorProto.DOUBLE)
        net.add("Cast", ["again"], "back", to=TensorProto.FLOAT)
        read = "back"
    if how == "an unknown operator":
        net.add("Shrink", [name], "shrunk", lambd=0.01)
        read = "shrunk"
    net.add("Sigmoid", [read], "all")
    net.add("ReduceMean", ["all"], "mean", keepdims=0)
    net.add("Add", ["m", "mean"], "y")
    model = net.model(["n", 6], ["n", 5])
    onnx.save(model, tmp_path / "in.onnx")
    data, out = batches((6,), np.float32), tmp_path / "out.onnx"
    arguments = {"ratio": RATIO, "method": "vbp", "progress": False}
    if name == "dense_1/kernel" and how != "a Cast of the Cast":  # a matrix used several times is one parameter
        with pytest.raises(vbpfx.AnalysisError, match="no block that can be narrowed"):
            vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, **arguments)
        return
    (entry,) = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, **arguments).plan.blocks
    hidden = np.concatenate([values(model, "h", {"x": x}) for x in data]).astype(np.float64)
    x = batches((6,), np.float32, seed=1)[0]
    (found,), (wanted,) = run(out, {"x": x}), run(substituted(model, "h", -1, entry.pruned, hidden.mean(0)), {"x": x})
    assert relative(found, wanted) < 1e-3  # as in the test above


def test_reconstruction(tmp_path: Path) -> None:
    """Layers are fitted in float32 or better and have a smaller error on the calibration data than the mean alone."""
    case = CASES[0]
    wide = with_half_weights(case.make())
    onnx.save(convert_float_to_float16(wide), tmp_path / "in.onnx")
    data, errors = batches(case.shape, np.float16), {}
    for method in ("vbp", "auto"):
        out = tmp_path / f"{method}.onnx"
        vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method=method, progress=False)
        pairs = [(run(out, {"x": x})[0], run(wide, {"x": x.astype(np.float32)})[0]) for x in data]
        errors[method] = np.mean([(a.astype(np.float64) - b) ** 2 for a, b in pairs])
    assert errors["auto"] < 0.8 * errors["vbp"]


def test_an_unknown_operator(tmp_path: Path) -> None:
    net = Net()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("Hardmax", ["m"], "most")
    net.add("Add", ["most", "m"], "y")
    onnx.save(convert_float_to_float16(with_half_weights(net.model(["n", 6], ["n", 5]))), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", batches((6,), np.float16), out, ratio=RATIO, progress=False)
    assert pruned.left_alone == {"Hardmax": 1}
    assert len(pruned.plan.blocks) == 1


def test_a_fold_that_float16_cannot_hold(tmp_path: Path) -> None:
    """Hidden values near 1e4 cancel in the layer behind; the fold of the removed ones alone is too large for float16."""
    net = Net()
    mlp(net)
    net.stored["dense_1/kernel"][:, 6:] *= 3  # the first six vary least and are removed
    net.stored["dense_1/bias"][:] = 2e4
    net.stored["dense_2/kernel"][:] = np.where(np.arange(12)[:, None] < 6, 1, -1)
    onnx.save(convert_float_to_float16(net.model(["n", 6], ["n", 5])), tmp_path / "in.onnx")
    data = batches((6,), np.float16)
    data = [x * np.float16(64) for x in data]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(vbpfx.ExportError, match="dense_2_bias overflows float16"):
        vbpfx.prune_onnx(tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_what_torch_exports_of_a_half_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6), nn.LayerNorm(6)).half().eval()
    x = torch.randn(8, 6).half()
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.onnx.export(model, (x,), dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "in.onnx"))
    out = tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(
        tmp_path / "in.onnx", batches((6,), np.float16), out, ratio=RATIO, method="vbp", progress=False
    )
    (entry,) = pruned.plan.blocks
    small = vbpfx.apply_plan(
        model.float(), vbpfx.prune(model.float(), [x.float()], ratio=RATIO, method="vbp", progress=False).plan
    )
    assert len(entry.kept) == small[0].out_features == KEPT
    assert {a.dtype for a in tensors(onnx.load(out)).values() if a.dtype.kind == "f" and a.size > 1} == {
        np.dtype(np.float16)
    }


@pytest.mark.parametrize("kind", ["LayerNormalization", "RMSNormalization"])
def test_statistics_that_float16_cannot_hold(kind: str, tmp_path: Path) -> None:
    """The sum of the squared hidden values exceeds 65504, so the carried norm computes in float32."""
    wide = normed(kind)
    for stored in wide.graph.initializer:
        if stored.name == "W":
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(256), "W"))
    onnx.save(convert_float_to_float16(with_half_weights(wide)), tmp_path / "in.onnx")
    data, out = batches((6,), np.float16), tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(tmp_path / "in.onnx", data, out, ratio=RATIO, method="vbp", progress=False)
    assert pruned.parity < ROUNDING
    small = onnx.shape_inference.infer_shapes(onnx.load(out))  # running the file on a CPU would not show it
    types = {value.name: value.type.tensor_type.elem_type for value in small.graph.value_info}
    sums = [node.output[0] for node in small.graph.node if node.op_type == "ReduceSum"]
    assert {types[name] for name in sums} == {TensorProto.FLOAT}
