"""The criterion ``"variance"``: the variance of the activation.

Variance-Based Pruning (ICCV 2025, arXiv 2507.12988). Replacing h_j by its mean costs an expected squared error of C_jj.
"""

from __future__ import annotations

from torch import Tensor

from vbpfx.planning.importance import Scoring, summed_variance


def variance(about: Scoring) -> Tensor:
    """Return the sum of M2 / (n - 1) over the consumer inputs; (d,) float64."""
    return summed_variance(about.block, about.moments)
