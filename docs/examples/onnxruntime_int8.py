"""Prune, export to ONNX, and quantise the file with ONNX Runtime's own tools.

Needs the extra ``vbpfx[demo]``. Prints the accuracy and the size of each file on images that it has not seen. That the files
which are not quantised agree with PyTorch, the export has checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained
from vbpfx.export.onnx import export_onnx


class Reader(CalibrationDataReader):
    """Batches as ONNX Runtime's calibration asks for them, one after the other."""

    def __init__(self, name: str, batches: Iterable[Tensor]) -> None:
        self.feeds = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict | None:
        """The next batch; None behind the last."""
        return next(self.feeds, None)


def int8(path: Path, calibration: Iterable[Tensor]) -> Path:
    """The file with 8-bit weights (a scale per output channel) and activations (one scale each), as Q and DQ nodes.

    Two things stand out of eight bits in transformers. What layers add to the residual stream has a few channels of large values:
    outputs of layers are not quantised, which spends nothing, since whatever multiplies next quantises its own inputs. What comes
    out of GELU is small but for a few neurons: it takes sixteen bits, and the layer behind it is computed in float from its
    8-bit weights.
    """
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantized = path.with_suffix(".int8.onnx")
    nodes = onnx.load(prepared).graph.node
    sixteen = [{"quant_type": QuantType.QUInt16}]
    name = onnxruntime.InferenceSession(prepared).get_inputs()[0].name
    quantize_static(
        prepared,
        quantized,
        Reader(name, calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"],
            "TensorQuantOverrides": {node.output[0]: sixteen for node in nodes if node.op_type == "Gelu"},
        },
    )
    return quantized


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The file's forward, in ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def main() -> None:
    """Dense, pruned, int8, and both."""
    split, model = load_digits(), load_trained()
    calibration = split.train_images.split(100)
    pruned = vbpfx.prune(model, calibration, ratio=0.7, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        dense = export_onnx(model, pruned.captured.inputs, Path(folder) / "dense.onnx")
        small = pruned.to_onnx(Path(folder) / "pruned.onnx")
        files = {
            "dense": dense,
            "pruned": small,
            "int8": int8(dense, calibration),
            "pruned + int8": int8(small, calibration),
        }
        for name, path in files.items():
            figure = accuracy(runner(path), split.test_images, split.test_labels)
            print(f"{name}: accuracy {figure:.2%}, {path.stat().st_size / 1024:,.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
