"""Prune, then quantise to int8 with torchao's PT2E: both work on exported programs.

Needs the extra ``vbpfx[demo]`` and torchao. Prints the accuracy of each network on images that it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained


def int8(program: ExportedProgram, calibration: Iterable[Tensor]) -> fx.GraphModule:
    """The program with 8-bit weights (a scale per output channel) and activations (one scale each)."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return move_exported_model_to_eval(convert_pt2e(prepared))


def main() -> None:
    """Dense, pruned, int8, and both."""
    split, model = load_digits(), load_trained()
    calibration = split.train_images.split(100)
    program = torch.export.export(model, (calibration[0],), dynamic_shapes=({0: Dim("batch")},))
    pruned = vbpfx.prune_exported(program, calibration, ratio=0.7, progress=False)
    networks = {
        "dense": program.module(),
        "pruned": pruned.module(),
        "int8": int8(program, calibration),
        "pruned + int8": int8(pruned, calibration),
    }
    for name, network in networks.items():
        print(f"{name}: accuracy {accuracy(network, split.test_images, split.test_labels):.2%}")


if __name__ == "__main__":
    main()
