"""Operators without a row: ONNX Runtime computes them, nothing that they touch is narrowed, and everything else can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Array, Net, mlp, run, substituted, values

import vbpfx

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
RATIO, KEPT = 5 / 12, 7
MICROSOFT = "com.microsoft"


class Strange(Net):
    """A net with operators of other domains and with subgraphs."""

    def add(self, op_type: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> None:
        domain = attributes.pop("domain", "")
        super().add(op_type, inputs, outputs, **attributes)
        self.nodes[-1].domain = domain

    def file(self, x: list[Any], y: list[Any], element: int = TensorProto.FLOAT) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", element, x)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
            [numpy_helper.from_array(array, name) for name, array in self.stored.items()],
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        onnx.checker.check_model(model)
        return model


def body(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[str]) -> onnx.GraphProto:
    shown = [
        helper.make_tensor_value_info(n, TensorProto.BOOL if n == "go_on" else TensorProto.FLOAT, None) for n in outputs
    ]
    return helper.make_graph(nodes, "body", inputs, shown)


def behind() -> onnx.ModelProto:
    """A contributed operator with its own weight follows the block."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("CDist", ["m", net.weight("places", 4, 5)], "y", domain=MICROSOFT, metric="euclidean")
    return net.file(["n", 6], ["n", 4])


def two_values() -> onnx.ModelProto:
    """An operator with three outputs, one of which is unused, follows layers over tokens."""
    net = Strange()
    net.add("MatMul", ["x", net.weight("W", 6, 12)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 6)], "v")
    net.add("Transpose", ["v"], "steps", perm=[1, 0, 2])
    net.add(
        "LSTM",
        ["steps", net.weight("input", 1, 24, 6), net.weight("state", 1, 24, 6)],
        ["", "last", "cell"],
        hidden_size=6,
    )
    net.add("Add", ["last", "cell"], "both")
    net.add("Squeeze", ["both", net.integers("first", 0)], "y")
    return net.file(["n", 3, 6], ["n", 6])


def with_a_batch_of_its_own() -> onnx.ModelProto:
    """The number of rows is doubled and halved again, so the first axis is not the batch in between."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("Resize", ["m", "", net.vector("scales", 2, 1)], "twice")
    net.add(
        "Slice",
        [
            "twice",
            net.integers("zero", 0),
            net.integers("last", 2**63 - 1),
            net.integers("axis", 0),
            net.integers("step", 2),
        ],
        "y",
    )
    return net.file(["n", 6], ["n", 5])


def row_by_row() -> onnx.ModelProto:
    """The branches of an If read a bias and the layer's output from the graph around them."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.scalar("limit", 0.0)
    net.add("ReduceSum", ["x"], "total", keepdims=0)
    net.add("Greater", ["total", "limit"], "positive")
    yes = body([helper.make_node("Add", ["m", "dense_2/bias"], ["yes"])], [], ["yes"])
    no = body([helper.make_node("Sin", ["m"], ["no"])], [], ["no"])
    net.add("If", ["positive"], "y", then_branch=yes, else_branch=no)
    return net.file(["n", 6], ["n", 5])


def in_a_form_of_its_own() -> onnx.ModelProto:
    """An operator with a row, in a form that its row does not support: part of an axis is reversed."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    names = [net.integers(n, v) for n, v in (("start", 3), ("end", -(2**63)), ("axis", 1), ("step", -1))]
    net.add("Slice", ["m", *names], "y")
    return net.file(["n", 6], ["n", 4])


def data_decides() -> onnx.ModelProto:
    """A number of rows depends on the values, so nothing is known about other batch sizes."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("Relu", ["x"], "some")
    net.add("NonZero", ["some"], "places")
    net.add("Cast", ["places"], "numbers", to=TensorProto.FLOAT)
    net.add("ReduceMean", ["numbers"], "mean", axes=[0, 1], keepdims=0)
    net.add("Add", ["m", "mean"], "y")
    return net.file(["n", 6], ["n", 5])


def weight_of_a_loop() -> onnx.ModelProto:
    """The body of a loop reads the bias of the block's first layer, which the graph around it also adds."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.stored |= {"three": np.array(3), "yes": np.array(True)}
    count, going = (
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    )
    carried = helper.make_tensor_value_info("state", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Identity", ["c"], ["go_on"]),
        helper.make_node("ReduceMean", ["dense_1/bias"], ["share"], keepdims=0),
        helper.make_node("Add", ["state", "share"], ["next"]),
    ]
    net.add("Loop", ["three", "yes", "m"], "y", body=body(nodes, [count, going, carried], ["go_on", "next"]))
    return net.file(["n", 6], ["n", 5])


def a_further_output() -> onnx.ModelProto:
    """A norm's second output, the mean, is read, but the row of the norm only makes the first output."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("LayerNormalization", ["m", net.weight("scale", 5)], ["normed", "mean"])
    net.add("Add", ["normed", "mean"], "y")
    return net.file(["n", 6], ["n", 5])


