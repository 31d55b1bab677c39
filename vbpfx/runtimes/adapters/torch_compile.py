"""torch.compile, with Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs
from vbpfx.export.static_program import export_static_program
from vbpfx.runtimes.adapters.pytorch import torch_threads
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("torch")


class Inductor(Compiled):
    """A program compiled by Inductor. The number of threads is part of the compiled code."""

    def __init__(self, forward: Callable[..., Any], threads: int | None) -> None:
        self.forward, self.threads = forward, threads

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Return the network's output tensors."""
        with torch_threads(self.threads), torch.no_grad():
            return list(self.forward(*(tensor.cpu() for tensor in inputs.tensors)))


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Export a network, and compile the program.

    The network is exported first because Dynamo stops compiling code that it has already compiled for many networks.
    An exported program is always new code.
    """
    with torch_threads(threads), torch.no_grad():
        program = export_static_program(network, inputs).module(check_guards=False)
        compiled = Inductor(torch.compile(program, fullgraph=True, dynamic=False), threads)
        compiled.run(inputs)  # the first run compiles
    return compiled
