"""PyTorch itself, without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.runtimes.interface import About, Compiled

ABOUT = About("torch")


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """A context in which PyTorch uses the given number of threads; None keeps the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Eager(Compiled):
    def __init__(self, network: nn.Module, threads: int | None) -> None:
        self.network, self.threads = network, threads

    def run(self, inputs: Inputs) -> list[Tensor]:
        with torch_threads(self.threads), torch.inference_mode():
            output = inputs.run(self.network)
        return [tensor.cpu() for tensor in tensors_in(output)]


def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
    """Return the network as it is, without compiling it."""
    return _Eager(network, threads)
