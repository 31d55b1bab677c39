"""bench reports the true figures, checked with a fake clock and runtimes of known speed."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_unchanged, state
from torch import Tensor, nn
from typer.testing import CliRunner

import vbpfx
from vbpfx.cli import app
from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError
from vbpfx.export.onnx import export_onnx
from vbpfx.measurement.timing import Spread, alternating, interleaved
from vbpfx.runtimes import table
from vbpfx.runtimes.interface import About, Compiled, Runtime


class Clock:
    """A clock that only advances when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)).eval()


class _Fake(Compiled):
    """A runtime that takes time proportional to hidden width and batch size, with a known error."""

    def __init__(self, network: nn.Module, clock: Clock, error: float, calls: list[int]) -> None:
        self.network, self.clock, self.error, self.calls = network, clock, error, calls
        self.width = network.get_parameter("0.weight").shape[0]
        self.size = 1000 * self.width

    def run(self, inputs: Inputs) -> list[Tensor]:
        self.calls.append(self.width)
        self.clock.now += self.width * (inputs.batch_size or 0) / 1024  # exact in floating point
        with torch.no_grad():
            output: Tensor = self.network(*inputs.args)
        return [output + self.error * output.abs().max()]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, list[int]]:
    """Register fake runtimes; return their clock and the list of calls, each given by its width."""
    clock, calls = Clock(), []

    def refuse(network: nn.Module, inputs: Inputs, threads: int | None) -> Compiled:
        if network.get_parameter("0.weight").shape[0] < 32:
            raise ExportError("too narrow")
        return _Fake(network, clock, 0.0, calls)

    made = {
        "fake": lambda network, inputs, threads: _Fake(network, clock, 1e-5, calls),
        "wrong": lambda network, inputs, threads: _Fake(network, clock, 1e-2, calls),
        "narrow": refuse,
    }
    real = table.runtime

    def runtime(name: str) -> Runtime:
        return Runtime(name, About("torch"), made[name]) if name in made else real(name)

    monkeypatch.setattr(
        importlib.import_module("vbpfx.measurement.bench"), "runtime", runtime
    )  # ``vbpfx.bench`` is the function, not this module
    return clock, calls


def test_the_figures_are_those_of_the_runs(fake: tuple[Clock, list[int]]) -> None:
    clock, calls = fake
    dense, pruned = _mlp(32).train(), _mlp(8)
    before = state(dense)
    result = vbpfx.bench(
        dense, pruned, torch.randn(2, 8), runtimes=["fake"], batches=[1, 4], threads=[1, 2], rounds=5, clock=clock
    )  # fmt: skip
    assert dense.training
    assert_unchanged(dense, before)
    # Counted by hand: 8 x 32 + 32 x 4 products against 8 x 8 + 8 x 4.
    assert result.macs == (384, 96)
    assert [(row.threads, row.batch) for row in result.rows] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for row in result.rows:
        assert row.dense.seconds == Spread(*[row.batch * 32 / 1024] * 3)
        assert row.pruned.seconds == Spread(*[row.batch * 8 / 1024] * 3)
        assert row.speedup == Spread(4.0, 4.0, 4.0)
        assert row.efficiency == 1.0
        assert row.samples_per_second == (32.0, 128.0)
        for side in (row.dense, row.pruned):
            assert side.parity == pytest.approx(1e-5, rel=0.02)  # the error was added in float32
        assert (row.dense.size, row.pruned.size) == (32_000, 8_000)
    assert not result.problems
    # One call for parity, three for warming up, then both in turn, with every other round in reverse order.
    assert calls[:18] == [32, 8, *[32, 8] * 3, *[32, 8, 8, 32] * 2, 32, 8]
    printed = str(result)
    assert "MACs 384 -> 96 (4.00x less)" in printed
    assert "125.0 -> 31.2" in printed  # milliseconds for a batch of four
    assert "4.00 (4.00-4.00)" in printed


