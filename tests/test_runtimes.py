"""Every runtime computes what PyTorch computes, dense and pruned, or explains why it cannot."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from own_process import in_a_process
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError
from vbpfx.export.onnx import export_onnx
from vbpfx.runtimes.adapters import NAMES
from vbpfx.runtimes.interface import Compiled
from vbpfx.runtimes.table import runtime

# Rounding between different float32 kernels. The documented bound is 1e-4, and networks of two layers stay far below it.
PARITY = 1e-5


class Texts(nn.Module):
    """Token ids and a mask by keyword, and several outputs, which the runtimes must flatten in the right order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embedding(ids)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x)))) * scale
        mean = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return {"scores": self.head(mean), "mean": mean}


def texts(batch: int = 3) -> dict[str, Any]:
    return {"ids": torch.randint(50, (batch, 7)), "mask": (torch.rand(batch, 7) > 0.3).float() + 1e-3}


def _needed(name: str) -> None:
    """Skip the test if an optional package or the C++ compiler is missing; ONNX Runtime and PyTorch are always installed."""
    modules = {"openvino": "openvino", "executorch": "executorch", "tvm": "tvm"}
    if name in modules:
        pytest.importorskip(modules[name])
    if name in ("aotinductor", "torch_compile") and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler: no g++ and no clang++ here")


def _agree(compiled: Compiled, inputs: Inputs, network: nn.Module) -> None:
    with torch.no_grad():
        expected = list(inputs.run(network).values())
    found = compiled.run(inputs)
    assert [t.shape for t in found] == [t.shape for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < PARITY


def _compile_dense_and_pruned(name: str) -> list[int | None]:
    """Compile both networks, compare them with PyTorch, and return their sizes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Texts().eval()
    pruned = vbpfx.prune(model, [texts(16)], ratio=0.5, method="vbp", progress=False)
    assert pruned.graph_module.get_parameter("fc1.weight").shape == (12, 8)
    small, inputs = pruned.graph_module, Inputs((), texts())
    before = {key: value.clone() for key, value in inputs.kwargs.items()}
    sizes = []
    for network in (model, small):
        compiled = runtime(name).compile(network, inputs, 1)
        _agree(compiled, inputs, network)
        _agree(compiled, Inputs((), texts()), network)  # values other than those at compile time
        sizes.append(compiled.size)
    assert all(torch.equal(before[key], value) for key, value in inputs.kwargs.items())
    assert torch.get_num_threads() == 1
    return sizes


@pytest.mark.parametrize("name", NAMES)
def test_dense_and_pruned_agree_with_pytorch(name: str) -> None:
    """This runs in a separate process, so that a crash of freshly compiled native code does not end other tests."""
    _needed(name)
    sizes = in_a_process(_compile_dense_and_pruned, name)
    assert (sizes == [None, None]) == (name in ("pytorch", "torch_compile"))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_onnx_files_open_in_the_runtimes_that_take_them(name: str, tmp_path: Path) -> None:
    _needed(name)
    model, inputs = Texts().eval(), Inputs((), texts())
    path = export_onnx(model, inputs, tmp_path / "model.onnx")
    found = runtime(name)
    assert found.open is not None
    compiled = found.open(path, inputs, 1)
    _agree(compiled, inputs, model)
    assert compiled.size == path.stat().st_size
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=f"{name} cannot compile the network"):
        found.open(tmp_path / "broken.onnx", inputs, 1)


def test_an_unknown_runtime_names_those_there_are() -> None:
    with pytest.raises(
        ExportError, match=r"runtime 'tensorflow' is unknown; choose one of .*onnxruntime, openvino, pytorch"
    ):
        runtime("tensorflow")


@pytest.mark.parametrize("name", ["openvino", "executorch", "tvm"])
def test_a_missing_package_names_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # what Python takes for a module that is not there
    with pytest.raises(ExportError, match=rf"runtime {name} needs .*install it: pip install (apache-)?{name}"):
        runtime(name)


class Refused(nn.Module):
    """A network that runs but cannot be exported, because its control flow depends on values."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * 2 if float(x.sum()) > 0 else x}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pytorch"])
def test_what_a_compiler_says_becomes_an_export_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    _needed(name)
    adapter = runtime(name)
    capfd.readouterr()
    with pytest.raises(ExportError) as caught:
        adapter.compile(Refused().eval(), Inputs((torch.randn(2, 3),), {}), 1)
    assert str(caught.value).startswith(name)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_aotinductor_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ExportError, match=r"aotinductor: .* no g\+\+ and no clang\+\+"):
        runtime("aotinductor").compile(Texts().eval(), Inputs((), texts()), 1)


def test_executorch_keeps_the_pool_that_a_loaded_program_holds() -> None:
    """Programs hold the thread pool by address, so replacing it under a loaded program would crash the process."""
    _needed("executorch")
    model, inputs = Texts().eval(), Inputs((), texts())
    compiled = runtime("executorch").compile(model, inputs, 1)
    with pytest.raises(ExportError, match=r"executorch: .*one pool of threads.* runs on 1"):
        runtime("executorch").compile(model, inputs, 2)
    _agree(compiled, inputs, model)
    del compiled
    gc.collect()
    _agree(runtime("executorch").compile(model, inputs, 2), inputs, model)


def test_onnx_runtime_gets_the_threads_that_are_asked_for() -> None:
    inputs = Inputs((), texts())
    made = runtime("onnxruntime").compile(Texts().eval(), inputs, 2)
    session: onnxruntime.InferenceSession = made.session  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 2
