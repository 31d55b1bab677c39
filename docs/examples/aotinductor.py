"""Prune an exported program, then compile it ahead of time with AOTInductor, in float32 and in int8.

Needs the extra ``vbpfx[demo]``, torchao and a C++ compiler. Prints the accuracy and the size of each package on images that it has
not seen, and how far its outputs are from the program's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pt2e_int8 import int8
from torch import Tensor
from torch.export import Dim, ExportedProgram

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained

MOST = 1024


def quantized(program: ExportedProgram, calibration: Sequence[Tensor], most: int) -> ExportedProgram:
    """The program in int8, as :mod:`pt2e_int8` makes it, for batches of at most so many."""
    sizes = ({0: Dim("batch", min=2, max=most)},)
    return torch.export.export(int8(program, calibration), (calibration[0],), dynamic_shapes=sizes)


def compile_package(program: ExportedProgram, path: Path) -> Path:
    """The program as a package of machine code and weights."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The package's forward."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: package(images)


def main() -> None:
    """Dense, pruned, int8, and both."""
    split, model = load_digits(), load_trained()
    calibration = split.train_images.split(100)
    sizes = ({0: Dim("batch", min=2, max=MOST)},)
    program = torch.export.export(model, (calibration[0],), dynamic_shapes=sizes)
    pruned = vbpfx.prune_exported(program, calibration, ratio=0.7, progress=False)
    programs = {
        "dense": program,
        "pruned": pruned,
        "int8": quantized(program, calibration, MOST),
        "pruned + int8": quantized(pruned, calibration, MOST),
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, each in programs.items():
            path = compile_package(each, Path(folder) / f"{name.replace(' ', '')}.pt2")
            run = runner(path)
            figure = accuracy(run, split.test_images, split.test_labels)
            print(f"{name}: accuracy {figure:.2%}, {path.stat().st_size / 1024:,.0f} KiB", flush=True)
            expected = each.module()(split.test_images)
            error = (run(split.test_images) - expected).abs().max() / expected.abs().max()
            print(f"{name}: differs from PyTorch by {error:.1e} of the largest logit", flush=True)


if __name__ == "__main__":
    main()
