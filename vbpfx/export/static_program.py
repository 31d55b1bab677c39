"""Export a network for inputs of fixed shapes as a program from tensors to tensors, as most compilers need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.graph.capture import on_cpu, share_parameters


class _Flat(nn.Module):
    """The network as a function from tensors to tensors; nested and constant arguments are restored inside."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        leaves, self.structure = pytree.tree_flatten((inputs.args, inputs.kwargs))
        self.leaves: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the network's output tensors in order."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        output = self.network(*args, **kwargs)
        return tuple(tensors_in(output))


def export_static_program(network: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Export a network in eval mode, on the CPU. The program takes tensors shaped like ``inputs.tensors``, in order."""
    flat = share_parameters(on_cpu(_Flat(network, inputs)))
    example = tuple(tensor.cpu() for tensor in inputs.tensors)
    with torch.no_grad():
        return torch.export.export(flat, example, strict=False)
