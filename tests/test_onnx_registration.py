"""ONNX operators that the table lacks: left alone, and narrowed after one call of ``register_onnx_operator``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Array, Net, run, substituted, values

import vbpfx
from vbpfx.errors import AnalysisError, CaptureError
from vbpfx.onnx_graph import table
from vbpfx.onnx_graph.builder import Builder

# Two float32 computations of the same function, both in ONNX Runtime.
ROUNDING = 1e-5
ML = "ai.onnx.ml"


def scaler(b: Builder) -> Any:
    """(x - offset) * scale, with one offset and one scale for all channels."""
    (offset,), (scale,) = (
        b.attribute(name) if len(b.attribute(name)) == 1 else _one_per_channel() for name in ("offset", "scale")
    )
    return b.emit(torch.mul, b.emit(torch.sub, b.tensor(0), offset), scale)


def _one_per_channel() -> Any:
    raise CaptureError("it has one scale per channel, in an attribute that cannot be narrowed")


def imputer(b: Builder) -> Any:
    """A wrong translation: ONNX replaces an entry, and this adds to all of them."""
    return b.emit(torch.add, b.tensor(0), 1.0)


def identity(b: Builder) -> Any:
    return b.tensor(0)


def network(op_type: str, **attributes: Any) -> onnx.ModelProto:
    """y = V op(W x + a) + b, with an operator of ai.onnx.ml on the hidden axis of 12 channels."""
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Add", ["m", net.weight("a", 12)], "sum")
    net.nodes.append(helper.make_node(op_type, ["sum"], ["h"], name="it", domain=ML, **attributes))
    net.add("MatMul", ["h", net.weight("V", 12, 5)], "v")
    net.add("Add", ["v", net.weight("b", 5)], "y")
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in net.stored.items()],
    )
    imports = [helper.make_opsetid("", net.opset), helper.make_opsetid(ML, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of the table of ONNX operators."""
    monkeypatch.setattr(table, "_OPERATORS", dict(table._OPERATORS))


def batches(seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((8, 6)).astype(np.float32) for _ in range(3)]


@pytest.fixture
def prune(tmp_path: Path) -> Callable[[onnx.ModelProto], vbpfx.PrunedOnnx]:
    def pruned(model: onnx.ModelProto) -> vbpfx.PrunedOnnx:
        onnx.save(model, tmp_path / "in.onnx")
        out = tmp_path / "out.onnx"
        return vbpfx.prune_onnx(
            tmp_path / "in.onnx", batches(), out, ratio=5 / 12, round_to=1, method="vbp", progress=False
        )

    return pruned


def test_what_is_registered_is_narrowed(prune: Callable[..., vbpfx.PrunedOnnx], tmp_path: Path) -> None:
    """The reference is the dense file with means in place of the removed neurons, in ONNX Runtime."""
    model = network("Scaler", offset=[0.3], scale=[1.7])
    with pytest.raises(AnalysisError, match=r"operator ai\.onnx\.ml\.Scaler"):
        prune(model)

    vbpfx.register_onnx_operator(scaler, "Scaler", domain=ML)
    pruned = prune(model)
    (entry,) = pruned.plan.blocks
    assert (entry.block.width, len(entry.kept)) == (12, 7)
    assert not pruned.left_alone
    out = tmp_path / "out.onnx"
    assert [node.op_type for node in onnx.load(out).graph.node] == ["MatMul", "Add", "Scaler", "MatMul", "Add"]
    x = batches(seed=1)[0]
    hidden = np.concatenate([values(model, "h", {"x": batch}) for batch in batches()]).astype(np.float64)
    (wanted,) = run(substituted(model, "h", -1, entry.pruned, hidden.mean(0)), {"x": x})
    (found,), (dense,) = run(out, {"x": x}), run(model, {"x": x})
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() / scale < ROUNDING
    assert np.abs(dense - wanted).max() / scale > 100 * ROUNDING  # otherwise the comparison proves nothing


def test_a_form_that_the_translation_does_not_support_stays(prune: Callable[..., vbpfx.PrunedOnnx]) -> None:
    vbpfx.register_onnx_operator(scaler, "Scaler", domain=ML)
    with pytest.raises(AnalysisError, match=r"Scaler \(it has one scale per channel, in an attribute"):
        prune(network("Scaler", offset=[0.3] * 12, scale=[1.7] * 12))


def test_a_wrong_translation_is_found(prune: Callable[..., vbpfx.PrunedOnnx]) -> None:
    vbpfx.register_onnx_operator(imputer, "Imputer", domain=ML)
    with pytest.raises(vbpfx.VerificationError):
        prune(network("Imputer", imputed_value_floats=[0.5], replaced_value_float=-1.0))


def test_a_name_of_another_domain_is_another_operator() -> None:
    vbpfx.register_onnx_operator(identity, "Relu", domain="my.domain")
    assert table._OPERATORS["my.domain.Relu"] is identity
    assert table._OPERATORS["Relu"] is not identity


def test_registering_twice() -> None:
    vbpfx.register_onnx_operator(identity, "Mine", "Yours", domain="my.domain")
    vbpfx.register_onnx_operator(identity, "Mine", domain="my.domain")  # as when a module is imported again
    with pytest.raises(AnalysisError, match=r"has my\.domain\.Mine already, translated by identity"):
        vbpfx.register_onnx_operator(scaler, "New", "Mine", domain="my.domain")
    assert "my.domain.New" not in table._OPERATORS, "a refused call has added a part of what it was given"
    with pytest.raises(AnalysisError, match="has Shape already"):
        vbpfx.register_onnx_operator(scaler, "Shape")


@pytest.mark.parametrize(
    "arguments", [(identity,), ("Mine", "Mine"), (identity, 3)], ids=["no operator", "no function", "a number"]
)
def test_what_cannot_be_registered(arguments: tuple[Any, ...]) -> None:
    before = dict(table._OPERATORS)
    with pytest.raises(AnalysisError, match="a function and the name of at least one operator"):
        vbpfx.register_onnx_operator(*arguments)
    assert before == table._OPERATORS