def test_json_holds_the_same(fake: tuple[Clock, list[int]]) -> None:
    result = vbpfx.bench(_mlp(32), _mlp(8), torch.randn(2, 8), runtimes=["fake"], batches=[4], rounds=3, clock=fake[0])
    found = json.loads(json.dumps(result.to_json()))
    assert found["macs"] == [384, 96]
    assert found["rounds"] == 3
    assert found["versions"] == {"torch": torch.__version__.partition("+")[0]}
    (row,) = found["rows"]
    assert row["dense"]["seconds"] == {"median": 0.125, "lower": 0.125, "upper": 0.125}
    assert row["samples_per_second"] == [32.0, 128.0]
    assert (row["runtime"], row["batch"], row["threads"], row["efficiency"]) == ("fake", 4, 1, 1.0)
    assert vbpfx.BenchResult.from_json(found) == result


def test_failures_and_wrong_outputs_are_rows_and_problems(fake: tuple[Clock, list[int]]) -> None:
    result = vbpfx.bench(
        _mlp(32), _mlp(8), torch.randn(2, 8), runtimes=["narrow", "wrong"], batches=[2], rounds=1, clock=fake[0]
    )
    narrow, wrong = result.rows
    assert narrow.dense.failure is None
    assert narrow.pruned.failure == "too narrow"
    assert narrow.speedup is None
    assert narrow.samples_per_second is None
    assert wrong.speedup == Spread(4.0, 4.0, 4.0)
    assert [problem.partition(":")[0] for problem in result.problems] == [
        "narrow, pruned, batch 2", "wrong, dense, batch 2", "wrong, pruned, batch 2"
    ]  # fmt: skip
    assert "differs by 1.0e-02 of the output's size, allowed 1e-04" in result.problems[1]
    assert "failed" in str(result)


def test_onnx_runtime_for_real() -> None:
    pruned = vbpfx.prune(_mlp(32), [torch.randn(16, 8)], ratio=0.5, method="vbp", progress=False)
    dense = pruned.captured.graph_module
    (row,) = vbpfx.bench(dense, pruned.graph_module, torch.randn(2, 8), batches=[3], rounds=2, memory=False).rows
    for side in (row.dense, row.pruned):
        assert side.parity is not None
        assert 0 < side.parity < 1e-5
    assert row.dense.size is not None
    assert row.pruned.size is not None
    # 16 neurons with 8 + 1 + 4 float32 numbers each are removed; other stored data differs by a few bytes.
    assert row.dense.size - row.pruned.size == pytest.approx(16 * 13 * 4, abs=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtimes": ["tensorflow"]}, "'tensorflow' is unknown"),
        ({"batches": [0]}, "must be positive"),
        ({"threads": [-1]}, "must be positive"),
        ({"rounds": 0}, "must be positive"),
    ],
)
def test_bad_arguments_are_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        vbpfx.bench(_mlp(32), _mlp(8), torch.randn(2, 8), **change)  # type: ignore[arg-type]


def test_networks_of_different_outputs_are_no_pair() -> None:
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(ExportError, match=r"dense returns shapes \[\(1, 4\)\], pruned \[\(1, 5\)\]"):
        vbpfx.bench(_mlp(32), other, torch.randn(2, 8), rounds=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 2.0], (1.5, 1.25, 1.75)), ([5.0, 1.0, 2.0, 4.0, 3.0], (3, 2, 4))],
)
def test_quartiles(values: Sequence[float], expected: tuple[float, float, float]) -> None:
    assert Spread.of(values) == Spread(*expected)


