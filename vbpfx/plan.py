"""Plan: from statistics and a budget to the neurons that stay and the constants that stand for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vbpfx.blocks import Analysis
from vbpfx.budget import Budget, Cost, choose_widths, floors, kept_neurons, mac_cost, parameter_cost
from vbpfx.capture import Captured
from vbpfx.compensate import COMPENSATIONS
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.importance import CRITERIA
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
    # The best measured so far: the same, but no block collapses.
    "auto": Method("variance", "mean", min_width=None),
}


def make_plan(
    analysis: Analysis,
    statistics: Statistics,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    method: str = "auto",
    criterion: str | None = None,
    compensation: str | None = None,
    round_to: int = 1,
    min_width: int | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> Plan:
    """Choose the neurons that go and what stands for them. Deterministic; ties are broken by index.

    With one global ranking of all hidden neurons by sample variance (``method="vbp"``, VBP, ICCV 2025):
    the lowest fraction goes, and its means move into the next bias, b2' = b2 + W2[:, P] mu_P.

    Args:
        ratio: fraction of the hidden neurons of the chosen blocks to remove (the paper's p).
        macs, params: fraction of the dense model's MACs / parameters to keep; exactly one of the three.
        method: ``"vbp"``, or ``"auto"``, the best measured default.
        criterion: ``"variance"``, ``"magnitude"`` or ``"random"``, in place of the method's.
        compensation: ``"mean"`` or ``"none"``, in place of the method's.
        round_to: make widths multiples of it.
        min_width: floor of every block; ``"auto"`` keeps a sixteenth of its width, ``"vbp"`` one neuron.
        include, exclude: glob patterns over block names and module paths.

    Raises:
        BudgetError: the budget is missing, ambiguous, out of range or cannot be met.
        AnalysisError: no block, or a pattern that matches none.
        CalibrationError: the statistics lack a block.
    """
    budget = Budget.of(ratio=ratio, macs=macs, params=params)
    recipe = _option("method", method, METHODS)
    criterion, compensation = criterion or recipe.criterion, compensation or recipe.compensation
    score, constants = _option("criterion", criterion, CRITERIA), _option("compensation", compensation, COMPENSATIONS)
    blocks = select_blocks(analysis, include, exclude)
    missing = [block.name for block in blocks if block.name not in statistics.moments]
    if missing:
        raise CalibrationError(f"the statistics lack block {missing[0]}; gather them from this model's prepared graph")
    captured = analysis.captured
    scores = {b.name: score(b, statistics.moments[b.name], captured.reference) for b in blocks}
    floor = floors(blocks, recipe.min_width if min_width is None else min_width)
    widths = choose_widths(
        blocks, scores, budget, floor=floor, round_to=round_to, cost=_cost(budget, analysis.captured, blocks)
    )
    entries = [
        _block_plan(block, kept_neurons(scores[block.name], widths[block.name]), statistics, constants)
        for block in blocks
        if widths[block.name] < block.width
    ]
    settings = {
        "method": method,
        "criterion": criterion,
        "compensation": compensation,
        "budget": {budget.kind: budget.value},
        "round_to": round_to,
        "neurons": sum(block.width for block in blocks),
        "at_floor": [block.name for block in blocks if widths[block.name] == floor[block.name] < block.width],
        "samples": max(m.count for b in blocks for m in statistics.moments[b.name]),
    }
    return Plan(tuple(entries), captured.fingerprint, settings)


def _cost(budget: Budget, captured: Captured, blocks: Sequence[Block]) -> Cost | None:
    if budget.kind == "macs":
        return mac_cost(captured, blocks)
    return parameter_cost(captured.reference, blocks) if budget.kind == "params" else None


def _block_plan(block: Block, kept: tuple[int, ...], statistics: Statistics, constants: Any) -> BlockPlan:
    pruned = torch.tensor(sorted(set(range(block.width)) - set(kept)))
    return BlockPlan(block, kept, tuple(constants(m, pruned) for m in statistics.moments[block.name]))


def _option(name: str, value: str, table: Any) -> Any:
    if value not in table:
        raise BudgetError(f"{name}={value!r} is unknown; choose one of {', '.join(sorted(table))}")
    return table[value]
