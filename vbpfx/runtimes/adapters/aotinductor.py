"""AOTInductor: Inductor compiles a network ahead of time to a package, which runs without a compiler."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError
from vbpfx.export.static_program import export_static_program
from vbpfx.runtimes.adapters.pytorch import torch_threads
from vbpfx.runtimes.adapters.torch_compile import Inductor
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("torch")


class _Package(Inductor):
    def __init__(self, file: Path, threads: int | None) -> None:
        from torch._inductor import aoti_load_package

        super().__init__(aoti_load_package(str(file)), threads)
        self.file, self.size = file, file.stat().st_size


def load_file(path: Path, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Load a compiled package."""
    return _Package(path, threads)


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Compile a network to a package, and load it.

    Raises:
        ExportError: there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package

    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ExportError(
            "AOTInductor needs a C++ compiler, and there is no g++ and no clang++: install one, or set CXX"
        )
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.pt2"
        with torch_threads(threads):
            aoti_compile_and_package(export_static_program(network, inputs), package_path=str(path))
            package = _Package(path, threads)
        weakref.finalize(package, stack.pop_all().close)
    return package
