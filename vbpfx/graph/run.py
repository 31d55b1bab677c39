"""A network is run for its outputs, which are then compared with those of another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.graph.precision import full_float32


def outputs_of(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors that a network returns for the inputs, without gradients and in full float32.

    The network runs in the mode that it is in. What its own operators raise is raised.
    """
    with torch.no_grad(), full_float32():
        return tensors_in(inputs.run(network))
