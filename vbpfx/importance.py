"""Importance: one score per hidden neuron; the lowest go first.

- ``"variance"`` (Variance-Based Pruning, ICCV 2025, arXiv 2507.12988): C_jj, the sample variance of the
  activation at the consumer's input. Replacing h_j by its mean costs an expected squared error of just
  C_jj. With several consumer inputs their variances add up.
- ``"magnitude"``: the squared L2 norm of everything the neuron owns: its rows in the producers, its
  columns in the consumers.
- ``"random"``: uniform, from a fixed seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vbpfx.capture import named_tensors
from vbpfx.moments import Moments
from vbpfx.records import Block

Criterion = Callable[[Block, tuple[Moments, ...], nn.Module], Tensor]


def variance(block: Block, moments: tuple[Moments, ...], model: nn.Module) -> Tensor:
    """Sum over the consumer inputs of M2 / (n - 1), several calls of one layer counting once; (d,) float64."""
    return torch.stack([moments[pool[0]].variance.cpu() for pool in block.pools]).sum(0)


def magnitude(block: Block, moments: tuple[Moments, ...], model: nn.Module) -> Tensor:
    """Sum of the squares of all weights that belong to the neuron; (d,) float64."""
    tensors = named_tensors(model)
    total = torch.zeros(block.width, dtype=torch.float64)
    weights = {*block.producers, *(consumer.weight for consumer in block.consumers)}
    for entry in block.parameters:
        if entry.name in weights:
            weight = tensors[entry.name].detach().double().cpu()
            own = weight.narrow(entry.axis, entry.start, block.width)
            total += own.movedim(entry.axis, 0).flatten(1).square().sum(1)
    return total


def random(block: Block, moments: tuple[Moments, ...], model: nn.Module) -> Tensor:
    """Uniform in [0, 1), the same for the same block name; (d,) float64."""
    # a checksum of the whole name: torch's generator uses no more than 32 bits of a seed
    generator = torch.Generator().manual_seed(zlib.crc32(block.name.encode()))
    return torch.rand(block.width, dtype=torch.float64, generator=generator)


CRITERIA: Mapping[str, Criterion] = {"variance": variance, "magnitude": magnitude, "random": random}
