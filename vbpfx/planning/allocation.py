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

Every result is finite, whatever the scores are. Scores of which some are negative (a criterion of one's own) are counted from
the lowest one, where they are divided by each other. A block that costs the output nothing, D = 0, gives before all others; of
several such blocks each gives the same share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# tau
TEMPER = 0.25
# Of scores relative to the block's highest: what is below counts as a part of this, so that quotients stay finite.
_LEAST = 1e-30


@dataclass(frozen=True)
class Standing:
    """What is known of a block beside its scores.

    Attributes:
        cost: of one neuron, under the budget.
        share: which share of all neurons will go, as far as it is known.
        rate: D / S, with scores relative to the block's highest (:func:`lowest`); None where D was not measured.
    """

    cost: float
    share: float
    rate: float | None = None


Allocation = Callable[[Tensor, Standing], Tensor]


def as_they_are(scores: Tensor, about: Standing) -> Tensor:
    """s_j; (d,)."""
    return scores


def normalised(scores: Tensor, about: Standing) -> Tensor:
    """s_j / (mean(s) cost); (d,)."""
    relative = _relative(scores)
    return relative / (relative.mean().clamp_min(_LEAST) * about.cost)


def equal(scores: Tensor, about: Standing) -> Tensor:
    """(rank of s_j + 1) / d, ties by index; (d,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    return ranks / len(scores)


def by_sensitivity(scores: Tensor, about: Standing) -> Tensor:
    """s_j / s_k (s_k D / (S cost))^tau; (d,)."""
    assert about.rate is not None
    at, _ = lowest(scores, round(about.share * len(scores)))
    marginal = max(at * about.rate / about.cost, torch.finfo(torch.float64).tiny)
    weight: float = marginal**TEMPER
    return _above_zero(scores) / at * weight


def lowest(scores: Tensor, count: int) -> tuple[float, float]:
    """s_k and S, the k-th lowest score and the sum of the k lowest, relative to the highest; k is ``count``, at least 1."""
    few = _above_zero(scores).sort().values[: max(1, count)]
    return float(few[-1]), float(few.sum())


def _above_zero(scores: Tensor) -> Tensor:
    """Relative scores that are never zero: those that are alike to nothing go by their rank, so that shares are equal there."""
    return _relative(scores) + _LEAST * equal(scores, Standing(1.0, 0.0))


def _relative(scores: Tensor) -> Tensor:
    """Scores over the highest one; zeros where all are zero. Where some are negative they are counted from the lowest."""
    halves = scores / 2  # so that the difference of two of them stays in range
    above = halves - halves.min().clamp_max(0.0)
    return above / above.max().clamp_min(torch.finfo(scores.dtype).tiny)


ALLOCATIONS: Mapping[str, Allocation] = {
    "global": as_they_are,
    "normalised": normalised,
    "equal": equal,
    "sensitivity": by_sensitivity,
}
