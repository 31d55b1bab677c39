"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
from torch import Tensor

from vbpfx.data.inputs import Inputs
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("onnxruntime", round_to=8)  # its convolutions are slow at other widths


class _Session(Compiled):
    def __init__(self, session: onnxruntime.InferenceSession, file: Path) -> None:
        self.session, self.file, self.size = session, file, file.stat().st_size

    def run(self, inputs: Inputs) -> list[Tensor]:
        return run_session(self.session, inputs)


def compile_file(path: Path, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Open a session on an ONNX file."""
    return _Session(open_session(path, threads=threads), path)
