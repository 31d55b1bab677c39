"""The criterion ``"random"``: uniform random scores from a fixed seed, as a baseline."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from vbpfx.planning.importance import Scoring


def random(about: Scoring) -> Tensor:
    """Return uniform random numbers in [0, 1), the same for the same block name; (d,) float64."""
    # the seed is a 32-bit checksum of the whole name, since torch's generator uses no more than 32 bits
    generator = torch.Generator().manual_seed(zlib.crc32(about.block.name.encode()))
    return torch.rand(about.block.width, dtype=torch.float64, generator=generator)
