"""The criterion ``"magnitude"``: the squared L2 norm of all weights of the neuron.

The weights of a neuron are its rows in the producers and its columns in the consumers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.graph.capture import tensor_named
from vbpfx.planning.importance import Scoring


def magnitude(about: Scoring) -> Tensor:
    """Return the sum of the squares of all weights that belong to each neuron; (d,) float64."""
    block = about.block
    total = torch.zeros(block.width, dtype=torch.float64)
    weights = {*block.producers, *(consumer.weight for consumer in block.consumers)}
    for entry in block.parameters:
        if entry.name in weights:
            weight = tensor_named(about.model, entry.name).detach().double().cpu()
            parts = weight.chunk(entry.groups, 0) if entry.groups > 1 else (weight,)
            norms = torch.cat([part.movedim(entry.axis, 0).flatten(1).square().sum(1) for part in parts])
            total += norms[entry.at(range(block.width))]
    return total
