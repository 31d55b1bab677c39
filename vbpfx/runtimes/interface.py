"""What a runtime is to vbpfx: something that compiles a network for given inputs, and runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vbpfx.data.inputs import Inputs


class Compiled(ABC):
    """A network compiled for inputs of one shape.

    Attributes:
        size: bytes of what would be shipped; None where nothing is written.
        file: what would be shipped, where the runtime can load it again; it is there as long as this is.
    """

    size: int | None = None
    file: Path | None = None

    @abstractmethod
    def run(self, inputs: Inputs) -> list[Tensor]:
        """The network's output tensors in order, on the CPU; inputs of the shapes that it was compiled for."""


@dataclass(frozen=True)
class Runtime:
    """A runtime, by the name that users know.

    Attributes:
        name: what ``vbpfx bench --runtime`` and ``latency_runtime=`` call it.
        package: the package that has to be installed.
        extra: the extra of vbpfx that installs it; empty where vbpfx itself needs it.
        compile: from a network in eval mode, inputs of the shapes it will see, and a number of threads (None: the
            runtime's own choice). Raises ExportError where the runtime cannot take the network.
        open: the same from an ONNX file; None where the runtime takes none.
        load: loads what is shipped (an ONNX file, or the runtime's own format); None for a runtime that saves no file.
        round_to: what to pass to :func:`vbpfx.prune` for this runtime: at multiples of it a layer of that width is no
            slower than its products; 1 where odd widths cost next to nothing.
    """

    name: str
    package: str
    extra: str
    compile: Callable[[nn.Module, Inputs, int | None], Compiled]
    open: Callable[[Path, Inputs, int | None], Compiled] | None = None
    load: Callable[[Path, Inputs, int | None], Compiled] | None = None
    round_to: int = 1
