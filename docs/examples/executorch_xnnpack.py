"""Prune, quantise and lower to an ExecuTorch program for XNNPACK, the CPU backend of phones; run it here.

Needs the extra ``vbpfx[demo]`` and executorch. Prints the accuracy and the size of each ``.pte`` file on images that it has not
seen, and how far the file's outputs are from the program's where nothing is quantised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained

BATCH = 100


def int8(program: ExportedProgram) -> ExportedProgram:
    """The program with 8-bit weights (a scale per output channel) and activations (scaled anew at every call)."""
    # scales that are fixed ahead would cover the residual stream, too, whose outliers leave the rest of it no digits
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(program.module(), XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        prepared(*program.example_inputs[0])
    sizes = ({0: Dim("batch", max=BATCH)},)
    return torch.export.export(convert_pt2e(prepared), program.example_inputs[0], dynamic_shapes=sizes)


def write(program: ExportedProgram, path: Path) -> Path:
    """The program as a ``.pte`` file, its layers handed to XNNPACK."""
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    return path


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The file's forward, in ExecuTorch's own runtime."""
    forward = Runtime.get().load_program(path).load_method("forward")
    return lambda images: forward.execute([images.contiguous()])[0].clone()


def main() -> None:
    """Dense, pruned, int8, and both."""
    split, model = load_digits(), load_trained()
    calibration = split.train_images.split(BATCH)
    # ExecuTorch plans its memory ahead: an open size needs an upper bound
    program = torch.export.export(model, (calibration[0],), dynamic_shapes=({0: Dim("batch", max=BATCH)},))
    pruned = vbpfx.prune_exported(program, calibration, ratio=0.7, progress=False)
    programs = {
        "dense": program,
        "pruned": pruned,
        "int8": int8(program),
        "pruned + int8": int8(pruned),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, each in programs.items():
            path = write(each, Path(folder) / f"{name}.pte")
            run = runner(path)
            figure = accuracy(run, split.test_images, split.test_labels, batch_size=BATCH)
            print(f"{name}: accuracy {figure:.2%}, {path.stat().st_size / 1024:,.0f} KiB", flush=True)
            if "int8" not in name:
                with torch.no_grad():
                    expected = each.module()(split.test_images[:BATCH])
                error = (run(split.test_images[:BATCH]) - expected).abs().max() / expected.abs().max()
                print(f"{name}: differs from PyTorch by {error:.1e} of the largest logit")


if __name__ == "__main__":
    main()
