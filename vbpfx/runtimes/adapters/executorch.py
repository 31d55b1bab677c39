"""ExecuTorch with XNNPACK, run by its Python runtime."""

from __future__ import annotations

import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn

from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError
from vbpfx.export.static_program import export_static_program
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("executorch", module="executorch.runtime", round_to=32)


class _Method(Compiled):
    def __init__(self, file: Path) -> None:
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(file)  # kept here, because its methods do not keep it alive
        self.method = self.program.load_method("forward")
        self.file, self.size = file, file.stat().st_size

    def run(self, inputs: Inputs) -> list[Tensor]:
        return list(self.method.execute([tensor.detach().cpu().contiguous() for tensor in inputs.tensors]))


_loaded: weakref.WeakSet[_Method] = weakref.WeakSet()


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Compile a network to a program, and load it.

    Raises:
        ExportError: another program is still loaded with a different number of threads.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(export_static_program(network, inputs), partitioner=[XnnpackPartitioner()])
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.pte"
        path.write_bytes(edge.to_executorch().buffer)
        method = load_file(path, inputs, threads)
        weakref.finalize(method, stack.pop_all().close)
    return method


def load_file(path: Path, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Load a compiled program.

    Raises:
        ExportError: another program is still loaded with a different number of threads.
    """
    _set_threads(threads)
    method = _Method(path)
    _loaded.add(method)
    return method


def _set_threads(threads: int | None) -> None:
    """Set the number of threads of ExecuTorch's only thread pool.

    Programs with XNNPACK keep using the pool with which they were loaded, so it can be replaced only while none is
    loaded.
    """
    from executorch.extension.pybindings import portable_lib

    found = portable_lib._threadpool_get_thread_count()
    if threads in (None, found):
        return
    if _loaded:
        raise ExportError(
            f"ExecuTorch has one pool of threads for the whole process, and a program that runs on {found} is still loaded. Delete every reference to that program before compiling for {threads}"
        )
    portable_lib._unsafe_reset_threadpool(threads)
