"""The criterion ``"output_variance"``: the variance that a neuron gives the consumer's output, C_jj |w_j|^2.

FLAP (AAAI 2024, arXiv 2312.11983), without its normalisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.planning.importance import Scoring


def output_variance(about: Scoring) -> Tensor:
    """Return the sum of C_jj |w_j|^2 over the consumer inputs; (d,) float64."""
    return torch.stack([m.variance.cpu() * weight.square().sum(0) for m, weight in about.inputs]).sum(0)
