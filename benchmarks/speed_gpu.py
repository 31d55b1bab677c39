"""The GPU part of ``speed.py``: dense and pruned networks, by precision and runtime."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from speed_measures import invented
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.export.onnx import export_onnx
from vbpfx.measurement.timing import interleaved

SUBJECTS = {"deit_base_patch16_224": 0.55, "convnext_base": 0.5}
PRECISIONS = ("fp32", "tf32", "bf16")
_BATCH = 64


def measure_gpu(rounds: int) -> list[dict[str, Any]]:
    """Return one row per network, precision and runtime: milliseconds per batch, dense and pruned."""
    return [row for name, ratio in SUBJECTS.items() for row in _network(name, ratio, rounds)]


def _network(name: str, ratio: float, rounds: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(_BATCH, *model.pretrained_cfg["input_size"])
    captured = vbpfx.capture(model, images[:2])
    analysis = vbpfx.find_blocks(captured)
    plan = vbpfx.make_plan(analysis, invented(analysis), ratio=ratio, method="vbp", allocation="equal", round_to=8)
    small = vbpfx.convert(captured, plan)
    about = {"network": name, "ratio": ratio, "batch": _BATCH}
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        pair = [network.to("cuda", dtype) for network in (captured.graph_module, small)]
        batch = images.to("cuda", dtype)
        yield about | _row(precision, "eager", [_torch_run(n, batch) for n in pair], rounds)
        compiled = [torch.compile(n) for n in pair]
        yield about | _row(precision, "torch.compile", [_torch_run(n, batch) for n in compiled], rounds)
        torch._dynamo.reset()
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pair = [network.to("cpu", torch.float32) for network in (captured.graph_module, small)]
        with tempfile.TemporaryDirectory() as folder:
            runs = [_session_run(n, images, Path(folder) / f"{i}.onnx") for i, n in enumerate(pair)]
        yield about | _row("fp32", "ONNX Runtime CUDA", runs, rounds)


def _row(precision: str, runtime: str, runs: list[Callable[[], object]], rounds: int) -> dict[str, Any]:
    taken = interleaved(dict(zip(("dense", "pruned"), runs, strict=True)), rounds=rounds, clock=_synchronized)
    return {"precision": precision, "runtime": runtime, **{key: 1e3 * value for key, value in taken.items()}}


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _torch_run(network: Callable[[Tensor], object], batch: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network(batch)

    return run


def _session_run(network: nn.Module, images: Tensor, path: Path) -> Callable[[], object]:
    assert isinstance(network, torch.fx.GraphModule)
    export_onnx(network, as_inputs(images[:2], network), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    binding, (given,) = session.io_binding(), session.get_inputs()
    binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(images.numpy(), "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(binding)
