"""The criterion ``"denoised_variance"``: a mixture of the variance and its part above the Marchenko-Pastur edge.

DVBP (arXiv 2608.17657): (1 - p) C_jj + p D_jj, where D is the part of C above the edge, and p is the fraction of neurons
that are removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.planning.importance import Scoring

NEEDS_COVARIANCE = True


def denoised_variance(about: Scoring) -> Tensor:
    """Return the sum of (1 - p) C_jj + p D_jj over the consumer inputs; (d,) float64.

    D is the sum of lambda_i u_i u_i^T over the eigenvalues of C above the Marchenko-Pastur edge s (1 + sqrt(d / n))^2.
    n is the number of *samples* (positions of one image are not independent draws). s is the median eigenvalue divided
    by the median of the Marchenko-Pastur law, which is taken as 1 here.
    """
    total = torch.zeros(about.block.width, dtype=torch.float64)
    for moments, _ in about.inputs:
        c = moments.all_co.covariance.cpu()
        values, vectors = torch.linalg.eigh(c)
        edge = values.median() * (1 + (len(c) / max(1, about.samples)) ** 0.5) ** 2
        denoised = (vectors.square() * torch.where(values > edge, values, 0.0)).sum(1)
        total += (1 - about.ratio) * moments.variance.cpu() + about.ratio * denoised
    return total
