"""Memory in bench: what a process of its own takes, against the bytes of the weights that it loads."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ExportError
from vbpfx.export.onnx import export_onnx
from vbpfx.inputs import Inputs
from vbpfx.runtimes import memory, table
from vbpfx.runtimes.interface import Compiled, Runtime
from vbpfx.runtimes.memory import peak_memory

WIDTH = 1024
EXAMPLE = Inputs((torch.zeros(2, WIDTH),), {})


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, WIDTH)).eval()


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def test_what_is_measured_is_the_network(tmp_path: Path) -> None:
    """64 MiB of weights against 8; a large parent, whose memory a new process's ru_maxrss would begin with, is not in it."""
    networks = [_mlp(8 * WIDTH), _mlp(WIDTH)]
    files = [export_onnx(n, EXAMPLE, tmp_path / f"{i}.onnx") for i, n in enumerate(networks)]
    ballast = torch.ones(2**27)  # 512 MiB
    dense, pruned = (peak_memory("onnxruntime", file, EXAMPLE, 1) for file in files)
    assert ballast.sum() > 0
    weights = [_bytes(network) for network in networks]
    # at most the file as it is read, its tensors, and the layout that the kernels want
    assert weights[0] < dense < 4 * weights[0]
    assert weights[1] < pruned < weights[0]
    assert dense - pruned > 0.9 * (weights[0] - weights[1])


@pytest.mark.parametrize("name", ["openvino", "executorch", "aotinductor"])
def test_other_runtimes(name: str, tmp_path: Path) -> None:
    try:
        taken = table.runtime(name)
        result = vbpfx.bench(_mlp(4 * WIDTH), _mlp(WIDTH), EXAMPLE.args, runtimes=[name], batches=[2], rounds=1)
    except ExportError as error:
        pytest.skip(str(error))
    (row,) = result.rows
    if row.dense.failure:
        pytest.skip(row.dense.failure)
    assert taken.load is not None
    assert row.dense.memory is not None
    assert row.pruned.memory is not None
    assert row.dense.memory - row.pruned.memory > 0.9 * (_bytes(_mlp(4 * WIDTH)) - _bytes(_mlp(WIDTH)))
    assert f"{row.dense.memory / 2**20:.1f} -> {row.pruned.memory / 2**20:.1f}" in str(result)
    assert not result.problems


class _Eager(Compiled):
    def __init__(self, network: nn.Module, file: Path) -> None:
        self.network, self.file = network, file

    def run(self, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [self.network(*inputs.args)]


def _bench_with(load: Any, file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> vbpfx.BenchResult:
    made = Runtime("fake", "torch", "", lambda network, inputs, threads: _Eager(network, file), load=load)
    monkeypatch.setattr(importlib.import_module("vbpfx.bench"), "runtime", lambda name: made)
    return vbpfx.bench(_mlp(8), _mlp(4), EXAMPLE.args, runtimes=["fake"], batches=[1], rounds=1, **options)


def test_a_process_that_fails_is_a_problem_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process does not know the runtime that this one made up."""
    result = _bench_with(lambda *args: None, tmp_path / "none", monkeypatch)
    (row,) = result.rows
    assert row.speedup is not None
    assert row.dense.memory is None
    assert len(result.problems) == 2
    assert "fake, dense, batch 1: its memory was not measured: the process ended with status 1" in result.problems[0]
    assert "runtime 'fake' is unknown" in result.problems[0]
    assert str(result).splitlines()[4].split("│")[-2].strip() == "-"


@pytest.mark.parametrize("case", ["nothing to load", "switched off"])
def test_no_process_without_need(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(memory.subprocess, "run", refuse)
    off = case == "switched off"
    load = (lambda *args: None) if off else None
    result = _bench_with(load, tmp_path / "none", monkeypatch, memory=not off)
    assert result.rows[0].dense.memory is None
    assert not result.problems


def test_a_damaged_file_and_one_that_takes_too_long(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("no model")
    with pytest.raises(ExportError, match=r"ended with status 1: .*onnxruntime"):
        peak_memory("onnxruntime", file, EXAMPLE, None)
    with pytest.raises(ExportError, match=r"took over 0.01 s"):
        peak_memory("onnxruntime", file, EXAMPLE, None, patience=0.01)


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        raise OSError("out of memory")

    monkeypatch.setattr(memory.subprocess, "run", refuse)
    with pytest.raises(ExportError, match="no process could be started"):
        peak_memory("onnxruntime", tmp_path / "none", EXAMPLE, None)
