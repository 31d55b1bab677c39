"""Prune an exported program, convert it to OpenVINO and quantise it there with NNCF.

Needs the extra ``vbpfx[demo]``, openvino and nncf. Prints the accuracy and the size of each model on images that it has not seen,
and how far the model's outputs are from PyTorch's where nothing is quantised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import nncf
import openvino
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained


def convert(program: ExportedProgram) -> openvino.Model:
    """The program as an OpenVINO model."""
    return openvino.convert_model(program)


def int8(model: openvino.Model, calibration: Iterable[Tensor]) -> openvino.Model:
    """The model with 8-bit weights and activations, as NNCF places them in a transformer."""
    data = nncf.Dataset([batch.numpy() for batch in calibration])
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=300)


def runner(model: openvino.Model) -> Callable[[Tensor], Tensor]:
    """The model's forward, compiled for the CPU."""
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def size(model: openvino.Model, folder: Path) -> int:
    """Bytes of the saved model, not compressed to half precision."""
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return sum(path.stat().st_size for path in folder.glob("model.*"))


def main() -> None:
    """Dense, pruned, int8, and both."""
    split, network = load_digits(), load_trained()
    calibration = split.train_images.split(100)
    program = torch.export.export(network, (calibration[0],), dynamic_shapes=({0: Dim("batch")},))
    pruned = vbpfx.prune_exported(program, calibration, ratio=0.7, progress=False)
    for name, each in {"dense": program, "pruned": pruned}.items():
        model = convert(each)
        run = runner(model)
        with torch.no_grad():
            expected = each.module()(split.test_images)
        error = (run(split.test_images) - expected).abs().max() / expected.abs().max()
        print(f"{name}: differs from PyTorch by {error:.1e} of the largest logit")
        both = {name: model, "int8" if name == "dense" else "pruned + int8": int8(model, calibration)}
        for title, found in both.items():
            figure = accuracy(runner(found), split.test_images, split.test_labels)
            with tempfile.TemporaryDirectory() as folder:
                print(f"{title}: accuracy {figure:.2%}, {size(found, Path(folder)) / 1024:,.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
