"""The ONNX file computes the same as the pruned network at any batch size, and a wrong file is never left behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_unchanged, randomize, state
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.errors import ArtifactError, ExportError
from vbpfx.export import onnx as exporter

# The documented bound for other float32 kernels.
PARITY = 1e-4


class Layer(nn.Module):
    """An MLP on a residual stream of tokens; the second layer has no bias, so that the fold adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class TwoInputs(nn.Module):
    """Two inputs of equal shape and different roles, so that swapped inputs are noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6))
        self.other = nn.Linear(8, 6)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = self.body(a)
        return {"sum": y + self.other(b).tanh(), "first": y[:, 0]}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).relu()).mean((2, 3))


@dataclass(frozen=True)
class Case:
    """``dense`` and ``small`` are the shapes of weights before and after pruning; the file may store either layout."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    dense: tuple[tuple[int, ...], ...]
    small: tuple[tuple[int, ...], ...]


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors in the order of the signature, whatever the order of a mapping."""
    if isinstance(batch, Mapping):
        return [batch["a"], batch["b"]]
    return list(batch) if isinstance(batch, tuple) else [batch]


def pair(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 8), torch.randn(samples, 8)


MLP_SHAPES = ((20, 8), (6, 20)), ((10, 8), (6, 10))
CASES = [
    Case("tokens", Layer, lambda n: torch.randn(n, 5, 8), ((24, 8), (8, 24)), ((12, 8), (8, 12))),
    Case("two inputs", TwoInputs, pair, *MLP_SHAPES),
    Case("keywords", TwoInputs, lambda n: dict(zip("ab", pair(n), strict=True)), *MLP_SHAPES),
    Case("keywords in another order", TwoInputs, lambda n: dict(zip("ba", pair(n), strict=True)), *MLP_SHAPES),
    Case("images", Images, lambda n: torch.randn(n, 3, 6, 6), ((12, 3, 3, 3), (5, 12, 1, 1)), ((6, 3, 3, 3), (5, 6, 1, 1))),
]  # fmt: skip


def prune(model: nn.Module, batch: Any, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(model, [batch], ratio=0.5, round_to=1, progress=False, **options)


def evaluate(network: nn.Module, batch: Any) -> list[np.ndarray]:
    with torch.no_grad():
        output = network(**batch) if isinstance(batch, Mapping) else network(*tensors(batch))
    return [leaf.numpy() for leaf in pytree.tree_leaves(output)]


def layouts(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {shape, shape[::-1]} if len(shape) == 2 else {shape}


SYMBOLIC, EXPORT = range(5), (0, 2, 3)
RUNS = [
    pytest.param(CASES[i], frontend, id=f"{CASES[i].name}-{frontend}")
    for frontend, which in (("symbolic", SYMBOLIC), ("export", EXPORT))
    for i in which
]


@pytest.mark.parametrize(("case", "frontend"), RUNS)
def test_onnx_runtime_computes_what_pytorch_does(case: Case, frontend: str, tmp_path: Path) -> None:
    pruned = prune(randomize(case.make()), case.batch(32), frontend=frontend)
    before = state(pruned.graph_module)
    odd = pytest.warns(UserWarning, match="8 does not divide") if pruned.report.uneven else nullcontext()
    with odd:
        path = pruned.to_onnx(tmp_path / "deep" / "model.onnx")
    assert_unchanged(pruned.graph_module, before)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"], "weights in a second file, or something left over"

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    if case.make is TwoInputs:
        assert sorted(names) == ["a", "b"]
        names = ["a", "b"]
    for samples in (1, 3, 8):
        batch = case.batch(samples)
        found = session.run(None, {n: t.numpy() for n, t in zip(names, tensors(batch), strict=True)})
        for a, b in zip(found, evaluate(pruned.graph_module, batch), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= PARITY * np.abs(b).max()

    graph = onnx.load(path).graph
    for value in (*graph.input, *graph.output):
        batch_axis = value.type.tensor_type.shape.dim[0]
        assert batch_axis.WhichOneof("value") == "dim_param", (
            f"{value.name} has a fixed batch of {batch_axis.dim_value}"
        )
    assert len({v.type.tensor_type.shape.dim[0].dim_param for v in (*graph.input, *graph.output)}) == 1

    stored = {tuple(tensor.dims) for tensor in graph.initializer}
    for shape in case.small:
        assert layouts(shape) & stored, f"no weight of shape {shape} in {stored}"
    for shape in case.dense:
        assert not layouts(shape) & stored, f"the dense {shape} is in {stored}"


def test_the_dense_network_is_not_what_was_written(tmp_path: Path) -> None:
    # The comparison above would prove little if the two networks agreed anyway.
    model = randomize(Layer())
    pruned = prune(model, torch.randn(32, 5, 8))
    session = onnxruntime.InferenceSession(str(pruned.to_onnx(tmp_path / "m.onnx")), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 5, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (dense,) = evaluate(model, x)
    assert np.abs(found - dense).max() > 100 * PARITY * np.abs(dense).max()


@pytest.fixture(scope="module")
def pruned() -> vbpfx.Pruned:
    torch.manual_seed(0)
    return prune(randomize(Layer()), torch.randn(32, 5, 8))


def other_weights(network: nn.Module, example: Any, to_program: Any) -> Any:
    """Write a well-formed file of another network, one weight of which differs by 0.1."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("fc1.weight")[3, 2] += 0.1
    return to_program(other, example)


