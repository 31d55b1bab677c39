"""Apache TVM: Relax with its default pipeline for the CPU, without tuning."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# TVM reads this when its threads start; by default it would pin the threads of this process to single cores
os.environ.setdefault("TVM_BIND_THREADS", "0")

import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from vbpfx.data.inputs import Inputs
from vbpfx.export.program import export_program
from vbpfx.runtimes.interface import Compiled


class _Machine(Compiled):
    def __init__(self, executable: Any, threads: int | None, size: int) -> None:
        self.main, self.threads, self.size = relax.VirtualMachine(executable, tvm.cpu())["main"], threads, size

    def run(self, inputs: Inputs) -> list[Tensor]:
        if self.threads:
            tvm.get_global_func("runtime.config_threadpool")(1, self.threads)
        found = self.main(*(tvm.runtime.from_dlpack(t.detach().cpu().contiguous()) for t in inputs.tensors))
        return [torch.from_numpy(value.numpy()) for value in found]


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Compile a network to an executable, and load it."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        module = from_exported_program(export_program(network, inputs))
        executable = tvm.compile(module, target=tvm.target.Target.from_device(tvm.cpu()))
        path = Path(folder) / "model.so"
        executable.export_library(str(path))
        return _Machine(executable, threads, path.stat().st_size)
