"""Allocation: make the scores of different blocks comparable, so that one ranking can cover all neurons.

A score is an error within one block. The effect of such an error on the network's output differs from block to block.

- ``"global"``: the scores as they are, regardless of a neuron's cost (VBP).
- ``"normalised"``: the scores divided by the block's mean score.
- ``"equal"``: the rank within the block, as a fraction of its width. Every block gives up the same share.
- ``"sensitivity"``: the scores weighted by what the output loses, as measured (:mod:`vbpfx.measurement.sensitivity`).
  Let D be the output's error when this block alone gives up its share p, and S the sum of the scores of those k = p d
  neurons. Then removing neuron j costs the output about s_j D / S. At the equal share this is m = s_k D / S. The score

      s_j / s_k * m^tau

  gives equal shares for tau = 0 and equal marginal costs for tau = 1. We use tau = 1/4: D is measured on few samples
  and block by block, so it does not show that later blocks can make up for the losses of earlier ones.

If the budget is MACs, parameters or latency, normalised scores and m are divided by the cost of one neuron of the
block, so that the ranking is by loss per unit saved. Equal shares stay equal.

Every result is finite, whatever the scores are. If some scores are negative (a user's own criterion may return such),
all are taken relative to the lowest one wherever they are divided. A block with D = 0, which costs the output nothing,
gives up neurons before all others. If there are several such blocks, each gives up the same share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# tau
TEMPER = 0.25
# The smallest score that is distinguished from zero, relative to the block's highest; it keeps quotients finite.
_LEAST = 1e-30


@dataclass(frozen=True)
class Standing:
    """What an allocation knows about a block besides its scores.

    Attributes:
        cost: the cost of one neuron in the unit of the budget.
        share: the share of all neurons that will be removed, as far as it is known.
        rate: D / S, with scores relative to the block's highest (:func:`lowest`); None if D was not measured.
    """

    cost: float
    share: float
    rate: float | None = None


Allocation = Callable[[Tensor, Standing], Tensor]


def as_they_are(scores: Tensor, about: Standing) -> Tensor:
    """Return s_j; (d,)."""
    return scores


def normalised(scores: Tensor, about: Standing) -> Tensor:
    """Return s_j / (mean(s) cost); (d,)."""
    relative = _relative(scores)
    return relative / (relative.mean().clamp_min(_LEAST) * about.cost)


def equal(scores: Tensor, about: Standing) -> Tensor:
    """Return (rank of s_j + 1) / d, with ties broken by index; (d,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    return ranks / len(scores)


def by_sensitivity(scores: Tensor, about: Standing) -> Tensor:
    """Return s_j / s_k (s_k D / (S cost))^tau; (d,)."""
    assert about.rate is not None
    at, _ = lowest(scores, round(about.share * len(scores)))
    marginal = max(at * about.rate / about.cost, torch.finfo(torch.float64).tiny)
    weight: float = marginal**TEMPER
    return _above_zero(scores) / at * weight


def lowest(scores: Tensor, count: int) -> tuple[float, float]:
    """Return s_k and S: the k-th lowest score and the sum of the k lowest, relative to the highest score.

    k is ``count``, but at least 1.
    """
    few = _above_zero(scores).sort().values[: max(1, count)]
    return float(few[-1]), float(few.sum())


def _above_zero(scores: Tensor) -> Tensor:
    """Return relative scores that are never zero.

    Scores that are all (nearly) zero are ranked by their order, so that equal shares are removed there.
    """
    return _relative(scores) + _LEAST * equal(scores, Standing(1.0, 0.0))


def _relative(scores: Tensor) -> Tensor:
    """Return the scores divided by the highest one; zeros if all are zero.

    If some are negative, the lowest one is subtracted from all first.
    """
    halves = scores / 2  # so that the difference of two scores does not overflow
    above = halves - halves.min().clamp_max(0.0)
    return above / above.max().clamp_min(torch.finfo(scores.dtype).tiny)


ALLOCATIONS: Mapping[str, Allocation] = {
    "global": as_they_are,
    "normalised": normalised,
    "equal": equal,
    "sensitivity": by_sensitivity,
}
