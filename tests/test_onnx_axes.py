"""Dynamic axes of a file's inputs: which of them are the same axis, which is the batch, and which sizes the file accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import Array, Net, run, substituted, values

import vbpfx

# Rounding between two float32 computations, both in ONNX Runtime.
ROUNDING = 1e-5
RATIO, KEPT = 5 / 12, 7
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def hidden(net: Net, source: str, made: str) -> None:
    """Add a block of 12 hidden neurons from 6 to 5."""
    net.add("MatMul", [source, net.weight("W", 6, 12)], "m")
    net.add("Relu", ["m"], "h")
    net.add("MatMul", ["h", net.weight("V", 12, 5)], made)


def file(net: Net, inputs: dict[str, list[Any]], output: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        net.nodes,
        "net",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64 if n == "edges" else TensorProto.FLOAT, shape)
            for n, shape in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(array, name) for name, array in net.stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def alone(names: Sequence[Any]) -> onnx.ModelProto:
    net = Net()
    hidden(net, "x", "y")
    return file(net, {"x": [*names, 6]}, [*names, 5])


def with_a_state(x: Any, state: Any, *, first: bool = False) -> onnx.ModelProto:
    """A state whose second axis is the batch, as in recurrent networks."""
    net = Net()
    net.add("Squeeze", ["state", net.integers("zero", 0)], "s")
    net.add("Add", ["x", "s"], "z")
    hidden(net, "z", "y")
    inputs = {"x": [x, 6], "state": [1, state, 6]}
    return file(net, dict(reversed(inputs.items())) if first else inputs, [x, 5])


def two_inputs(first: Any, second: Any) -> onnx.ModelProto:
    net = Net()
    net.add("Add", ["x", "other"], "z")
    hidden(net, "z", "y")
    return file(net, {"x": [first, 6], "other": [second, 6]}, [first, 5])


def nodes_and_edges() -> onnx.ModelProto:
    """A graph network that adds the features of the two nodes of each edge."""
    net = Net()
    hidden(net, "x", "v")
    for name, place in (("from", 0), ("to", 1)):
        net.stored[name] = np.array(place)
        net.add("Gather", ["edges", name], f"{name}_node")
        net.add("Gather", ["v", f"{name}_node"], f"{name}_value")
    net.add("Add", ["from_value", "to_value"], "y")
    return file(net, {"x": ["num_nodes", 6], "edges": [2, "num_edges"]}, ["num_edges", 5])


def state_of_one() -> onnx.ModelProto:
    """The state is that of one sample, so the batch size must be one although it is dynamic."""
    net = Net()
    net.add("Unsqueeze", ["x", net.integers("zero", 0)], "steps")
    inputs = ["steps", net.weight("input", 1, 18, 6), net.weight("again", 1, 18, 6), "", "", "state"]
    net.add("GRU", inputs, ["", "last"], hidden_size=6)
    net.add("Squeeze", ["last", "zero"], "z")
    hidden(net, "z", "y")
    return file(net, {"x": ["batch", 6], "state": [1, 1, 6]}, ["batch", 5])


def of_graphs() -> list[dict[str, Array]]:
    """Return graphs of different sizes."""
    return [{"x": floats(n, 6), "edges": RANDOM.integers(0, n, (2, 3 * n))} for n in (11, 17, 30)]


def with_states(samples: int, axes: int = 3) -> list[dict[str, Array]]:
    return [{"x": floats(samples, 6), "state": floats(*[1] * (axes - 2), samples, 6)} for _ in range(24 // samples)]


ALONG = {("x", 0): 0, ("state", 0): 1}
# (name, file, data, batch axes, further batches on which the written file is compared with the reference)
CASES: list[tuple[str, Callable[[], onnx.ModelProto], list[dict[str, Array]], dict[Any, int], list[dict[str, Array]]]] = [
    ("-1", lambda: alone([-1]), [{"x": floats(8, 6)} for _ in range(3)], {("x", 0): 0}, [{"x": floats(3, 6)}]),
    ("-1, tokens", lambda: alone([-1, -1]), [{"x": floats(8, 4, 6)}], {("x", 0): 0}, [{"x": floats(3, 2, 6)}]),
    *[(f"a state, {n} samples", lambda: with_a_state("batch", "batch"), with_states(n), ALONG, with_states(5)) for n in (1, 4, 8)],
    ("a state first", lambda: with_a_state("batch", "batch", first=True), with_states(4), ALONG, with_states(5)),
    ("a state, no names", lambda: with_a_state(None, None), with_states(4), ALONG, with_states(5)),
    ("a question mark is not a name", lambda: alone(["?", "?"]), [{"x": floats(8, 4, 6)}], {("x", 0): 0}, [{"x": floats(3, 2, 6)}]),
    ("two names for one axis", lambda: two_inputs("unk__1", "unk__2"), [{"x": floats(8, 6), "other": floats(8, 6)}],
     {("x", 0): 0, ("other", 0): 0}, [{"x": floats(3, 6), "other": floats(3, 6)}]),
    ("nodes and edges", nodes_and_edges, of_graphs(), {}, of_graphs()),
    ("a state of one", state_of_one, [{"x": floats(1, 6), "state": floats(1, 1, 6)} for _ in range(24)], {},
     [{"x": floats(1, 6), "state": floats(1, 1, 6)}]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "data", "axes", "further"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_samples_are_where_the_file_says(
    method: str,
    make: Callable[[], onnx.ModelProto],
    data: list[dict[str, Array]],
    axes: dict[Any, int],
    further: list[dict[str, Array]],
    tmp_path: Path,
) -> None:
    """The written file equals the dense one with the removed channels at their means, also at other sizes."""
    model, out = make(), tmp_path / "out.onnx"
    onnx.save(model, tmp_path / "in.onnx")
    pruned = vbpfx.prune_onnx(
        tmp_path / "in.onnx",
        data,
        out,
        ratio=RATIO,
        method=method,
        progress=False,
        round_to=1,
        **({} if method == "vbp" else {"reconstruct": True}),
    )
    assert pruned.captured.inputs.batch_axes == axes
    assert (pruned.captured.batch is None) == (not axes)
    (entry,) = pruned.plan.blocks
    assert len(entry.kept) == KEPT
    if method == "auto":  # layers are refitted; the oracle has compared them with the plan
        assert pruned.verification is not None
        return
    seen = np.concatenate([values(model, "h", feeds).reshape(-1, 12) for feeds in data])
    reference = substituted(model, "h", -1, entry.pruned, seen.astype(np.float64).mean(0))
    for feeds in (data[0], *further):
        (got,), (wanted,), (dense,) = (run(m, feeds) for m in (out, reference, model))
        assert np.abs(got - wanted).max() < ROUNDING * np.abs(wanted).max()
        assert np.abs(dense - wanted).max() > 100 * ROUNDING * np.abs(wanted).max()


def test_an_open_axis_stays_open_in_the_file(tmp_path: Path) -> None:
    onnx.save(alone([-1]), tmp_path / "in.onnx")
    data = [{"x": floats(8, 6)}]
    vbpfx.prune_onnx(tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=RATIO, method="vbp", progress=False)
    small = onnx.load(tmp_path / "out.onnx")
    for value, width in ((small.graph.input[0], 6), (small.graph.output[0], 5)):
        samples, channels = value.type.tensor_type.shape.dim
        assert samples.WhichOneof("value") is None
        assert channels.dim_value == width


def test_a_batch_that_the_file_does_not_take_is_said(tmp_path: Path) -> None:
    onnx.save(state_of_one(), tmp_path / "in.onnx")
    data = [{"x": floats(4, 6), "state": floats(1, 1, 6)}]
    with pytest.raises(
        vbpfx.CalibrationError, match=r"does not run the file on the first batch \(x: \(4, 6\) float32; state"
    ):
        vbpfx.prune_onnx(tmp_path / "in.onnx", data, tmp_path / "out.onnx", ratio=RATIO, progress=False)
