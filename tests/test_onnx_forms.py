"""Forms found in real files: networks in branches, layers before recurrent ones, meaningless names, and the messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Array, Net, run, substituted, values

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.onnx_graph.importer import import_graph

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
RATIO, KEPT = 5 / 12, 7
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def file(
    nodes: list[onnx.NodeProto], stored: dict[str, Array], x: list[Any], y: list[Any], *further: onnx.ValueInfoProto
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *further],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def branch(name: str, *, further: list[onnx.NodeProto] | None = None) -> onnx.GraphProto:
    """Make a perceptron with its own weights; inner values have the same names in all branches."""
    nodes = [
        helper.make_node("MatMul", ["x", f"{name}.W"], ["m"]),
        helper.make_node("Relu", ["m"], ["h"]),
        helper.make_node("MatMul", ["h", f"{name}.V"], ["made"]),
    ]
    weights = [numpy_helper.from_array(floats(6, 12), f"{name}.W"), numpy_helper.from_array(floats(12, 5), f"{name}.V")]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("made", TensorProto.FLOAT, None)], weights)


def chosen(condition: str, output: str, yes: onnx.GraphProto, no: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", [condition], [output], then_branch=yes, else_branch=no)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "in.onnx")
    return folder / "in.onnx"


@pytest.mark.parametrize("inverted", [False, True])
def test_the_branch_that_is_always_taken_is_pruned(inverted: bool, tmp_path: Path) -> None:
    stored = {"on": np.array(True)}
    nodes = [helper.make_node("Not", ["on"], ["off"])] if inverted else []
    yes, no = branch("yes"), branch("no")
    model = file([*nodes, chosen("off" if inverted else "on", "y", yes, no)], stored, ["n", 6], ["n", 5])
    taken = no if inverted else yes
    dense = file(
        [*taken.node[:2], helper.make_node("MatMul", ["h", taken.initializer[1].name], ["y"])],
        {t.name: numpy_helper.to_array(t) for t in taken.initializer},
        ["n", 6],
        ["n", 5],
    )
    data, out = [floats(8, 6) for _ in range(3)], tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    assert "If" not in [node.op_type for node in small.graph.node]
    (entry,) = pruned.plan.blocks
    assert len(entry.kept) == KEPT
    seen = np.concatenate([values(dense, "h", {"x": x}) for x in data]).astype(np.float64)
    reference = substituted(dense, "h", -1, entry.pruned, seen.mean(0))
    (got,), (wanted,), (whole,), (before,) = (run(m, {"x": data[0]}) for m in (out, reference, dense, model))
    assert np.abs(whole - before).max() < ROUNDING * np.abs(before).max()
    assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()


def test_two_constant_branches_with_names_in_common(tmp_path: Path) -> None:
    """Two branches follow each other, and one of them contains another."""
    inner = chosen("on", "made", branch("a"), branch("b"))
    around = helper.make_graph([inner], "around", [], [helper.make_tensor_value_info("made", TensorProto.FLOAT, None)])
    nodes = [
        chosen("on", "first", around, branch("c")),
        chosen("on", "second", branch("d"), branch("e")),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    model = file(nodes, {"on": np.array(True)}, ["n", 6], ["n", 5])
    data, out = [floats(8, 6)], tmp_path / "out.onnx"
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    assert sorted(entry.block.width for entry in pruned.plan.blocks) == [12, 12]
    assert {producer for e in pruned.plan.blocks for producer in e.block.producers} == {"a.W", "d.W"}
    assert "If" not in [node.op_type for node in onnx.load(out).graph.node]


def test_weights_in_branches_that_the_data_chooses_are_named(tmp_path: Path) -> None:
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    model = file([chosen("c", "y", branch("yes"), branch("no"))], {}, ["n", 6], ["n", 5], condition)
    data = [{"x": floats(8, 6), "c": np.array(True)}]
    with pytest.raises(
        vbpfx.AnalysisError,
        match="If is not in the operator table, so nothing that its subgraphs read, compute or hold",
    ) as said:
        vbpfx.prune_onnx(saved(model, tmp_path), data, tmp_path / "out.onnx", ratio=RATIO, progress=False)
    assert all(f"\n  {name}: " in str(said.value) for name in ("yes", "no"))


def test_what_stands_beside_such_branches_is_pruned(tmp_path: Path) -> None:
    """The branches' weights count in the report and are unchanged in the written file."""
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    net = Net()
    net.add("MatMul", ["x", net.weight("A", 6, 12)], "a")
    net.add("Tanh", ["a"], "hidden")
    net.add("MatMul", ["hidden", net.weight("B", 12, 5)], "b")
    nodes = [*net.nodes, chosen("c", "i", branch("yes"), branch("no")), helper.make_node("Add", ["b", "i"], ["y"])]
    model, out = file(nodes, net.stored, ["n", 6], ["n", 5], condition), tmp_path / "out.onnx"
    data = [{"x": floats(8, 6), "c": np.array(c)} for c in (True, False)]
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=RATIO, method="vbp", progress=False, round_to=1)
    (entry,) = pruned.plan.blocks
    assert entry.block.producers == ("A",)
    seen = np.concatenate([values(model, "hidden", feeds) for feeds in data]).astype(np.float64)
    reference = substituted(model, "hidden", -1, entry.pruned, seen.mean(0))
    for feeds in data:
        (got,), (wanted,) = (run(m, feeds) for m in (out, reference))
        assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_layer_before_a_recurrent_one_has_its_own_reason(kind: str, gates: int, tmp_path: Path) -> None:
    net = Net()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Relu", ["m"], "h")
    net.add(kind, ["h", net.weight("into", 1, 4 * gates, 12), net.weight("on", 1, 4 * gates, 4)], "y", hidden_size=4)
    with pytest.raises(
        vbpfx.AnalysisError, match=f"W: the recurrent layer {kind} reads or makes it, and keeps its widths"
    ):
        vbpfx.prune_onnx(
            saved(net.model(["t", "n", 6], ["t", 1, "n", 4]), tmp_path), [floats(3, 8, 6)], tmp_path / "o.onnx", ratio=RATIO, progress=False
        )  # fmt: skip


