"""Scores of the channels of queries and keys: how much a channel contributes to the products of the two.

A channel c that is removed from q and k takes q_c k_c out of every product. If a softmax over the keys reads the products, the mean of k_c
over the keys changes nothing, and what is left is on average

    s_c = E[q_c^2] Var[k_c].

If anything else reads them, it is E[q_c^2] E[k_c^2].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbpfx.calibration.moments import Moments
from vbpfx.plans.records import Block, Factor


def products_score(block: Block, moments: Sequence[Moments]) -> Tensor:
    """Return one score per channel, (d,) float64.

    Args:
        block: a block with factors.
        moments: the moments of every source of the block.
    """
    total = torch.zeros(block.width, dtype=torch.float64)
    for node in dict.fromkeys(factor.node for factor in block.factors):
        power: dict[str, Tensor] = {}
        for factor in block.factors:
            if factor.node == node:
                own = _power(factor, moments[block.sources.index(factor.source)])
                power[factor.role] = power.get(factor.role, torch.zeros_like(own)) + own
        total += power["query"] * power["key"]
    return total


def _power(factor: Factor, moments: Moments) -> Tensor:
    """Return the second moment of a factor's channels, or their variance where a constant changes nothing."""
    variance = moments.variance.double().cpu()
    if factor.centred:
        return variance
    return variance + moments.mean.double().cpu().square()