def dense_file(network: nn.Module, example: Any, to_program: Any) -> Any:
    return to_program(randomize(Layer()), example)


class Garbage:
    def save(self, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"no model at all")


class Hollow:
    """A well-formed file that ONNX Runtime cannot load, because the domain of its node does not exist."""

    def save(self, path: str, **_: Any) -> None:
        def value(name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 5, 8])

        weights = [
            onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
            for name, shape in (("w1", (12, 8)), ("w2", (8, 12)))
        ]
        node = onnx.helper.make_node("Nothing", ["x", "w1", "w2"], ["y"], domain="nowhere")
        graph = onnx.helper.make_graph([node], "g", [value("x")], [value("y")], weights)
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("nowhere", 1)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


WRONG = {
    "other weights": (other_weights, "ONNX Runtime differs from PyTorch by .* at batch 1"),
    "dense": (dense_file, r"holds a tensor of shape \(24, 8\), the dense fc1.weight"),
    "garbage": (lambda *_: Garbage(), ".+"),
    "unknown operator": (lambda *_: Hollow(), ".+"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_caught_and_not_left_behind(
    wrong: str, pruned: vbpfx.Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_program = exporter._to_program
    make, message = WRONG[wrong]
    made = functools.cache(lambda network: make(network, pruned.captured.inputs.resized(2), to_program))
    monkeypatch.setattr(exporter, "_to_program", lambda network, example: made(network))
    with pytest.raises(ExportError, match=message):
        pruned.to_onnx(tmp_path / "new.onnx")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old.onnx"
    old.write_bytes(b"what was here before")
    with pytest.raises(ExportError, match=message):
        pruned.to_onnx(old)
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert old.read_bytes() == b"what was here before"


def test_a_network_that_cannot_be_exported_says_so(
    pruned: vbpfx.Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"cannot export the network: RuntimeError: no such operator$"):
        pruned.to_onnx(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_an_artifact_error(pruned: vbpfx.Pruned, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write .*model\.onnx"):
        pruned.to_onnx(tmp_path / "file" / "model.onnx")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_good_file_replaces_what_was_there(pruned: vbpfx.Pruned, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was here before")
    pruned.to_onnx(path)
    onnx.checker.check_model(onnx.load(path))
    assert exporter.initializer_shapes(path).keys() == {t.name for t in onnx.load(path).graph.initializer}


# ---- the shape check, on shapes alone -------------------------------------------------------------------------------

# Layer at half its width: fc1 (12, 8), fc2 (8, 12) and the bias that the fold added.
RIGHT = {"norm.weight": (8,), "norm.bias": (8,), "fc1.weight": (12, 8), "fc1.bias": (12,), "fc2.bias": (8,)}


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param({"fc2.weight": (8, 12)}, id="as they are"),
        pytest.param({"fc1.weight": (8, 12), "fc2.weight": (12, 8)}, id="transposed"),
        pytest.param({"fc1.weight": (1, 8, 12), "fc2.weight": (12, 8)}, id="with an axis of one"),
        pytest.param({"val_3": (8, 12), "fc1.weight": (12, 8)}, id="renamed"),
        pytest.param({"val_3": (2, 4, 12), "fc1.weight": (12, 8)}, id="renamed, in other axes"),
        pytest.param(
            {"fc1.weight": (12, 8), "fc2.weight": (8, 12), "mask": (24, 8)}, id="beside a mask of the dense shape"
        ),
    ],
)
def test_the_shape_check_accepts_small_weights(pruned: vbpfx.Pruned, weights: dict[str, tuple[int, ...]]) -> None:
    check(RIGHT | weights, pruned, pruned.plan)


def check(stored: dict[str, tuple[int, ...]], pruned: vbpfx.Pruned, plan: vbpfx.Plan | None) -> None:
    """Check shapes as if products read all tensors with two or more axes, except masks."""
    weights = {name for name, shape in stored.items() if len(shape) > 1 and "mask" not in name}
    exporter._check_shapes(stored, weights, pruned.graph_module, plan)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param({"fc1.weight": (24, 8), "fc2.weight": (8, 24)}, r"a tensor of shape \(24, 8\), the dense fc1", id="dense"),
        pytest.param({"fc1.weight": (8, 24), "fc2.weight": (24, 8)}, r"a tensor of shape \(24, 8\), the dense fc1", id="dense, transposed"),
        pytest.param({"fc1.weight": (10, 8), "fc2.weight": (8, 12)}, r"no tensor of shape \(12, 8\), which fc1", id="neither"),
        pytest.param({"val_1": (8, 10)}, r"no tensor of shape \(8, 12\), which fc2", id="renamed, neither"),
        pytest.param({"val_1": (8, 12), "val_2": (8, 24)}, r"a tensor of shape \((24, 8|8, 24)\), the dense fc", id="renamed, one dense"),
        pytest.param({"fc2.weight": (8, 24)}, r"a tensor of shape \((24, 8|8, 24)\), the dense fc", id="one dense"),
        pytest.param({"fc2.weight": (8, 12), "spare": (24, 8)}, r"a tensor of shape \(24, 8\), the dense fc1.weight", id="both"),
    ],
)  # fmt: skip
def test_the_shape_check_refuses_a_dense_file(
    pruned: vbpfx.Pruned, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        check(RIGHT | weights, pruned, pruned.plan)
    check(RIGHT | weights, pruned, None)  # without a plan there is nothing to compare


def test_texts_may_differ_in_number_and_length(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc1, self.fc2 = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc2(torch.nn.functional.gelu(self.fc1(self.embedding(ids)))).mean(1)

    pruned = vbpfx.prune(Text(), [torch.randint(0, 50, (4, 7))], ratio=0.5, progress=False)
    session = onnxruntime.InferenceSession(pruned.to_onnx(tmp_path / "text.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 7), (3, 9), (2, 2)):
        ids = torch.randint(0, 50, shape)
        (found,) = session.run(None, {"ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), pruned.graph_module(ids).detach())


class Attending(nn.Module):
    """Fused attention in front of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.layer = nn.Linear(8, 24), Layer()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.layer(x + F.scaled_dot_product_attention(q, k, v).squeeze(1))


def test_a_loaded_graph_is_exported_like_the_one_that_was_saved(tmp_path: Path) -> None:
    """An artifact stores no shapes, which the exporter needs to decompose attention."""
    torch.manual_seed(0)
    example = torch.randn(2, 5, 8)
    small = prune(randomize(Attending()), torch.randn(32, 5, 8))
    small.save(tmp_path / "artifact")
    inputs = as_inputs(example, small.graph_module)
    path = exporter.export_onnx(vbpfx.load(tmp_path / "artifact"), inputs, tmp_path / "loaded.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = exporter.run_session(session, inputs)
    torch.testing.assert_close(found, small.graph_module(example).detach(), rtol=PARITY, atol=PARITY)


class OneDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc2(self.fc1(batch["x"]).relu() * batch["scale"])


def test_a_dictionary_as_the_only_argument(tmp_path: Path) -> None:
    batch = {"x": torch.randn(6, 8), "scale": torch.rand(6, 1)}
    pruned = vbpfx.prune(OneDictionary(), [batch], ratio=0.5, progress=False)
    session = onnxruntime.InferenceSession(pruned.to_onnx(tmp_path / "model.onnx"))
    assert len(session.get_inputs()) == 2  # the outputs were compared before the file was written


@dataclass
class Found:
    logits: Tensor
    boxes: dict[str, Tensor]
    loss: Tensor | None = None


class Detecting(nn.Module):
    """Its results have the names of an inner value (``relu``) and of an input (``x``)."""

    def __init__(self, as_dataclass: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.as_dataclass = nn.Linear(8, 12), nn.Linear(12, 4), as_dataclass

    def forward(self, x: Tensor) -> Any:
        y = self.fc2(self.fc1(x).relu())
        return (
            Found(y, {"low": y - 1, "high": y + 1}) if self.as_dataclass else {"relu": y, "x": y * 2, "linear": y * 3}
        )


@pytest.mark.parametrize("form", ["graph", "own class", "loaded"])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("as_dataclass", [False, True])
def test_results_have_their_names_in_the_file(frontend: str, form: str, as_dataclass: bool, tmp_path: Path) -> None:
    model = randomize(Detecting(as_dataclass))
    pruned = prune(model, torch.randn(16, 8), frontend=frontend)
    network = pruned.graph_module if form == "graph" else pruned.apply_to(model).eval()
    if form == "loaded":
        network = vbpfx.load(pruned.save(tmp_path / "saved")).eval()
    before = dict(vars(network))
    path = exporter.export_onnx(network, pruned.captured.inputs, tmp_path / "model.onnx", plan=pruned.plan)
    assert vars(network).keys() == before.keys()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 8)
    y = small_logits(pruned, x)
    wanted = (
        {"logits": y, "boxes.low": y - 1, "boxes.high": y + 1}
        if as_dataclass
        else {"relu": y, "x_output": y * 2, "linear": y * 3}
    )
    names = [entry.name for entry in session.get_outputs()]
    assert names == list(wanted)
    for name, found in zip(names, session.run(None, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(found, wanted[name].numpy(), rtol=PARITY, atol=PARITY)


def small_logits(pruned: vbpfx.Pruned, x: Tensor) -> Tensor:
    """Compute the narrowed layers by hand."""
    w = dict(pruned.graph_module.named_parameters())
    with torch.no_grad():
        return F.linear(F.linear(x, w["fc1.weight"], w["fc1.bias"]).relu(), w["fc2.weight"], w["fc2.bias"])


class BesideOthers(nn.Module):
    """An MLP of 8 -> 24 -> 8 beside tensors that happen to have the shapes of its dense weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, Layer()
        self.register_buffer("places", torch.randn(24, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "added":
            x = x + self.places
        elif self.kind == "made in forward":
            x = x + torch.linspace(-1, 1, 192).reshape(24, 8)
        elif self.kind == "multiplied":
            x = x + (x @ self.places.t()) @ self.places
        else:
            basis = torch.linspace(-1, 1, 192).reshape(24, 8)
            x = x + (x @ basis.t()) @ basis
        return self.layer(x)


@pytest.mark.parametrize("kind", ["added", "made in forward", "multiplied", "made and multiplied"])
def test_other_tensors_may_have_the_shape_of_a_dense_weight(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 24, 8)
    pruned = vbpfx.prune(randomize(BesideOthers(kind)), [x], ratio=0.5, progress=False)
    session = onnxruntime.InferenceSession(pruned.to_onnx(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = pruned.graph_module(x).detach().numpy()
    assert np.abs(found - expected).max() < PARITY * np.abs(expected).max()
