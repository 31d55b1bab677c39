"""ONNX Runtime, on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
from torch import Tensor, nn

from vbpfx.export.onnx import export_onnx, run_session
from vbpfx.inputs import Inputs
from vbpfx.runtimes.interface import Compiled


class _Session(Compiled):
    def __init__(self, session: onnxruntime.InferenceSession, size: int) -> None:
        self.session, self.size = session, size

    def run(self, inputs: Inputs) -> list[Tensor]:
        return run_session(self.session, inputs)


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """A session on the exported file.

    Raises:
        ExportError: the network cannot be exported, or the file disagrees with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        return compile_file(export_onnx(network, inputs, Path(folder) / "model.onnx"), inputs, threads)


def compile_file(path: Path, inputs: Inputs, threads: int | None = None) -> Compiled:
    """A session on an ONNX file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _Session(session, path.stat().st_size)
