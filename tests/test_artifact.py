"""A saved network loads bit for bit, and a damaged, foreign or hostile artifact raises ArtifactError."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracle import assert_unchanged, randomize, state
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.artifacts.folder import load_beside
from vbpfx.data.inputs import as_inputs
from vbpfx.errors import ArtifactError
from vbpfx.outputs.fields import Fields
from vbpfx.plans.files import load_plan

FILES = {"plan.json", "plan.safetensors", "model.safetensors", "graph.json", "report.json", "report.html"}


def mlp(width: int = 16, activation: type[nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), activation(), nn.Linear(width, 4))


class Layer(nn.Module):
    """Attention and an MLP on a residual stream; the second linear layer has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj((torch.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Functional(nn.Module):
    """Weights that belong to no layer, so that the fold makes a new parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(16, 8)), nn.Parameter(torch.empty(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.w1)), self.w2)


class Buffers(nn.Module):
    """A persistent buffer, a non-persistent one, and an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))
        self.register_buffer("shift", torch.linspace(-1, 1, 16), persistent=False)
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2((self.fc1(x * self.scale) + self.shift).relu())[:, self.order]


class Tied(nn.Module):
    """The output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(h + self.fc2(F.gelu(self.fc1(h))))


class Nested(nn.Module):
    """Nested dictionaries, tuples and lists are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"logits": (self.head(y), {"deep": y.relu()}), "list": [y, y * 2]}


class Keywords(nn.Module):
    """Two keyword-only tensors, and an option with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain = mlp(), nn.Linear(3, 4)

    def forward(self, x: Tensor, *, context: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.body(x) * self.gain(context).sigmoid()
        return y if extra is None else y + extra


@fx.wrap
def doubled(x: Tensor) -> Tensor:
    return x * 2


class Wrapped(nn.Module):
    """A function of the user that the tracer does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.body(x))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    own_class: bool = True


def rows(samples: int) -> Tensor:
    return torch.randn(samples, 8)


CASES = [
    Case("mlp", mlp, rows),
    Case("transformer", Layer, lambda n: torch.randn(n, 5, 8)),
    Case("created bias", lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)), rows),
    Case("functional", Functional, rows, own_class=False),
    Case("batch norm", lambda: nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3)), lambda n: torch.randn(n, 3, 5, 5)),
    Case("buffers", Buffers, rows),
    Case("tied", Tied, lambda n: torch.randint(11, (n, 5))),
    Case("nested outputs", Nested, rows),
    Case("keywords", Keywords, lambda n: {"context": torch.randn(n, 3), "x": torch.randn(n, 8)}),
]  # fmt: skip
ALL = [pytest.param(c, f, id=f"{c.name}-{f}") for c in CASES for f in ("symbolic", "export")]


