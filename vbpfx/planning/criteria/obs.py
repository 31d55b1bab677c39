"""The criterion ``"obs"``: the error that is left when one neuron is removed and the consumer is fitted again.

Optimal Brain Surgeon on the layer's regression: |w_j|^2 / [(C + lambda I)^-1]_jj.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.planning.elimination import ridge_inverse
from vbpfx.planning.importance import Scoring

NEEDS_COVARIANCE = True


def obs(about: Scoring) -> Tensor:
    """Return the sum of |w_j|^2 / [(C + lambda I)^-1]_jj over the consumer inputs; (d,) float64."""
    total = torch.zeros(about.block.width, dtype=torch.float64)
    for moments, weight in about.inputs:
        total += weight.square().sum(0) / ridge_inverse(moments.all_co.covariance.cpu()).diagonal()
    return total