def test_how_many_refusals_are_not_shown_is_said(tmp_path: Path) -> None:
    """Of twelve padded convolutions without biases, eight are shown, each named by its weight."""
    net, source = Net(), "x"
    for number in range(12):
        net.add("Conv", [source, net.weight(f"w{number}", 3, 3, 3, 3)], f"c{number}", pads=[1, 1, 1, 1])
        net.add("Relu", [f"c{number}"], source := "y" if number == 11 else f"r{number}")
    path = saved(net.model(["n", 3, 5, 5], ["n", 3, 5, 5]), tmp_path)
    with pytest.raises(vbpfx.AnalysisError) as said:
        vbpfx.prune_onnx(path, [floats(4, 3, 5, 5)], tmp_path / "out.onnx", ratio=RATIO, progress=False)
    _, *lines = str(said.value).split("\n")
    assert [line.split(":")[0].strip() for line in lines[:8]] == [f"n{2 * n}_Conv" for n in range(8)]
    assert lines[8:] == ["  and 4 more; vbpfx inspect lists them all"]


@pytest.mark.parametrize(
    ("weight", "node", "name"),
    [
        ("onnx::MatMul_123", "MatMul_7", "MatMul_7.weight"),
        ("w_17", "up", "up.weight"),
        ("297", "stage/up", "stage.weight"),
        ("_v_15", "", "_v_15"),
        ("up_proj", "MatMul_7", "up_proj"),
        ("encoder.up", "MatMul_7", "encoder.up"),
        ("fc1", "MatMul_7", "fc1"),
    ],
)
def test_layers_go_by_their_nodes_where_their_weights_have_no_names(weight: str, node: str, name: str) -> None:
    made = helper.make_node("MatMul", ["x", weight], ["y"], name=node)
    model = ir.serde.deserialize_model(file([made], {weight: floats(6, 5)}, ["n", 6], ["n", 5]))
    graph = import_graph(model, Inputs((), {"x": torch.zeros(3, 6)})).graph_module
    assert [n for n, _ in graph.named_parameters()] == [name]


def test_what_torch_logs_about_a_size_that_does_not_fit_stays_away(capfd: pytest.CaptureFixture[str]) -> None:
    """The graph is first run at another batch size, which this one does not accept."""
    net = Net()
    net.stored["scale"] = floats(4, 6)
    net.add("Mul", ["x", "scale"], "y")
    model = ir.serde.deserialize_model(net.model([4, 6], [4, 6]))
    x = torch.randn(4, 6)
    found = import_graph(model, Inputs((), {"x": x})).graph_module(x)
    torch.testing.assert_close(found, x * torch.from_numpy(net.stored["scale"]))
    assert capfd.readouterr() == ("", "")
