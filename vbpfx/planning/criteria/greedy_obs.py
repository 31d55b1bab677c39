"""The criterion ``"greedy_obs"``: like ``"obs"``, but neurons are removed one by one, with a new fit each time.

:mod:`vbpfx.planning.elimination` computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.planning.elimination import elimination_costs
from vbpfx.planning.importance import Scoring

NEEDS_COVARIANCE = True


def greedy_obs(about: Scoring) -> Tensor:
    """Return, for each neuron, the error in the consumers' outputs when its turn to be removed comes; (d,) float64.

    In the order of removal, the scores never decrease.
    """
    order, costs = elimination_costs([(m.all_co.covariance.cpu(), weight) for m, weight in about.inputs])
    scores = torch.full((about.block.width,), torch.inf, dtype=torch.float64)
    # a neuron may cost less than one that was removed before it; the running maximum keeps the order
    scores[order] = costs.cummax(0).values
    return scores.clamp_max(2 * float(costs.max()) if len(costs) else 1.0)  # the one neuron that is never removed
