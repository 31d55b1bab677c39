"""Apache TVM: Relax with its default pipeline for the CPU, without tuning."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs
from vbpfx.export.static_program import export_static_program
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("apache-tvm", module="tvm")

# TVM reads this when its threads start; by default it would pin the threads of this process to single cores
os.environ.setdefault("TVM_BIND_THREADS", "0")


class _Machine(Compiled):
    def __init__(self, executable: Any, threads: int | None, size: int) -> None:
        import tvm
        from tvm import relax

        self.tvm, self.threads, self.size = tvm, threads, size
        self.main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(self, inputs: Inputs) -> list[Tensor]:
        if self.threads:
            self.tvm.get_global_func("runtime.config_threadpool")(1, self.threads)
        found = self.main(*(self.tvm.runtime.from_dlpack(t.detach().cpu().contiguous()) for t in inputs.tensors))
        return [torch.from_numpy(value.numpy()) for value in found]


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Compile a network to an executable, and load it."""
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        module = from_exported_program(export_static_program(network, inputs))
        executable = tvm.compile(module, target=tvm.target.Target.from_device(tvm.cpu()))
        path = Path(folder) / "model.so"
        executable.export_library(str(path))
        return _Machine(executable, threads, path.stat().st_size)
