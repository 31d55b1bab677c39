"""OpenVINO, on the CPU, from the exported ONNX file, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbpfx.data.inputs import Inputs
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("openvino", round_to=16)


class _Model(Compiled):
    def __init__(self, model: Any, file: Path) -> None:
        self.request, self.file, self.size = model.create_infer_request(), file, file.stat().st_size

    def run(self, inputs: Inputs) -> list[Tensor]:
        found = self.request.infer([tensor.detach().cpu().numpy() for tensor in inputs.tensors])
        return [torch.from_numpy(value) for value in found.to_tuple()]  # copies: by default infer shares no memory


def compile_file(path: Path, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Compile an ONNX file for the shapes of the inputs."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({port: list(t.shape) for port, t in zip(model.inputs, inputs.tensors, strict=True)})
    # float32 as in all other runtimes; by default OpenVINO uses bfloat16 if the processor supports it
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return _Model(core.compile_model(model, "CPU", options), path)
