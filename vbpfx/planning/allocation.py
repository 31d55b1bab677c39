"""Allocation: how one block's neurons compare with another's, so that one ranking can run over all of them.

A score is an error within one block; what such an error does to the output differs from block to block.

- ``"global"``: scores as they are, whatever a neuron costs (VBP).
- ``"normalised"``: divided by the block's mean score.
- ``"equal"``: the rank within the block, as a fraction of its width: every block gives up the same share.
- ``"sensitivity"``: by what the output really loses (:mod:`vbpfx.measurement.sensitivity`). Let D be its error when the block alone gives up
  its share p, and S the sum of the scores of those k = p d neurons: then a neuron that goes costs the output about
  s_j D / S. At the equal share that is m = s_k D / S, and

      s_j / s_k * m^tau

  gives equal shares for tau = 0 and equal marginal costs for tau = 1. Taken is tau = 1/4: what is measured block by block, on
  few samples, does not know that later blocks can make good what earlier ones lose.

Where the budget is MACs or parameters, normalised scores and m are divided by what one neuron of the block costs: the loss
per unit gained is what ranks. Equal shares stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# tau
TEMPER = 0.25


@dataclass(frozen=True)
class Standing:
    """What is known of a block beside its scores.

    Attributes:
        cost: of one neuron, under the budget.
        share: which share of all neurons will go, as far as it is known.
        sensitivity: D; None where it was not measured.
    """

    cost: float
    share: float
    sensitivity: float | None = None


Allocation = Callable[[Tensor, Standing], Tensor]


def as_they_are(scores: Tensor, about: Standing) -> Tensor:
    """s_j; (d,)."""
    return scores


def normalised(scores: Tensor, about: Standing) -> Tensor:
    """s_j / (mean(s) cost); (d,)."""
    return scores / (scores.mean().clamp_min(_tiny(scores)) * about.cost)


def equal(scores: Tensor, about: Standing) -> Tensor:
    """(rank of s_j + 1) / d, ties by index; (d,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    return ranks / len(scores)


def by_sensitivity(scores: Tensor, about: Standing) -> Tensor:
    """s_j / s_k (s_k D / (S cost))^tau; (d,)."""
    assert about.sensitivity is not None
    lowest = scores.sort().values[: max(1, round(about.share * len(scores)))]
    at = lowest[-1].clamp_min(_tiny(scores))
    marginal = at * about.sensitivity / (lowest.sum().clamp_min(_tiny(scores)) * about.cost)
    return scores / at * marginal**TEMPER


def _tiny(scores: Tensor) -> float:
    return torch.finfo(scores.dtype).tiny


ALLOCATIONS: Mapping[str, Allocation] = {
    "global": as_they_are,
    "normalised": normalised,
    "equal": equal,
    "sensitivity": by_sensitivity,
}
