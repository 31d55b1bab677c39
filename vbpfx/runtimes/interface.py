"""The interface of a runtime: it compiles a network for given inputs, and runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vbpfx.data.inputs import Inputs


class Compiled(ABC):
    """A network compiled for inputs of fixed shapes.

    Attributes:
        size: the size in bytes of the file that would be shipped; None if there is no such file.
        file: the file that would be shipped; None if the runtime cannot load it again. It exists as long as this object.
    """

    size: int | None = None
    file: Path | None = None

    @abstractmethod
    def run(self, inputs: Inputs) -> list[Tensor]:
        """Run the network on inputs of the compiled shapes. Return its output tensors in order, on the CPU."""


@dataclass(frozen=True)
class About:
    """Facts about a runtime that are known without importing its package.

    Attributes:
        package: the package that has to be installed.
        module: the module that is imported to check that the package is installed; "" if it has the package's name.
        round_to: the ``round_to`` to pass to :func:`vbpfx.prune` for this runtime. At other widths, a layer is slower
            than its number of products suggests. It is 1 if all widths are about equally fast (docs/deployment.md,
            benchmarks/rounding.py).
    """

    package: str
    module: str = ""
    round_to: int = 1


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        name: its name in ``vbpfx bench --runtime`` and ``latency_runtime=``.
        about: its package, and the widths that are fast in it.
        compile: compiles a network in eval mode, given inputs with the shapes that it will get, and a number of threads
            (None for the runtime's own choice). It raises ExportError if the runtime does not accept the network.
        open: compiles an ONNX file in the same way; None if the runtime does not accept ONNX files.
        load: loads a shipped file (ONNX, or the runtime's own format); None if the runtime saves no file.
    """

    name: str
    about: About
    compile: Callable[[nn.Module, Inputs, int | None], Compiled]
    open: Callable[[Path, Inputs, int | None], Compiled] | None = None
    load: Callable[[Path, Inputs, int | None], Compiled] | None = None
