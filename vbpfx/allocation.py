"""Allocation: how one block's neurons compare with another's, so that one ranking can run over all of them.

A score is an error within one block; what such an error does to the output differs from block to block.

- ``"global"``: scores as they are, whatever a neuron costs (VBP).
- ``"normalised"``: divided by the block's mean score.
- ``"equal"``: the rank within the block, as a fraction of its width: every block gives up the same share.

Where the budget is MACs or parameters, normalised scores are divided by what one neuron of the block costs: the loss per
unit gained is what ranks. Equal shares stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Allocation = Callable[[Tensor, float], Tensor]


def as_they_are(scores: Tensor, cost: float) -> Tensor:
    """s_j; (d,)."""
    return scores


def normalised(scores: Tensor, cost: float) -> Tensor:
    """s_j / (mean(s) cost); (d,)."""
    return scores / (scores.mean().clamp_min(torch.finfo(scores.dtype).tiny) * cost)


def equal(scores: Tensor, cost: float) -> Tensor:
    """(rank of s_j + 1) / d, ties by index; (d,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    return ranks / len(scores)


ALLOCATIONS: Mapping[str, Allocation] = {"global": as_they_are, "normalised": normalised, "equal": equal}