def prune(model: nn.Module, batch: Any, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(model, [batch], progress=False, **({"ratio": 0.5} | options))


def run(network: nn.Module, batch: Any) -> Any:
    inputs = as_inputs(batch, network)
    with torch.no_grad():
        return network(*inputs.args, **inputs.kwargs)


def assert_same_output(found: nn.Module, expected: nn.Module, batch: Any) -> None:
    """Assert that the outputs are equal bit for bit and have the same structure."""
    got, wanted = pytree.tree_flatten(run(found, batch)), pytree.tree_flatten(run(expected, batch))
    assert got[1] == wanted[1]
    for a, b in zip(got[0], wanted[0], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A saved MLP of width 16, half of it pruned."""
    return prune(randomize(mlp()), rows(32)).save(tmp_path / "artifact")


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "frontend"), ALL)
def test_the_graph_comes_back_bit_for_bit(case: Case, frontend: str, tmp_path: Path) -> None:
    pruned = prune(randomize(case.make()), case.batch(32), frontend=frontend)
    assert pruned.plan.removed > 0
    vbpfx.save(pruned, tmp_path)
    loaded = vbpfx.load(tmp_path)
    assert isinstance(loaded, fx.GraphModule)
    for samples in (1, 3, 8):
        assert_same_output(loaded, pruned.graph_module, case.batch(samples))
    assert {p.name for p in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(("case", "frontend"), [p for p in ALL if p.values[0].own_class])
def test_the_own_class_comes_back_bit_for_bit(case: Case, frontend: str, tmp_path: Path) -> None:
    model = randomize(case.make())
    pruned = prune(model, case.batch(32), frontend=frontend)
    pruned.save(tmp_path)
    fresh = randomize(case.make())
    before = state(fresh)
    loaded = vbpfx.load(tmp_path, into=fresh).eval()
    assert type(loaded) is type(model)
    for samples in (1, 3, 8):
        assert_same_output(loaded, pruned.apply_to(model).eval(), case.batch(samples))
    assert_unchanged(fresh, before)


@pytest.mark.parametrize(("case", "frontend"), ALL)
def test_the_tensors_come_back_under_their_names(case: Case, frontend: str, tmp_path: Path) -> None:
    pruned = prune(randomize(case.make()), case.batch(32), frontend=frontend)
    pruned.save(tmp_path)
    loaded, small = vbpfx.load(tmp_path), pruned.graph_module
    # No duplicates: a tied weight that was loaded twice would be counted and trained twice.
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert sorted(n for n, _ in loaded.named_buffers()) == sorted(n for n, _ in small.named_buffers())
    assert sorted(loaded.state_dict()) == sorted(small.state_dict()), "a buffer became persistent, or is so no more"
    assert not any(module.training for module in loaded.modules())


def test_a_network_saved_by_an_earlier_version_loads() -> None:
    """Version 0.1.0 saved this network with gates, a carried norm and named results, and its outputs of that time."""
    saved = Path(__file__).parent / "saved"
    expected = load_file(saved / "gated_0.1.0-expected.safetensors")
    loaded = vbpfx.load(saved / "gated_0.1.0")
    found = loaded(expected["x"])
    assert set(found) == {"logits", "hidden"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)  # the order of summation may differ
    written = json.loads((saved / "gated_0.1.0" / "report.json").read_text())["widths"]
    assert load_plan(saved / "gated_0.1.0").widths == {name: now for name, (_, now) in written.items()}


def test_frozen_parameters_come_back_frozen(tmp_path: Path) -> None:
    model = randomize(mlp())
    model[0].requires_grad_(False)
    prune(model, rows(32)).save(tmp_path)
    wanted = {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}
    assert {n: p.requires_grad for n, p in vbpfx.load(tmp_path, into=model).named_parameters()} == wanted
    assert {n: p.requires_grad for n, p in vbpfx.load(tmp_path).named_parameters()} == wanted


def test_tied_weights_come_back_as_one_parameter(tmp_path: Path) -> None:
    prune(randomize(Tied()), torch.randint(11, (32, 5))).save(tmp_path)
    graph, own = vbpfx.load(tmp_path), vbpfx.load(tmp_path, into=randomize(Tied()))
    for loaded in (own, graph):
        assert loaded.get_parameter("head.weight") is loaded.get_parameter("embed.weight")
    # Counted by hand: an embedding, then two linear layers with 8 of 16 neurons left; the tied head adds none.
    wanted = 11 * 8 + (8 * 8 + 8) + (8 * 8 + 8)
    assert sum(p.numel() for p in own.parameters()) == wanted
    assert sum(p.numel() for p in graph.parameters()) == wanted


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_call_signature_survives(frontend: str, tmp_path: Path) -> None:
    batch = {"x": torch.randn(32, 8), "context": torch.randn(32, 3)}
    pruned = prune(randomize(Keywords()), batch, frontend=frontend)
    pruned.save(tmp_path)
    loaded = vbpfx.load(tmp_path)
    names = ["x", "context", "extra"] if frontend == "symbolic" else ["x", "context"]  # export drops unused arguments
    for network in (pruned.graph_module, loaded):
        assert list(inspect.signature(network.forward).parameters) == names
    with torch.no_grad():
        expected = pruned.graph_module(**batch)
        assert torch.equal(loaded(context=batch["context"], x=batch["x"]), expected)
        assert torch.equal(loaded(batch["x"], context=batch["context"]), expected)
        with pytest.raises(TypeError):
            nn.Module.__call__(loaded, batch["x"])


def test_the_loaded_graph_trains(tmp_path: Path) -> None:
    pruned = prune(randomize(mlp()), rows(32))
    pruned.save(tmp_path)
    loaded, x = vbpfx.load(tmp_path), rows(5)
    loaded(x).square().sum().backward()
    pruned.graph_module(x).square().sum().backward()
    wanted = dict(pruned.graph_module.named_parameters())
    assert {n: tuple(p.shape) for n, p in wanted.items()} == {
        "0.weight": (8, 8),
        "0.bias": (8,),
        "2.weight": (4, 8),
        "2.bias": (4,),
    }
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.grad, wanted[name].grad)


def test_no_pickle_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2  # noqa: F401 # pickles its own version number when it is first imported, which reads and writes no file

    model = randomize(Layer())
    pruned = prune(model, torch.randn(32, 5, 8))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    for owner, name in ((torch, "load"), (torch, "save"), *((pickle, n) for n in ("load", "loads", "dump", "dumps"))):
        monkeypatch.setattr(owner, name, refuse)
    pruned.save(tmp_path)
    x = torch.randn(3, 5, 8)
    assert_same_output(vbpfx.load(tmp_path), pruned.graph_module, x)
    assert_same_output(vbpfx.load(tmp_path, into=Layer()).eval(), pruned.graph_module, x)


@pytest.mark.parametrize(("case", "frontend"), ALL)
def test_the_plan_comes_back_equal(case: Case, frontend: str, tmp_path: Path) -> None:
    pruned = prune(randomize(case.make()), case.batch(32), frontend=frontend)
    pruned.save(tmp_path)
    plan = load_plan(tmp_path)
    assert plan.fingerprint == pruned.plan.fingerprint
    assert plan.settings == pruned.plan.settings
    assert [entry.block for entry in plan.blocks] == [entry.block for entry in pruned.plan.blocks]
    for found, expected in zip(plan.blocks, pruned.plan.blocks, strict=True):
        assert found.kept == expected.kept
        assert [c.dtype for c in found.constants] == [torch.float64] * len(expected.constants)
        for a, b in zip(found.constants, expected.constants, strict=True):
            assert torch.equal(a, b)
    # The loaded plan has the same effect as the original one.
    assert_same_output(vbpfx.convert(pruned.captured, plan), pruned.graph_module, case.batch(3))


def test_the_report_file_holds_the_figures(artifact: Path) -> None:
    figures = json.loads((artifact / "report.json").read_text())
    # by hand: 8 -> 16 -> 4 against 8 -> 8 -> 4
    assert figures["params"] == [8 * 16 + 16 + 16 * 4 + 4, 8 * 8 + 8 + 8 * 4 + 4]
    assert figures["macs"] == [8 * 16 + 16 * 4, 8 * 8 + 8 * 4]
    assert figures["neurons"] == [16, 8]


def test_a_user_function_is_saved_without_a_graph(tmp_path: Path) -> None:
    model = randomize(Wrapped())
    pruned = prune(model, rows(32), frontend="symbolic")
    pruned.save(tmp_path)
    with pytest.raises(ArtifactError, match=r"calls \S*doubled.*pass into= a model of the pruned class"):
        vbpfx.load(tmp_path)
    assert_same_output(vbpfx.load(tmp_path, into=randomize(Wrapped())).eval(), pruned.graph_module, rows(3))
    beside = load_beside(tmp_path, randomize(Wrapped()).eval())
    assert isinstance(beside, Wrapped)
    assert_same_output(beside, pruned.graph_module, rows(3))


def test_beside_its_dense_model_a_network_is_the_graph_that_was_checked(artifact: Path) -> None:
    beside = load_beside(artifact, mlp())
    assert isinstance(beside, fx.GraphModule)
    assert_same_output(beside, vbpfx.load(artifact), rows(3))
    (artifact / "graph.json").write_text("[]")  # a damaged graph must not silently lead to the class
    with pytest.raises(ArtifactError, match=r"graph\.json is damaged"):
        load_beside(artifact, mlp())


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", sorted(FILES - {"report.json", "report.html"}))
def test_a_truncated_file_is_an_artifact_error(artifact: Path, name: str, part: float) -> None:
    path = artifact / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ArtifactError, match=name):
        vbpfx.load(artifact, into=mlp())
    if not name.startswith("plan"):
        with pytest.raises(ArtifactError, match=name):
            vbpfx.load(artifact)


@pytest.mark.parametrize("name", sorted(FILES - {"report.json", "report.html"}))
@pytest.mark.parametrize("damage", ["missing", "a folder", "other bytes", "last byte"])
def test_a_damaged_file_is_an_artifact_error(artifact: Path, name: str, damage: str) -> None:
    path = artifact / name
    whole = path.read_bytes().rstrip()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "other bytes":
        path.write_bytes(bytes(range(128, 256)) * 4)
    elif damage == "last byte":
        path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=name):
        vbpfx.load(artifact, into=mlp())


@pytest.mark.parametrize("name", ["plan.json", "graph.json"])
@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", '"x"'])
def test_json_that_is_something_else_is_an_artifact_error(artifact: Path, name: str, text: str) -> None:
    (artifact / name).write_text(text)
    with pytest.raises(ArtifactError, match=name):
        vbpfx.load(artifact, into=mlp())
    if name == "graph.json":
        with pytest.raises(ArtifactError, match=name):
            vbpfx.load(artifact)


@pytest.mark.parametrize("version", [2, 6])
def test_another_format_is_named(artifact: Path, version: int) -> None:
    edit_json(artifact / "plan.json", lambda data: data.update(format=version))
    with pytest.raises(ArtifactError, match=f"has format {version}, this vbpfx reads 3 to 5: prune again"):
        vbpfx.load(artifact, into=mlp())


@pytest.mark.parametrize("key", ["nodes", "modules", "buffers", "name", "tied"])
def test_a_graph_without_one_of_its_parts_is_an_artifact_error(artifact: Path, key: str) -> None:
    edit_json(artifact / "graph.json", lambda data: data.pop(key))
    with pytest.raises(ArtifactError, match=r"graph\.json"):
        vbpfx.load(artifact)


@pytest.mark.parametrize("into", [False, True])
def test_weights_that_lack_a_tensor_are_an_artifact_error(artifact: Path, into: bool) -> None:
    tensors = load_file(artifact / "model.safetensors")
    del tensors["2.weight"]
    save_file(tensors, artifact / "model.safetensors")
    # into= must not keep the fresh model's own random weight.
    with pytest.raises(ArtifactError, match=r"2\.weight"):
        vbpfx.load(artifact, into=mlp() if into else None)


def test_files_of_two_artifacts_do_not_mix(artifact: Path, tmp_path: Path) -> None:
    other = prune(randomize(mlp()), rows(32), ratio=0.25).save(tmp_path / "other")
    (artifact / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="do not belong together"):
        vbpfx.load(artifact, into=mlp())
    (artifact / "plan.safetensors").write_bytes((other / "plan.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="block 0->2: 8 removed neurons"):
        vbpfx.load(artifact, into=mlp())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: mlp(width=20), id="width"),
        pytest.param(lambda: mlp(activation=nn.ReLU), id="class names"),
        pytest.param(lambda: nn.Sequential(*mlp(), nn.Linear(4, 4)), id="depth"),
        pytest.param(lambda: nn.Sequential(mlp()), id="names"),
    ],
)
def test_an_artifact_of_another_model_is_an_artifact_error(artifact: Path, other: Callable[[], nn.Module]) -> None:
    model = other()
    before = state(model)
    with pytest.raises(ArtifactError, match="another structure than this Sequential"):
        vbpfx.load(artifact, into=model)
    assert_unchanged(model, before)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "deeper", "deeper/still"])
def test_a_folder_that_runs_through_a_file_is_an_artifact_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    pruned = prune(randomize(mlp()), rows(32))
    with pytest.raises(ArtifactError, match=r"cannot write .*file.*choose a folder that can be written"):
        pruned.save(tmp_path / "file" / below)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


_FAILURES = [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("failure", _FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("which", [1, 2], ids=["plan", "model"])
def test_an_interrupted_write_leaves_the_old_artifact(
    artifact: Path, which: int, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    calls = []

    def half(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        save_file(tensors, path, metadata)
        if len(calls) == which:
            path.write_bytes(path.read_bytes()[:50])
            raise failure

    other = prune(randomize(mlp()), rows(32), ratio=0.25)
    monkeypatch.setattr("vbpfx.storage.files.save_file", half)
    with pytest.raises(ArtifactError, match=r"cannot write .*safetensors.*No space left"):
        other.save(artifact)
    assert len(calls) == which
    after = {p.name: p.read_bytes() for p in artifact.iterdir()}
    assert sorted(after) == sorted(before), "a temporary file was left behind"
    assert [name for name in before if after[name] != before[name]] == [], "the old artifact is half replaced"


def test_a_full_disk_is_an_artifact_error(artifact: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on file sizes simulates a full disk
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    other = prune(randomize(mlp()), rows(32), ratio=0.25)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*plan\.safetensors"):
            other.save(artifact)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before


def test_saving_over_an_artifact_replaces_all_of_it(artifact: Path) -> None:
    other = prune(randomize(mlp()), rows(32), ratio=0.25)
    other.save(artifact)
    assert load_plan(artifact).widths == {"0->2": 12}
    assert_same_output(vbpfx.load(artifact), other.graph_module, rows(3))
    assert {p.name for p in artifact.iterdir()} == FILES


# ---- hostile graphs -------------------------------------------------------------------------------------------------


def call(op: str, target: Any, args: list[Any], kwargs: list[Any] | None = None) -> Callable[[Any], None]:
    """Insert a node in front of the output and let the output return it."""

    def edit(data: Any) -> None:
        node = {"name": "evil", "op": op, "target": target, "args": {"tuple": args}, "kwargs": {"dict": kwargs or []}}
        data["nodes"].insert(-1, node)
        data["nodes"][-1]["args"] = {"tuple": [{"node": "evil"}]}

    return edit


def on_node(op: str, /, **fields: Any) -> Callable[[Any], None]:
    return lambda data: next(node for node in data["nodes"] if node["op"] == op).update(fields)


def module(**fields: Any) -> Callable[[Any], None]:
    return lambda data: data["modules"]["0"].update(fields)


X = {"node": "input_1"}
# Writes the file "executed" into the working directory if it is ever evaluated.
CODE = "__import__('pathlib').Path('executed').touch()"


def named_by_code(data: Any) -> None:
    """fx writes ``getattr(self, "<name>")`` for a module whose name is not an identifier."""
    dotless = CODE.replace(".", "\\x2e")  # a dot would split the name
    name = f'1"), exec("{dotless}"), getattr(self, "1'
    data["modules"][name] = data["modules"]["0"]
    next(node for node in data["nodes"] if node["op"] == "call_module")["target"] = name


# A standard library module that nothing here imports, and whose import has no side effects.
HARMLESS = "wsgiref.validate"
HARMLESS_ENUM = {"__enum__": True, "fqn": f"{HARMLESS}:Kind", "name": "A"}
HARMLESS_FACTORY = {"default_factory_module": HARMLESS, "default_factory_name": "Kind", "dict_context": []}


def old_tree(kind: str, context: str) -> str:
    """A container without children, as PyTorch writes it."""
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


def old_dict(context: Any) -> str:
    return old_tree("builtins.dict", json.dumps(context))


def of_old_text(result: str) -> dict[str, Any]:
    arguments = pytree.treespec_dumps(pytree.tree_structure(((0,), {})))
    return {"arguments": ["self", "input_1"], "in": arguments, "out": result}


def new_tree(result: Any) -> dict[str, Any]:
    arguments = {"tuple": [{"tuple": ["leaf"]}, {"dict": []}]}
    return {"arguments": ["self", "input_1"], "in": arguments, "out": result}


HOSTILE = {
    "tensors elsewhere": lambda data: data.update(files=["../model.safetensors"]),
    "os.system": call("call_function", "os.system", ["touch executed"]),
    "builtins.eval": call("call_function", "builtins.eval", [CODE]),
    "eval": call("call_function", "eval", [CODE]),
    "torch.load": call("call_function", "torch.load", ["x"]),
    "torch.save": call("call_function", "torch.save", [X, "executed"]),
    "torch.from_file": call("call_function", "torch.from_file", ["executed", True, 4]),
    "torch.hub.load": call("call_function", "torch.hub.load", ["x", "y"]),
    "operator.methodcaller": call("call_function", "operator.methodcaller", ["load"]),
    "operator.call": call("call_function", "operator.call", [X]),
    "call_method __class__": call("call_method", "__class__", [X]),
    "call_method __reduce__": call("call_method", "__reduce__", [X]),
    "call_method of no tensor": call("call_method", "system", [X, "touch executed"]),
    "getattr __globals__": call("call_function", "getattr", [X, "__globals__"]),
    "getattr __class__": call("call_function", "getattr", [X, "__class__"]),
    "getattr of a method": call("call_function", "getattr", [X, "register_hook"]),
    "getattr of a computed name": call("call_function", "getattr", [X, X]),
    "get_attr __class__": call("get_attr", "__class__", []),
    "get_attr __globals__": call("get_attr", "forward.__func__.__globals__", []),
    "call_module of a method": call("call_module", "add_module", ["x", None]),
    "load_library": call("call_function", "load_library::__self__.load_library", ["executed.so"]),
    "import_module": call("call_function", "import_module::__self__.import_module", ["math"]),
    "globals through torch.ops": call("call_function", "load_library::__globals__.get", ["__builtins__"]),
    "no such operator": call("call_function", "aten::no_such_operator.default", [X]),
    "no such module": on_node("call_module", target="9"),
    "no such op": on_node("call_module", op="call_anything"),
    "module outside torch.nn": module(**{"class": "os._Environ"}),
    "module of torchvision": module(**{"class": "torchvision.models.AlexNet"}),
    "module that looks like torch.nn": module(**{"class": "torch.nn.modules.evil.Linear"}),
    "no module class": module(**{"class": "torch.nn.modules.linear.init"}),
    "no class": module(**{"class": "torch.nn.modules.linear.math"}),
    "unknown value kind": on_node("output", args={"tuple": [{"pickle": "gASVAA=="}]}),
    "two value kinds": on_node("output", args={"tuple": [{"node": "input_1", "float": "1"}]}),
    "torch value that is not a dtype": on_node("output", args={"tuple": [{"torch": "load"}]}),
    "unknown node": on_node("output", args={"tuple": [{"node": "nobody"}]}),
    "code in a placeholder": on_node("placeholder", target=f"input={CODE}"),
    "code in a keyword": call("call_function", "torch.relu", [], [[f"x={CODE}, input", X]]),
    "code in a module name": named_by_code,
    "code in the signature": lambda data: data.update(
        pytree={
            "arguments": ["self", f"input={CODE}"],
            "in": pytree.treespec_dumps(pytree.tree_structure(((0,), {}))),
            "out": pytree.treespec_dumps(pytree.tree_structure(0)),
        }
    ),
    "a module in a specification": lambda data: data.update(pytree=of_old_text(old_dict(HARMLESS_ENUM))),
    "a factory in a specification": lambda data: data.update(
        pytree=of_old_text(old_tree("collections.defaultdict", json.dumps(HARMLESS_FACTORY)))
    ),
    "a class in a specification": lambda data: data.update(
        pytree=of_old_text(old_tree("collections.namedtuple", json.dumps(f"{HARMLESS}.Kind")))
    ),
    "a module among values": on_node("output", args={"tuple": [{"torch": "onnx"}]}),
    "a module as a dtype": lambda data: data.update({"computed in": {"0.weight": "onnx"}}),
    "a module of torch.nn": module(**{"class": "torch.nn.modules.utils.consume_prefix_in_state_dict_if_present"}),
    "a special attribute": module(attributes={"__class__": None}),
    "a named tuple of code": lambda data: data.update(pytree=new_tree({"namedtuple": ["T", [[f"x={CODE}", "leaf"]]]})),
    "a named tuple called by code": call("call_function", {"namedtuple": [f"T {CODE}", ["x"]]}, [X]),
    "a field of code": lambda data: data.update(pytree=new_tree({"fields": [[CODE, "leaf"]]})),
    "a private field": lambda data: data.update(pytree=new_tree({"fields": [["__class__", "leaf"]]})),
    "a field that is there twice": lambda data: data.update(
        pytree=new_tree({"namedtuple": ["T", [["x", "leaf"], ["x", "leaf"]]]})
    ),
    "a result of no operator": lambda data: data.update(pytree=new_tree({"returned": ["system", ["leaf"]]})),
    "a key that is not text": lambda data: data.update(pytree=new_tree({"dict": [[None, "leaf"]]})),
    "no container": lambda data: data.update(pytree=new_tree({"set": ["leaf"]})),
    "no tree": lambda data: data.update(pytree={"arguments": ["self", "x"], "in": "[1, {}]", "out": "x"}),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_graph_is_an_artifact_error(
    artifact: Path, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "working"
    empty.mkdir()
    monkeypatch.chdir(empty)
    edit_json(artifact / "graph.json", HOSTILE[attack])
    asked: list[str] = []
    load, importing = vbpfx.load, importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *_: asked.append(name) or importing(name))
    error: Exception | None = None
    try:
        load(artifact)(rows(2))  # injected code may run only at the first call
    except Exception as raised:
        error = raised
    assert list(empty.iterdir()) == [], "the file was executed"
    assert asked == [], "a module was imported by the name in the file"
    assert HARMLESS not in sys.modules
    assert isinstance(error, ArtifactError), f"load() gave {error!r}"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in (*zoo.PACKED, *zoo.NORMS, *zoo.SHARED)])
def test_every_kind_of_rewrite_loads_without_the_class(case: zoo.Case, tmp_path: Path) -> None:
    """Splits by sizes, norms in plain operators and biases behind products are all stored as data in graph.json."""
    model, batch = randomize(case.make()).eval(), case.batch()
    pruned = vbpfx.prune(model, [batch], ratio=0.5, progress=False)
    pruned.save(tmp_path)
    loaded = vbpfx.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(batch), pruned.graph_module(batch))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1, :8])


def padded(kind: str) -> nn.Module:
    convolution = nn.Conv2d(3, 4, 3, padding=1, padding_mode=kind)
    return nn.Sequential(convolution, nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


def sequences(samples: int) -> Tensor:
    return torch.randn(samples, 5, 6)


def pictures(samples: int) -> Tensor:
    return torch.randn(samples, 3, 6, 6)


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: Recurrent(nn.LSTM), sequences),
        (lambda: Recurrent(nn.LSTM, proj_size=4, bidirectional=True, num_layers=2, bias=False), sequences),
        (lambda: Recurrent(nn.GRU, bidirectional=True), sequences),
        (lambda: Recurrent(nn.RNN), sequences),
        (lambda: padded("reflect"), pictures),
        (lambda: padded("circular"), pictures),
        (Attending, lambda samples: torch.randn(samples, 5, 8)),
    ],
)
def test_layers_that_keep_something_to_themselves(
    make: Callable[[], nn.Module], batch: Callable[[int], Any], tmp_path: Path
) -> None:
    """Recurrent layers keep the names of their weights in private attributes, as convolutions do their padding."""
    torch.manual_seed(0)
    pruned = prune(make(), batch(16), method="vbp", frontend="symbolic")
    again = vbpfx.load(pruned.save(tmp_path / "a"))
    assert_same_output(again, pruned.graph_module, batch(3))
    assert_same_output(copy.deepcopy(again), pruned.graph_module, batch(3))


class Parts(nn.Module):
    """Reads an attribute of a tensor: a saved graph may read ``real``, but not ``grad_fn``."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.mlp = part, mlp()

    def forward(self, x: Tensor) -> Tensor:
        found = getattr(torch.fft.fft(x), self.part)
        return self.mlp(x if found is None else found)


def test_a_graph_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    pruned = prune(Parts("real"), rows(16), method="vbp", frontend="symbolic")
    assert_same_output(vbpfx.load(pruned.save(tmp_path / "real")), pruned.graph_module, rows(3))
    grad = prune(nn.Sequential(mlp()), rows(16), method="vbp")
    node = next(node for node in grad.graph_module.graph.nodes if node.op == "call_module")
    with grad.graph_module.graph.inserting_before(node):
        grad.graph_module.graph.call_function(getattr, (node.args[0], "grad_fn"))
    vbpfx.save(grad, tmp_path / "grad")
    assert "reads the attribute grad_fn" in json.loads((tmp_path / "grad" / "graph.json").read_text())["unavailable"]
    assert isinstance(vbpfx.load(tmp_path / "grad", into=nn.Sequential(mlp())), nn.Sequential)


def test_a_plan_states_numbers_among_arguments_alone(artifact: Path) -> None:
    """plan.json says where the graph states a number of channels, and the new number is written there."""

    def edit(data: Any) -> None:
        literal = {"node": "input_1", "path": ["target"], "axis": 1, "start": 0, "stop": 1}
        data["blocks"][0]["block"]["literals"] = [literal]

    edit_json(artifact / "plan.json", edit)
    with pytest.raises(ArtifactError, match=r"'target'.*which is not an argument of a call"):
        load_plan(artifact)


# ---- results --------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    logits: Tensor
    deep: Any = None
    loss: Tensor | None = None


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda y: Scores(y, (y + 1, {"a": y * 2})),
    "dataclass in a dataclass": lambda y: Scores(y, Scores(y + 1)),
    "named tuple": lambda y: Pair(y, y + 1),
    "named tuple in a dictionary": lambda y: {"pair": Pair(y, y + 1), 7: [y * 2]},
    "ordered": lambda y: OrderedDict(b=y, a=y + 1),
    "returned by an operator": lambda y: torch.max(y, 1),
}


class Returning(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make, self.mlp = make, mlp()

    def forward(self, x: Tensor) -> Any:
        return self.make(self.mlp(x))


def described(value: Any) -> Any:
    """Return a result as nested names and tensors, independent of its classes."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Fields):
        return [(name, described(getattr(value, name))) for name in vars(value)]
    if dataclasses.is_dataclass(value):
        return [(f.name, described(getattr(value, f.name))) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(key, described(entry)) for key, entry in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(name, described(getattr(value, name))) for name in value._fields]
    return [described(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def assert_same_names_and_numbers(found: Any, expected: Any) -> None:
    names, leaves = [], []
    for value in (found, expected):
        flat, structure = pytree.tree_flatten(
            described(value), is_leaf=lambda leaf: isinstance(leaf, (Tensor, str, int))
        )
        names.append((structure, [leaf for leaf in flat if not isinstance(leaf, Tensor)]))
        leaves.append([leaf for leaf in flat if isinstance(leaf, Tensor)])
    assert names[0] == names[1]
    assert len(leaves[0]) > 0
    assert all(map(torch.equal, *leaves))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("kind", RESULTS)
def test_results_come_back_with_their_names(kind: str, frontend: str, tmp_path: Path) -> None:
    model = randomize(Returning(RESULTS[kind]))
    pruned = prune(model, rows(16), frontend=frontend)
    assert pruned.plan.removed > 0
    loaded, x = vbpfx.load(pruned.save(tmp_path)), rows(3)
    assert_same_names_and_numbers(run(loaded, x), run(pruned.graph_module, x))
    assert_same_names_and_numbers(run(copy.deepcopy(loaded), x), run(pruned.graph_module, x))
    own = described(run(pruned.apply_to(model), x))
    assert [type(leaf) for leaf in pytree.tree_leaves(own)] == [
        type(leaf) for leaf in pytree.tree_leaves(described(run(loaded, x)))
    ]


def test_named_fields_are_read_as_those_of_transformers_are() -> None:
    fields = Fields(loss=None, logits=torch.ones(2), deep=torch.zeros(3))
    assert fields.loss is None
    assert list(fields) == ["logits", "deep"]
    assert len(fields) == 2
    assert "loss" not in fields
    assert fields["logits"] is fields.logits is fields[0] is fields[:1][0]
    with pytest.raises(AttributeError):
        _ = fields.nothing
    doubled = pytree.tree_map(lambda t: t * 2, fields)
    assert torch.equal(doubled.logits, torch.full((2,), 2.0))
    assert doubled.loss is None
    assert repr(Fields(a=1)) == "Fields(a=1)"


def test_results_of_transformers_need_no_transformers_to_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 13,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    batch = {"input_ids": torch.randint(13, (4, 5)), "attention_mask": torch.ones(4, 5, dtype=torch.long)}
    pruned = prune(model, batch, method="vbp")
    pruned.save(tmp_path)
    assert "transformers" not in (tmp_path / "graph.json").read_text()
    found, expected = run(vbpfx.load(tmp_path), batch), run(pruned.graph_module, batch)
    assert isinstance(found, Fields)
    assert list(found) == list(expected.keys()) == ["logits"]
    assert torch.equal(found.logits, expected.logits)
    assert found.hidden_states is None


def test_a_result_that_a_file_cannot_describe_is_refused_by_name(tmp_path: Path) -> None:
    pruned = prune(Returning(lambda y: defaultdict(list, a=y)), rows(16), frontend="export")
    pruned.save(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"collections\.defaultdict, which a file cannot describe: let forward .* dictionaries"
    ):
        vbpfx.load(tmp_path)


def test_what_earlier_versions_wrote_is_read_where_it_names_nothing(tmp_path: Path) -> None:
    """Earlier versions wrote PyTorch's own text, from which tuples, lists and dictionaries are read, but no classes."""
    pruned = prune(randomize(Nested()), rows(16), frontend="export")
    pruned.save(tmp_path)
    info = pruned.graph_module.graph._codegen.pytree_info
    old = {"in": pytree.treespec_dumps(info.in_spec), "out": pytree.treespec_dumps(info.out_spec)}
    edit_json(tmp_path / "graph.json", lambda data: data["pytree"].update(old))
    assert_same_output(vbpfx.load(tmp_path), pruned.graph_module, rows(3))
    named = json.dumps(
        [1, {"type": "somewhere.Output", "context": '["logits"]', "children_spec": [json.loads(old["in"])[1]]}]
    )
    edit_json(tmp_path / "graph.json", lambda data: data["pytree"].update(out=named))
    with pytest.raises(
        ArtifactError, match=r"somewhere\.Output.*no longer looked up: prune and save the network again"
    ):
        vbpfx.load(tmp_path)