def only_onnx_runtime_knows_it() -> onnx.ModelProto:
    """The file has an operator that ONNX's checker rejects and ONNX Runtime runs."""
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("MeanVarianceNormalization", ["m"], "centred", axes=[1])
    net.add("Relu", ["centred"], "y")
    net.weight("scale", 5)
    model = net.file(["n", 6], ["n", 5])
    model.graph.node[-1].CopyFrom(helper.make_node("SimplifiedLayerNormalization", ["centred", "scale"], ["y"]))
    return model


AROUND = {
    "behind the block": (behind, (6,), f"{MICROSOFT}.CDist"),
    "several values": (two_values, (3, 6), "LSTM"),
    "twice the batch": (with_a_batch_of_its_own, (6,), "Resize (its input has fewer than three axes, so there is nothing to resize behind samples and channels)"),
    "If": (row_by_row, (6,), "If"),
    "a bias that a Loop reads": (weight_of_a_loop, (6,), "Loop"),
    "a form that has no row": (in_a_form_of_its_own, (6,), "Slice (it slices with a negative step, which is only supported for reversing a whole axis)"),
    "a further output": (a_further_output, (6,), "LayerNormalization (another node reads one of its optional outputs, which are not supported)"),
    "no operator of ONNX's": (only_onnx_runtime_knows_it, (6,), "MeanVarianceNormalization"),
    "shapes that depend on data": (data_decides, (6,), "NonZero"),
}  # fmt: skip


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(model, path)
    return path


def batches(shape: tuple[int, ...], seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((8, *shape)).astype(np.float32) for _ in range(3)]


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_the_block_beside_it_is_narrowed(name: str, method: str, tmp_path: Path) -> None:
    """The reference is the dense file with means in place of the removed neurons, in ONNX Runtime."""
    make, shape, operator = AROUND[name]
    model, data, out = make(), batches(shape), tmp_path / "out.onnx"
    file = saved(model, tmp_path)
    pruned = vbpfx.prune_onnx(file, data, out, ratio=RATIO, round_to=1, method=method, progress=False)
    (entry,) = pruned.plan.blocks
    assert (entry.block.width, len(entry.kept)) == (12, KEPT)
    assert pruned.left_alone == {operator: 1}
    assert operator in str(pruned)
    assert (pruned.captured.batch is None) == (make is data_decides)
    x = batches(shape, seed=1)[0][:5]
    (found,), (dense,) = run(out, {"x": x}), run(model, {"x": x})
    if method == "auto":  # layers are refitted; the oracle in the pipeline covers them
        assert pruned.verification is not None
        assert pruned.verification.error < ROUNDING < pruned.verification.effect
        return
    hidden = np.concatenate([values(model, "h", {"x": batch}).reshape(-1, 12) for batch in data]).astype(np.float64)
    (wanted,) = run(substituted(model, "h", -1, entry.pruned, hidden.mean(0)), {"x": x})
    assert relative(found, wanted) < ROUNDING
    assert relative(wanted, dense) > 100 * ROUNDING  # otherwise the comparison proves nothing


def two_blocks(strange: Callable[[Net], None]) -> onnx.ModelProto:
    """Add an unknown operator that makes y from z, the output of the block ``mlp``, and from h or the block's weights."""
    net = Strange()
    net.add("MatMul", ["x", net.weight("A", 6, 16)], "a")
    net.add("Relu", ["a"], "other")
    net.add("MatMul", ["other", net.weight("B", 16, 6)], "b")
    net.add("Add", ["b", "x"], "x2")
    mlp(net)
    net.nodes[4].input[0], net.nodes[-1].output[0] = "x2", "z"
    strange(net)
    return net.file(["n", 6], ["n", 5])


def reads_the_hidden_axis(net: Net) -> None:
    net.add("CDist", ["h", net.weight("places", 5, 12)], "f", domain=MICROSOFT, metric="euclidean")
    net.add("Add", ["z", "f"], "y")


def reads_the_weight(net: Net) -> None:
    net.add("MeanVarianceNormalization", ["dense_1/kernel"], "normed", axes=[0])
    net.add("MatMul", ["x", "normed"], "f")
    net.add("ReduceMean", ["f"], "mean", axes=[1])
    net.add("Add", ["z", "mean"], "y")