def test_runs_alternate_and_only_rounds_are_timed() -> None:
    clock, order = Clock(), []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    runs = {"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}
    assert alternating(runs, rounds=3, warmup=1, clock=clock) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert set(interleaved(runs, rounds=1, warmup=0)) == {"a", "b"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an artifact, a module with its dense model, and both as ONNX files."""
    folder = tmp_path_factory.mktemp("bench")
    dense = _mlp(32)
    pruned = vbpfx.prune(dense, [torch.randn(16, 8)], ratio=0.5, method="vbp", progress=False)
    pruned.save(folder / "out")
    pruned.to_onnx(folder / "pruned.onnx")
    export_onnx(dense, pruned.captured.inputs, folder / "dense.onnx")
    (folder / "bench_model.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    return folder


def test_the_command_on_a_folder(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(saved)
    words = ["bench", "out", "--dense", "bench_model:make", "--shape", "8", "--rounds", "1", "--batch", "2"]
    runtimes = ["--no-memory", "--runtime", "onnxruntime", "--runtime", "pytorch"]
    shutil.copytree("out", tmp_path / "out")
    words[1] = str(tmp_path / "out")
    alone = CliRunner().invoke(app, [*words, *runtimes, "--no-report"])
    assert alone.exit_code == 0, alone.output
    assert "onnxruntime" in alone.stdout
    assert vbpfx.Report.load(tmp_path / "out").bench is None
    result = CliRunner().invoke(app, [*words, *runtimes, "--json"])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stderr
    found = json.loads(result.stdout)
    assert vbpfx.Report.load(tmp_path / "out").bench == found
    assert "onnxruntime" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.json").write_text("{")
    damaged = CliRunner().invoke(app, [*words, *runtimes])
    assert damaged.exit_code == 0, damaged.output
    assert "the report stays as it was" in damaged.stderr
    assert [(row["runtime"], row["batch"]) for row in found["rows"]] == [("onnxruntime", 2), ("pytorch", 2)]
    assert found["macs"] == [384, 192]
    failed = CliRunner().invoke(app, [*words[:5], "7", *words[6:]])
    assert failed.exit_code == 1
    assert "Traceback" not in failed.output


@pytest.mark.parametrize("name", ["two", "wide"])
def test_inputs_that_no_shape_describes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One network takes two tensors, one of which holds integers; another is in float64."""
    monkeypatch.chdir(tmp_path)
    if name == "two":
        tokens = np.random.default_rng(0).integers(0, 9, (4, 6))
        np.savez("data.npz", tokens=tokens, scale=np.ones((4, 1), np.float32))
    else:
        np.savez("data.npz", input=np.ones((4, 3, 8, 8)))
    model = f"cli_networks:{name}"
    how = ["--ratio", "0.5", "--method", "vbp", "--no-onnx"]
    made = CliRunner().invoke(app, ["prune", model, "--data", "data.npz", *how, "--out", "out"])
    assert made.exit_code == 0, made.output
    inputs = ["--data", "data.npz"] if name == "two" else ["--shape", "3x8x8"]
    words = ["bench", "out", "--dense", model, "--runtime", "pytorch", "--rounds", "1", "--no-memory", "--json"]
    result = CliRunner().invoke(app, [*words, *inputs])
    assert result.exit_code == 0, result.output
    assert [row["batch"] for row in json.loads(result.stdout)["rows"]] == [1, 8]


def test_the_command_on_two_files(saved: Path) -> None:
    pair = ["--dense", str(saved / "dense.onnx"), "--pruned", str(saved / "pruned.onnx")]
    result = CliRunner().invoke(app, ["bench", *pair, "--rounds", "1", "--no-memory"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("onnxruntime") == 2  # batches of one and of eight
    refused = CliRunner().invoke(app, ["bench", *pair, "--rounds", "1", "--runtime", "pytorch"])
    assert refused.exit_code == 1
    assert "does not accept ONNX files" in refused.output


@pytest.mark.parametrize(
    "words",
    [
        ["out"],
        ["--dense", "timm:vit"],
        ["out", "--dense", "a.onnx", "--pruned", "b.onnx"],
        ["out", "--dense", "timm:vit", "--shape", "3,4"],
        ["out", "--dense", "timm:vit", "--batch", "0"],
        ["out", "--dense", "timm:vit", "--shape", "3", "--data", "a.npy"],
        ["--dense", "a.onnx", "--pruned", "b.onnx", "--data", "a.npy"],
        ["out", "--dense", "timm:vit", "--no-such-option"],
    ],
)
def test_wrong_usage_is_status_2(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", *words]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "--dense", "timm:test_vit"], "missing"),
        (["missing", "--dense", "timm:no_such_model"], "timm knows no model 'no_such_model'"),
        (["--dense", "no.onnx", "--pruned", "no.onnx"], "cannot read no.onnx"),
    ],
)
def test_failures_are_one_line_and_status_1(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
