"""Calibration with torch.compile gives the statistics of plain passes, and nothing is compiled unless requested.

Most tests use ``aot_eager``, which traces as Inductor does and needs no C++ compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_networks import mlp
from oracle import assert_unchanged, randomize, state
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import vbpfx
from vbpfx.artifacts.folder import load_plan
from vbpfx.calibration.passes import Forward
from vbpfx.calibration.prepare import observers
from vbpfx.cli import app
from vbpfx.errors import ArtifactError, CalibrationError

TRACED = {"backend": "aot_eager"}


class GatedLayer(nn.Module):
    """Masked attention with two heads, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Texts(nn.Module):
    """Two layers, the first of which is called twice, with several keyword inputs and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(50, 16), GatedLayer(), GatedLayer()
        self.register_buffer("position", torch.randn(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, shift: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids) + self.position[: input_ids.shape[1]] + shift[:, None]
        for layer in (self.first, self.first, self.second):
            x = layer(x, attention_mask)
        return {"scores": self.head(x[:, 0])}


def texts(samples: int, tokens: int = 9) -> dict[str, Tensor]:
    lengths = torch.randint(1, tokens + 1, (samples, 1))
    mask = (torch.arange(tokens) < lengths).long()
    return {
        "input_ids": torch.randint(50, (samples, tokens)),
        "attention_mask": mask,
        "shift": torch.randn(samples, 16).to(torch.get_default_dtype()),
    }


class SmallConvNeXt(nn.Sequential):
    """A network of timm's ConvNeXt blocks."""

    def __init__(self) -> None:
        blocks = ConvNeXtBlock(8), ConvNeXtBlock(8)
        super().__init__(nn.Conv2d(3, 8, 4, 4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def small_vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4)


NETWORKS = {"vit": small_vit, "convnext": SmallConvNeXt, "texts": Texts}


def network(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    """Return a network and its batches: three of one size, of which the second triggers compilation, and a smaller one."""
    batches: list[Any] = [texts(n) if name == "texts" else {"x": torch.randn(n, 3, 16, 16)} for n in (3, 3, 3, 2)]
    batches = [{key: t.to(dtype) if t.is_floating_point() else t for key, t in batch.items()} for batch in batches]
    return randomize(NETWORKS[name]()).to(dtype).eval(), batches if name == "texts" else [b["x"] for b in batches]


def prepared(model: nn.Module, batch: Any, **options: Any) -> tuple[vbpfx.Analysis, fx.GraphModule]:
    captured = vbpfx.capture(model, batch, **options)
    analysis = vbpfx.find_blocks(captured)
    return analysis, vbpfx.prepare(captured, analysis)


def rows_by_hand(model: nn.Module, layer: str, batches: list[Any]) -> np.ndarray:
    """Return the inputs of a layer over all batches, without padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = []
    with torch.no_grad():
        for batch in batches:
            seen.clear()
            model(**batch) if isinstance(batch, dict) else model(batch)
            for value in seen:
                rows.append(value[batch["attention_mask"].bool()] if isinstance(batch, dict) else value)
    handle.remove()
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in rows]).double().numpy()


def assert_by_hand(
    model: nn.Module, analysis: vbpfx.Analysis, found: vbpfx.Statistics, batches: list[Any], rtol: float
) -> None:
    """Compare the moments of every block with a single linear consumer with NumPy's on that layer's inputs."""
    checked = 0
    for block in analysis.usual:
        layers = {consumer.weight.rpartition(".")[0] for consumer in block.consumers}
        if not all(isinstance(model.get_submodule(layer), nn.Linear) for layer in layers) or len(layers) > 1:
            continue
        rows = rows_by_hand(model, layers.pop(), batches)
        moments = found.moments[block.name]
        # A block that is called several times is observed at every call.
        assert sum(m.count for m in moments) == len(rows)
        whole = moments[0]
        for further in moments[1:]:
            whole = whole | further
        # Rounding is relative to the size of a value, which exceeds the deviation if the mean is large.
        size, deviation = np.sqrt(np.square(rows).mean(0)), rows.std(0, ddof=1)
        assert (np.abs(whole.mean.numpy() - rows.mean(0)) <= rtol * size).all()
        assert (np.abs(whole.variance.numpy() - deviation**2) <= rtol * size * deviation).all()
        checked += 1
    assert checked


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("way", ["inductor", "float64"])
def test_statistics_are_those_of_plain_passes(name: str, way: str) -> None:
    if way == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler: no g++ and no clang++ here")
    model, batches = network(name, torch.float32 if way == "inductor" else torch.float64)
    analysis, observed = prepared(model, batches[0])
    vbpfx.calibrate(observed, batches, compile=True if way == "inductor" else TRACED)
    assert_by_hand(model, analysis, vbpfx.statistics(observed), batches, 1e-5 if way == "inductor" else 1e-12)


class Counting:
    """A backend that runs graphs unchanged and counts compilations and runs."""

    def __init__(self) -> None:
        self.asked = self.ran = 0

    def __call__(self, graph: fx.GraphModule, example: list[Any]) -> Any:
        self.asked += 1

        def run(*values: Any) -> Any:
            self.ran += 1
            return graph(*values)

        return run


PIECES = 3  # a network of two blocks is split in front of both second layers


@pytest.mark.parametrize(
    ("sizes", "options", "compiled", "batches"),
    [
        ([5], {}, 0, 0),
        ([5, 4, 3], {}, 0, 0),
        ([5, 5, 5, 3], {}, 1, 2),
        ([3, 5, 5, 5, 2], {}, 1, 2),
        ([5, 5, 3, 3, 4, 6, 7], {}, 2, 5),
        ([5, 5, 3, 4, 6], {"dynamic": True}, 1, 4),
        ([5, 5, 3, 3, 4, 6, 7], {"dynamic": False}, 2, 2),
    ],
)
def test_shapes_are_compiled_for_when_they_come_again(
    sizes: list[int], options: dict[str, Any], compiled: int, batches: int
) -> None:
    """A smaller last batch is never compiled; varying sizes are compiled once with dynamic shapes."""
    _, observed = prepared(mlp().eval(), torch.randn(4, 3, 8, 8))
    backend = Counting()
    vbpfx.calibrate(observed, [torch.randn(n, 3, 8, 8) for n in sizes], compile={"backend": backend} | options)
    assert [observer.calls for observer in observers(observed)] == [len(sizes)] * 2
    assert (backend.asked, backend.ran) == (compiled * PIECES, batches * PIECES)


def test_the_prepared_graph_stays_as_it_was() -> None:
    model, batches = network("texts", torch.float64)
    _, observed = prepared(model, batches[0])
    before, code = state(observed), observed.code
    nodes = {node.name: set(vars(node)) for node in observed.graph.nodes}
    vbpfx.calibrate(observed, batches, compile=TRACED)
    assert_unchanged(observed, before)
    assert observed.code == code
    assert {node.name: set(vars(node)) for node in observed.graph.nodes} == nodes
    once = vbpfx.statistics(observed)
    vbpfx.calibrate(observed, batches)  # it can still gather
    for name, sources in vbpfx.statistics(observed).moments.items():
        for whole, half in zip(sources, once.moments[name], strict=True):
            assert whole.count == 2 * half.count
            torch.testing.assert_close(whole.m2, 2 * half.m2, rtol=1e-12, atol=0)


class InPlace(nn.Module):
    """Values are changed in place; with ``shared``, a view of one of them is read on the other side of a block."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = nn.Linear(6, 20), nn.Linear(20, 6), nn.Linear(6, 20), nn.Linear(20, 6)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        stream = x * 2
        part = stream[:, :3]
        y = self.fc2(self.fc1(stream).relu_())
        if self.shared:
            part.mul_(3)
        return self.fc4(self.fc3(stream.add_(y)).relu_())


def test_values_changed_in_place_are_changed_for_all_pieces() -> None:
    model = randomize(InPlace(shared=False)).double().eval()
    batches = [torch.randn(8, 6, dtype=torch.float64) for _ in range(3)]
    analysis, observed = prepared(model, batches[0])
    vbpfx.calibrate(observed, batches, compile=TRACED)
    assert_by_hand(model, analysis, vbpfx.statistics(observed), batches, 1e-12)
    _, observed = prepared(InPlace(shared=True).double().eval(), batches[0])
    with pytest.raises(
        CalibrationError, match="is changed in place by mul_ and read again on the other side of a block"
    ):
        vbpfx.calibrate(observed, batches, compile=TRACED)


def marking(graph: fx.GraphModule, example: list[Any]) -> Any:
    """A backend whose results differ recognisably from those of plain passes."""

    def run(*values: Any) -> Any:
        return tuple(v * 1.001 if isinstance(v, Tensor) and v.is_floating_point() else v for v in graph(*values))

    return run


def moments_of(statistics: vbpfx.Statistics) -> list[Tensor]:
    return [t for sources in statistics.moments.values() for m in sources for t in m.to_tensors()[0].values()]


@pytest.mark.parametrize("through", ["calibrate", "exported", "prune"])
def test_a_run_that_is_broken_off_ends_like_one_that_is_not(through: str, tmp_path: Path) -> None:
    """The results are equal bit for bit: which batches run compiled does not depend on the interruption."""
    model, batches = mlp().eval(), [torch.randn(n, 3, 8, 8) for n in (5, 3, 5, 3, 5, 4)]

    def run(data: Any, **options: Any) -> list[Tensor]:
        options = {"compile": {"backend": marking}} | options
        if through == "prune":
            given = {"example_inputs": batches[0], "ratio": 0.5, "method": "vbp", "progress": False}
            return moments_of(vbpfx.prune(model, data, **given, **options).statistics)
        _, observed = prepared(model, batches[0], frontend="export" if through == "exported" else "symbolic")
        vbpfx.calibrate(observed, data, **options)
        return moments_of(vbpfx.statistics(observed))

    def stopping(stop: int) -> Iterator[Tensor]:
        yield from batches[:stop]
        raise KeyboardInterrupt

    whole = run(batches)
    assert not all(torch.equal(a, b) for a, b in zip(run(batches, compile=False), whole, strict=True))
    kept: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every": 1}
    for stop in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(stopping(stop), **kept)
    assert all(torch.equal(a, b) for a, b in zip(run(batches, **kept), whole, strict=True))
    with pytest.raises(ArtifactError, match=r"compile was .*marking.* in that run and is None now"):
        run(batches, compile=False, **kept)


class Recurrent(nn.Module):
    """A network that runs but cannot be compiled, because Dynamo does not enter torch's recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.last = nn.Linear(6, 20), nn.Linear(20, 6), nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc2(self.fc1(x).relu()))[0]


def test_what_cannot_be_compiled_is_named() -> None:
    batches = [torch.randn(4, 5, 6)] * 3
    _, observed = prepared(Recurrent().eval(), batches[0])
    with pytest.raises(CalibrationError) as caught:
        vbpfx.calibrate(observed, batches, compile=TRACED)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("torch.compile cannot take the network behind the last block: ")
    assert line.endswith("; leave compile out")


def failing(graph: fx.GraphModule, example: list[Any]) -> Any:
    """A backend that always fails."""
    raise NotImplementedError("no such kernel\nand more about it")


def test_what_a_backend_says_is_one_line() -> None:
    batches = [torch.randn(4, 3, 8, 8)] * 2
    _, observed = prepared(mlp().eval(), batches[0])
    with pytest.raises(CalibrationError) as caught:
        vbpfx.calibrate(observed, batches, compile={"backend": failing})
    (block, *_) = observers(observed)
    assert str(caught.value) == (
        f"torch.compile cannot take the network before the second layer of block {block.name}: no such kernel; leave compile out"
    )


def test_arguments_that_cannot_be_are_refused() -> None:
    data = [torch.randn(4, 3, 8, 8)]
    _, observed = prepared(mlp().eval(), data[0])
    with pytest.raises(CalibrationError, match=r"torch.compile does not take compile=\{.*'mode': 'fastest'\}: .*mode"):
        vbpfx.calibrate(observed, data, compile={"mode": "fastest"})
    with pytest.raises(CalibrationError, match="compile='reduce-overhead': expected True, False, or a mapping"):
        vbpfx.calibrate(observed, data, compile="reduce-overhead")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="work= runs the batches its own way"):
        vbpfx.calibrate(observed, data, work=Forward(lambda _: None), compile=True)
    with pytest.raises(
        CalibrationError, match=r"reconstruction takes gradients.*Pass reconstruct=False or method='vbp'"
    ):
        vbpfx.prune(mlp(), data, ratio=0.5, compile=True)


def test_a_batch_that_does_not_fit_is_no_matter_of_the_compiler() -> None:
    _, observed = prepared(mlp().eval(), torch.randn(4, 3, 8, 8))
    batches = [torch.randn(4, 3, 8, n) for n in (8, 8, 9)]
    with pytest.raises(CalibrationError, match=r"batch 3 \(counted from 1\) does not fit the model: "):
        vbpfx.calibrate(observed, batches, compile=TRACED)
    batches[2] = torch.full((4, 3, 8, 8), torch.nan)
    with pytest.raises(CalibrationError, match=r"batch 3 \(counted from 1\) makes NaN or infinite activations"):
        vbpfx.calibrate(observed, batches, compile=TRACED)
    model, words = network("texts", torch.float64)
    _, observed = prepared(model, words[0])
    words[2]["input_ids"][0, 0] = 50  # an invalid token id in a batch of a compiled shape
    with pytest.raises(
        CalibrationError, match=r"batch 3 \(counted from 1\) does not fit the model: index out of range"
    ):
        vbpfx.calibrate(observed, words, compile=TRACED)


@pytest.mark.parametrize("options", [{"method": "vbp"}, {"reconstruct": False}], ids=["vbp", "auto"])
def test_prune_plans_the_same(options: dict[str, Any]) -> None:
    model, data = mlp().double().eval(), list(torch.randn(26, 3, 8, 8, dtype=torch.float64).split(8))
    plain, compiled = (
        vbpfx.prune(model, data, ratio=0.5, progress=False, compile=how, **options) for how in (False, TRACED)
    )
    assert [entry.kept for entry in compiled.plan.blocks] == [entry.kept for entry in plain.plan.blocks]
    with torch.no_grad():
        torch.testing.assert_close(compiled.graph_module(data[0]), plain.graph_module(data[0]), rtol=1e-10, atol=1e-12)
    assert compiled.report.arguments["compile"] == TRACED
    assert "compile" not in plain.report.arguments


def test_the_command_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32))
    asked = []
    real = torch.compile

    def traced(module: nn.Module, **options: Any) -> Any:
        asked.append(options)
        return real(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    given = [
        "prune",
        "cli_networks:mlp",
        "--data",
        "data.npy",
        "--ratio",
        "0.5",
        "--batch",
        "4",
        "--out",
        "out",
        "--no-onnx",
    ]
    result = CliRunner().invoke(app, [*given, "--method", "vbp", "--compile"])
    assert result.exit_code == 0, result.output
    assert asked == [{"fullgraph": True}] * 3
    assert load_plan("out").removed == 24
    result = CliRunner().invoke(app, [*given, "--compile"])
    assert result.exit_code == 2
    assert "--compile works only with --method vbp" in result.output


def test_nothing_is_compiled_where_nobody_asks() -> None:
    """The compiler, whose import takes seconds, is not even imported.

    The graph is made by hand, because tracing imports parts of the compiler.
    """
    script = (
        "import sys, torch, vbpfx\n"
        "from vbpfx.calibration.observer import Observer\n"
        "def refuse(*args, **kwargs): raise AssertionError('compiled')\n"
        "torch.compile = refuse\n"
        "graph = torch.fx.Graph()\n"
        "graph.output(graph.call_module('observe', (graph.placeholder('x'),)))\n"
        "observed = torch.fx.GraphModule({'observe': Observer('block', -1, 0, 8)}, graph)\n"
        "vbpfx.calibrate(observed, [torch.randn(4, 8)] * 3)\n"
        "print(vbpfx.statistics(observed).moments['block'][0].count)\n"
        "print([n for n in sys.modules if n.startswith(('torch._dynamo', 'torch._inductor', 'sympy'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "[]"]