def a_body_reads_the_weight(net: Net) -> None:
    """The body reads the weight as the right factor of a product, like the layer itself."""
    net.scalar("limit", 0.0)
    net.add("ReduceSum", ["x"], "total", keepdims=0)
    net.add("Greater", ["total", "limit"], "positive")
    product = [
        helper.make_node("MatMul", ["x", "dense_1/kernel"], ["p"]),
        helper.make_node("ReduceMean", ["p"], ["yes"], axes=[1]),
    ]
    other = [helper.make_node("ReduceMean", ["x"], ["no"], axes=[1])]
    net.add("If", ["positive"], "f", then_branch=body(product, [], ["yes"]), else_branch=body(other, [], ["no"]))
    net.add("Add", ["z", "f"], "y")


def a_body_adds_to_the_layer(net: Net) -> None:
    """The only reader of the first product is a sum in a body, so its bias is not the layer's, but its axis is hidden."""
    for node in net.nodes:
        if node.output[0] == "m1":
            node.output[0] = "product"
        if "m1" in node.input:
            net.nodes.remove(node)
            break
    before = len(net.nodes)
    net.add("Abs", ["x"], "sizes")
    net.add("ReduceMax", ["sizes"], "most", keepdims=0)
    net.add("Greater", ["most", net.scalar("limit", -1.0)], "positive")  # always true, which the analysis cannot know
    added = [helper.make_node("Add", ["product", "dense_1/bias"], ["yes"])]
    same = [helper.make_node("Identity", ["dense_1/bias"], ["no"])]
    net.add("If", ["positive"], "a1", then_branch=body(added, [], ["yes"]), else_branch=body(same, [], ["no"]))
    added_nodes, net.nodes[before:] = net.nodes[before:], []
    at = next(i for i, node in enumerate(net.nodes) if node.output[0] == "h")
    net.nodes[at:at] = added_nodes
    net.nodes[-1].output[0] = "y"


HOSTILE = (reads_the_hidden_axis, reads_the_weight, a_body_reads_the_weight, a_body_adds_to_the_layer)


@pytest.mark.parametrize("strange", HOSTILE, ids=lambda f: f.__name__)
def test_what_it_reads_stays(strange: Callable[[Net], None], tmp_path: Path) -> None:
    model, out = two_blocks(strange), tmp_path / "out.onnx"
    data = batches((6,))
    pruned = vbpfx.prune_onnx(saved(model, tmp_path), data, out, ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    assert (entry.block.width, len(entry.kept)) == (16, 8)
    (operator,) = pruned.left_alone
    refused = [r for r in pruned.analysis.refusals if r.width == 12]
    assert refused
    assert f"operator {operator} is not in the operator table" in refused[0].reason
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, onnx.load(out)))
    for name in ("dense_1/kernel", "dense_1/bias", "dense_2/kernel"):
        assert np.array_equal(before[name], after[name])
    hidden = np.concatenate([values(model, "other", {"x": batch}) for batch in data]).astype(np.float64)
    reference = substituted(model, "other", -1, entry.pruned, hidden.mean(0))
    x = batches((6,), seed=1)[0][:5]
    for sign in (1, -1):  # takes both branches
        (found,), (wanted,), (dense,) = (run(m, {"x": sign * np.abs(x)}) for m in (out, reference, model))
        assert relative(found, wanted) < ROUNDING
        assert relative(wanted, dense) > 100 * ROUNDING


def test_shapes_of_its_values_stay_in_the_file(tmp_path: Path) -> None:
    """Shapes of unknown operators' values cannot be inferred again and are kept; those of narrowed values are updated."""
    model, out = behind(), tmp_path / "out.onnx"
    net = Strange()
    net.nodes = [
        *model.graph.node[:-1],
        helper.make_node("CDist", ["m", "places"], ["f"], domain=MICROSOFT, metric="euclidean"),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    net.stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    model = net.file(["n", 6], ["n", 4])
    shapes = {"h": 12, "f": 4}
    model.graph.value_info.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in shapes.items()
    )
    vbpfx.prune_onnx(saved(model, tmp_path), batches((6,)), out, ratio=RATIO, method="vbp", progress=False)
    found = {
        v.name: v.type.tensor_type.shape.dim[1].dim_value for v in onnx.load(out).graph.value_info if v.name in shapes
    }
    assert found == {"h": KEPT, "f": 4}


def test_what_makes_no_tensor_is_an_error(tmp_path: Path) -> None:
    net = Strange()
    mlp(net)
    net.nodes[-1].output[0] = "m"
    net.add("SequenceConstruct", ["m", "m"], "both")
    net.add("ConcatFromSequence", ["both"], "y", axis=1)
    path = saved(net.file(["n", 6], ["n", 10]), tmp_path)
    before = path.read_bytes()
    with pytest.raises(vbpfx.CaptureError, match=r"operator SequenceConstruct .* 'both' is not a tensor"):
        vbpfx.prune_onnx(path, batches((6,)), tmp_path / "out.onnx", ratio=0.5, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]
    assert path.read_bytes() == before
