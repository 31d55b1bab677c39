"""AOTInductor: Inductor ahead of time, in a package that runs without Python's compiler."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package

from vbpfx.errors import ExportError
from vbpfx.export.program import export_program
from vbpfx.inputs import Inputs
from vbpfx.runtimes.interface import Compiled
from vbpfx.runtimes.pytorch import torch_threads
from vbpfx.runtimes.torch_compile import Inductor


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """The package, loaded.

    Raises:
        ExportError: there is no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ExportError(
            "AOTInductor needs a C++ compiler, and there is no g++ and no clang++: install one, or set CXX"
        )
    with torch_threads(threads), tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        aoti_compile_and_package(export_program(network, inputs), package_path=path)
        return Inductor(aoti_load_package(path), threads, Path(path).stat().st_size)
