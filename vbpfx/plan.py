"""Plan: from statistics and a budget to the neurons that stay and the constants that stand for the rest."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import TypedDict, Unpack

from vbpfx.blocks import Analysis
from vbpfx.budget import (
    Budget,
    Cost,
    choose_widths,
    floors,
    kept_neurons,
    mac_cost,
    parameter_cost,
    require_positive,
    same_shape,
)
from vbpfx.capture import Captured
from vbpfx.compensate import COMPENSATIONS
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.importance import CRITERIA
from vbpfx.moments import Moments
from vbpfx.prepare import Statistics
from vbpfx.records import Block, BlockPlan, Plan
from vbpfx.select import select_blocks


@dataclass(frozen=True)
class Method:
    """A named combination of criterion and compensation, and the floor it comes with."""

    criterion: str
    compensation: str
    min_width: int | None


METHODS = {
    # Variance-Based Pruning to the letter: raw variance, one global ranking, mean shift, no floor.
    "vbp": Method("variance", "mean", min_width=1),
    # The same ranking, but every block keeps a sixteenth of its width. Nothing measured beats it yet.
    "auto": Method("variance", "mean", min_width=None),
}


class PlanArguments(TypedDict, total=False):
    """The keyword arguments of :func:`make_plan`, which :func:`vbpfx.prune` hands on."""

    ratio: float | None
    macs: float | None
    params: float | None
    method: str
    criterion: str | None
    compensation: str | None
    round_to: int
    min_width: int | None
    uniform: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None


@dataclass(frozen=True)
class PlanOptions:
    """The arguments of :func:`make_plan`, checked."""

    budget: Budget
    method: str
    criterion: str
    compensation: str
    round_to: int
    min_width: int | None
    uniform: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None

    @classmethod
    def of(
        cls,
        *,
        ratio: float | None = None,
        macs: float | None = None,
        params: float | None = None,
        method: str = "auto",
        criterion: str | None = None,
        compensation: str | None = None,
        round_to: int = 1,
        min_width: int | None = None,
        uniform: bool = False,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
    ) -> PlanOptions:
        """Check what can be checked before any data is seen.

        Raises:
            BudgetError: one of them is out of range or unknown.
        """
        budget = Budget.of(ratio=ratio, macs=macs, params=params)
        recipe = METHODS[_known("method", method, METHODS)]
        return cls(
            budget,
            method,
            _known("criterion", recipe.criterion if criterion is None else criterion, CRITERIA),
            _known("compensation", recipe.compensation if compensation is None else compensation, COMPENSATIONS),
            require_positive("round_to", round_to),
            recipe.min_width if min_width is None else require_positive("min_width", min_width),
            bool(uniform),
            include,
            exclude,
        )


def make_plan(analysis: Analysis, statistics: Statistics, **options: Unpack[PlanArguments]) -> Plan:
    """Choose the neurons that go and what stands for them. Deterministic; ties are broken by index.

    With one global ranking of all hidden neurons by sample variance (``method="vbp"``, VBP, ICCV 2025):
    the lowest fraction goes, and its means move into the next bias, b2' = b2 + W2[:, P] mu_P.

    Args:
        analysis, statistics: what :func:`find_blocks` and :func:`statistics` returned.
        ratio: fraction of the hidden neurons of the chosen blocks to remove (the paper's p).
        macs, params: fraction of the dense model's MACs / parameters to keep; exactly one of the three.
        method: ``"vbp"``, or ``"auto"`` (default), the same ranking with a floor.
        criterion: ``"variance"``, ``"magnitude"`` or ``"random"``, in place of the method's.
        compensation: ``"mean"`` or ``"none"``, in place of the method's.
        round_to: make widths multiples of it (default 1).
        min_width: floor of every block; by default ``"auto"`` keeps a sixteenth of its width, ``"vbp"`` one neuron.
        uniform: the same width in every block of the same shape, so that one number in a configuration
            (``intermediate_size``) describes it.
        include, exclude: glob patterns over block names and module paths.

    Raises:
        BudgetError: the budget is missing, ambiguous, out of range or cannot be met.
        AnalysisError: no block, or a pattern that matches none.
        CalibrationError: the statistics are of another model.
    """
    chosen = PlanOptions.of(**options)
    blocks = select_blocks(analysis, chosen.include, chosen.exclude)
    _require_statistics(blocks, statistics)
    captured, score, constants = analysis.captured, CRITERIA[chosen.criterion], COMPENSATIONS[chosen.compensation]
    moments = {block.name: _pooled(block, statistics.moments[block.name]) for block in blocks}
    scores = {b.name: score(b, moments[b.name], captured.reference) for b in blocks}
    floor = floors(blocks, chosen.min_width)
    cost = _cost(chosen.budget, captured, blocks)
    groups = same_shape(blocks, captured.reference) if chosen.uniform else [[block] for block in blocks]
    widths = choose_widths(groups, scores, chosen.budget, floor=floor, round_to=chosen.round_to, cost=cost)
    entries = [
        _block_plan(block, kept_neurons(scores[block.name], widths[block.name]), moments[block.name], constants)
        for block in blocks
        if widths[block.name] < block.width
    ]
    settings = {
        "method": chosen.method,
        "criterion": chosen.criterion,
        "compensation": chosen.compensation,
        "budget": {chosen.budget.kind: chosen.budget.value},
        "round_to": chosen.round_to,
        "uniform": chosen.uniform,
        "neurons": sum(block.width for block in blocks),
        "at_floor": [block.name for block in blocks if widths[block.name] == floor[block.name] < block.width],
        "samples": max(m.count for b in blocks for m in statistics.moments[b.name]),
    }
    return Plan(tuple(entries), captured.fingerprint, captured.frontend, settings)


def _require_statistics(blocks: Sequence[Block], statistics: Statistics) -> None:
    for block in blocks:
        if block.name not in statistics.moments:
            raise CalibrationError(
                f"the statistics lack block {block.name}; gather them from this model's prepared graph"
            )
        found = [tuple(m.mean.shape) for m in statistics.moments[block.name]]
        if found != [(block.width,)] * len(block.sources):
            raise CalibrationError(
                f"block {block.name} has {len(block.sources)} inputs of width {block.width}, the statistics hold {found}; "
                f"gather them from this model's prepared graph"
            )


def _cost(budget: Budget, captured: Captured, blocks: Sequence[Block]) -> Cost | None:
    if budget.kind == "macs":
        return mac_cost(captured, blocks)
    return parameter_cost(captured.reference, blocks) if budget.kind == "params" else None


def _pooled(block: Block, moments: tuple[Moments, ...]) -> tuple[Moments, ...]:
    """Moments per source, those of several calls of one layer merged: their neurons share what stands for them."""
    merged = list(moments)
    for pool in block.pools:
        together = functools.reduce(operator.or_, (moments[index] for index in pool))
        for index in pool:
            merged[index] = together
    return tuple(merged)


def _block_plan(block: Block, kept: tuple[int, ...], moments: tuple[Moments, ...], constants: Any) -> BlockPlan:
    pruned = torch.tensor(sorted(set(range(block.width)) - set(kept)))
    return BlockPlan(block, kept, tuple(constants(m, pruned) for m in moments))


def _known(name: str, value: str, table: Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in table:
        raise BudgetError(f"{name}={value!r} is unknown; choose one of {', '.join(sorted(table))}")
    return value
