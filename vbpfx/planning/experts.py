"""Experts: score the neurons of a stack of experts, and compute what replaces the removed ones, expert by expert.

An expert's statistics are those of the rows that were routed to it, so some experts may have seen few rows or none:

- An expert that saw fewer than two rows is scored by the norms of its weights, and nothing replaces its removed neurons.
- An expert without held-out rows, and with no more than twice as many rows as channels, gets no predictions: a fit to so few rows
  could be worse than none, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vbpfx.calibration.moments import Moments
from vbpfx.planning.compensate import Compensation, none
from vbpfx.plans.records import Block, BlockPlan

# With fewer rows an expert has no variance.
_FEWEST_ROWS = 2
# An unseen expert's scores, relative to the highest score of all others: its neurons cost nothing on the data.
_UNSEEN = 1e-9


def is_unseen(moments: Moments) -> bool:
    """Return whether an expert saw too few rows for statistics."""
    return moments.count < _FEWEST_ROWS


def is_predictable(moments: Moments) -> bool:
    """Return whether an expert saw enough rows to fit predictions to them, as far as covariances were gathered at all."""
    if moments.co is None:
        return False
    return moments.held_out is not None or moments.co.count > 2 * len(moments.mean)


def scores_of_experts(
    block: Block,
    moments: Sequence[Moments],
    score: Callable[[Block, Moments], Tensor],
    by_weights: Callable[[Block, Moments], Tensor],
) -> Tensor:
    """Return one score per neuron of a stack, (d,) float64, expert after expert.

    A score is an error per row of the expert. It counts as often as the expert has rows, relative to the mean over all experts.

    Args:
        block: the stack.
        moments: the moments of every expert.
        score: the scores of one expert, given as a block of its own with its moments.
        by_weights: scores that need no statistics.
    """
    seen = [not is_unseen(m) for m in moments]
    rows = sum(m.count for m in moments) / len(moments)
    found: list[Tensor] = []
    for number, own in enumerate(moments):
        expert = block.expert(number)
        found.append(score(expert, own) * (own.count / rows) if seen[number] else by_weights(expert, own))
    highest = max((float(part.max()) for part, there in zip(found, seen, strict=True) if there), default=1.0) or 1.0
    lowest = torch.finfo(torch.float64).tiny
    scaled = (
        part if there else part / part.max().clamp_min(lowest) * (_UNSEEN * highest)
        for part, there in zip(found, seen, strict=True)
    )
    return torch.cat(list(scaled))


def entry_of_experts(
    block: Block, kept: tuple[int, ...], moments: Sequence[Moments], compensation: Compensation
) -> BlockPlan:
    """Return the plan's entry for a stack of experts.

    Args:
        block: the stack.
        kept: the neurons to keep, equally many of every expert.
        moments: for every expert, :func:`vbpfx.planning.entries.pooled`.
        compensation: what replaces removed neurons.
    """
    alone = all(consumer.alone for consumer in block.consumers)
    gathered = any(m.co is not None or m.held_out is not None for m in moments)
    constants, predictions = [], []
    for own, stays in zip(moments, block.in_groups(kept), strict=True):
        goes = sorted(set(range(block.group_size)) - set(stays))
        replacing = none if is_unseen(own) else compensation
        # without any covariances the compensation itself says what is missing
        predicts = alone and (is_predictable(own) or not gathered)
        a, b = replacing(own, torch.tensor(stays), torch.tensor(goes), predicts)
        constants.append(a)
        predictions.append(b)
    return BlockPlan(block, kept, tuple(constants), tuple(predictions))
