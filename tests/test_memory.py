"""Memory in bench: the memory of a separate process compared with the size of the weights that it loads."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError
from vbpfx.measurement.bench import bench_files
from vbpfx.runtimes import memory, table
from vbpfx.runtimes.interface import About, Compiled, Runtime
from vbpfx.runtimes.memory import peak_memory

WIDTH = 512
EXAMPLE = Inputs((torch.zeros(2, WIDTH),), {})
# Memory that a runtime needs for its first network of any size.
OWN_PARTS = 64 * 2**20


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, WIDTH)).eval()


def _bytes(width: int) -> int:
    return 4 * (2 * WIDTH * width + width + WIDTH)


def _file(width: int, path: Path) -> Path:
    """Write the ONNX file of such a network directly, which is faster than an exporter."""
    weights = {"up": (WIDTH, width), "up_bias": (width,), "down": (width, WIDTH), "down_bias": (WIDTH,)}
    nodes = [
        helper.make_node("Gemm", ["x", "up", "up_bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "down", "down_bias"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    stored = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_what_is_measured_is_the_network(tmp_path: Path) -> None:
    """Compare 64 MiB of weights with 4.

    The memory of a large parent process must not count, although ru_maxrss of a new process starts with it.
    """
    widths = [2**14, 2**10]
    files = [_file(width, tmp_path / f"{width}.onnx") for width in widths]
    ballast = torch.ones(2**27)  # 512 MiB
    dense, pruned = (peak_memory("onnxruntime", file, EXAMPLE, 1) for file in files)
    assert ballast.sum() > 0
    weights = [_bytes(width) for width in widths]
    # At most three copies: the file as it is read, its tensors, and the layout that the kernels use.
    assert weights[0] < dense < 4 * weights[0]
    assert weights[1] < pruned < weights[0]
    assert dense - pruned > 0.9 * (weights[0] - weights[1])


@pytest.mark.parametrize("name", ["openvino", "executorch", "aotinductor"])
def test_other_runtimes(name: str, tmp_path: Path) -> None:
    """The deployed file of each runtime is loaded again in a new process."""
    width = 2**12
    try:
        taken = table.runtime(name)
        file = None if taken.open is None else _file(width, tmp_path / "model.onnx")
        made = taken.compile(_mlp(width), EXAMPLE, 1) if file is None else taken.open(file, EXAMPLE, 1)
    except ExportError as error:
        pytest.skip(str(error))
    assert made.file is not None
    assert _bytes(width) < peak_memory(name, made.file, EXAMPLE, 1) < 4 * _bytes(width) + OWN_PARTS


def test_bench_shows_it(tmp_path: Path) -> None:
    files = [_file(width, tmp_path / f"{width}.onnx") for width in (2**13, 2**10)]
    inputs = Inputs((), {"x": EXAMPLE.args[0]})
    result = bench_files(*files, inputs, batches=[2], rounds=1)
    (row,) = result.rows
    assert row.dense.memory is not None
    assert row.pruned.memory is not None
    assert row.dense.memory - row.pruned.memory > 0.9 * (_bytes(2**13) - _bytes(2**10))
    assert f"{row.dense.memory / 2**20:.1f} -> {row.pruned.memory / 2**20:.1f}" in str(result)
    assert not result.problems


class _Eager(Compiled):
    def __init__(self, network: nn.Module, file: Path) -> None:
        self.network, self.file = network, file

    def run(self, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [self.network(*inputs.args)]


def _bench_with(load: Any, file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> vbpfx.BenchResult:
    made = Runtime("fake", About("torch"), lambda network, inputs, threads: _Eager(network, file), load=load)
    monkeypatch.setattr(importlib.import_module("vbpfx.measurement.bench"), "runtime", lambda name: made)
    return vbpfx.bench(_mlp(8), _mlp(4), EXAMPLE.args, runtimes=["fake"], batches=[1], rounds=1, **options)


def test_a_process_that_fails_is_a_problem_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new process fails, because it does not know the fake runtime of this process."""
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

    monkeypatch.setattr(memory.subprocess, "Popen", refuse)
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


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the Python executable by a line of shell."""

    def set_to(line: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        monkeypatch.setattr(memory.sys, "executable", str(path))

    return set_to


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_what_the_process_leaves_behind_is_not_waited_for(tmp_path: Path, program: Callable[[str], None]) -> None:
    """The process ends, but a child process of it continues with open outputs."""
    program("""sleep 8 &\necho '{"before": 1, "after": 3}' > "$7\"""")
    start = time.monotonic()
    assert peak_memory("onnxruntime", tmp_path / "none", EXAMPLE, None, patience=6) == 2
    assert time.monotonic() - start < 4


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(f"sleep 600 &\necho $! > {tmp_path}/number\nwait")
    with pytest.raises(ExportError, match="took over 2 s"):
        peak_memory("onnxruntime", tmp_path / "none", EXAMPLE, None, patience=2)
    number = int((tmp_path / "number").read_text())
    for _ in range(50):
        stat = Path(f"/proc/{number}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe with a name")
def test_a_process_that_hangs_ends_by_itself(tmp_path: Path) -> None:
    """The inputs never arrive, and no parent is left to end the process."""
    os.mkfifo(tmp_path / "inputs")
    words = ["onnxruntime", "none", str(tmp_path / "inputs"), "0", str(tmp_path / "answer"), "0.5"]
    ended = subprocess.run([sys.executable, "-m", "vbpfx.runtimes.memory", *words], capture_output=True, timeout=120)
    assert ended.returncode == 1
    assert b"Timeout (0:00:00.500000)!" in ended.stderr


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        raise OSError("out of memory")

    monkeypatch.setattr(memory.subprocess, "Popen", refuse)
    with pytest.raises(ExportError, match="no process could be started"):
        peak_memory("onnxruntime", tmp_path / "none", EXAMPLE, None)
