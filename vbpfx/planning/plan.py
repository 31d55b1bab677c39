"""Plan: from statistics and a budget to the neurons that stay and the constants that stand for the rest."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.moments import Moments
from vbpfx.calibration.prepare import Statistics, rows_a_sample
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.graph.capture import Captured
from vbpfx.planning.allocation import ALLOCATIONS, Standing, lowest
from vbpfx.planning.budget import (
    Budget,
    Cost,
    choose_widths,
    floors,
    kept_neurons,
    mac_cost,
    parameter_cost,
    same_shape,
)
from vbpfx.planning.compensate import COMPENSATIONS, Compensation
from vbpfx.planning.importance import Scoring, name_of, score
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.multiples import width_steps
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.planning.select import select_blocks
from vbpfx.plans.records import Block, BlockPlan, Plan

# Block -> what the output loses when it alone gives up its share.
Sensitivity = Mapping[str, float]


def make_plan(
    analysis: Analysis,
    statistics: Statistics,
    *,
    sensitivity: Sensitivity | Callable[[Plan], Sensitivity] | None = None,
    latencies: Latencies | None = None,
    **options: Unpack[PlanArguments],
) -> Plan:
    """Choose the neurons that go and what stands for them. Deterministic; ties are broken by index.

    With one global ranking of all hidden neurons by sample variance (``method="vbp"``, VBP, ICCV 2025, arXiv 2507.12988):
    the lowest fraction goes, and its means move into the next bias, b2' = b2 + W2[:, P] mu_P. ``"auto"`` goes by
    greedy OBS and predicts what goes from what stays; it takes more of blocks whose loss the output hardly feels, where
    ``sensitivity`` says which, otherwise the same share of every block (:mod:`vbpfx.planning.importance`, :mod:`vbpfx.planning.allocation`,
    :mod:`vbpfx.planning.compensate`).

    Args:
        analysis, statistics: what :func:`find_blocks` and :func:`statistics` returned.
        ratio: fraction of the hidden neurons of the chosen blocks to remove (the paper's p).
        macs, params, latency: fraction of the dense model's MACs / parameters / latency to keep; exactly one of the four.
        method: ``"vbp"``, or ``"auto"`` (default).
        criterion: in place of the method's: a name of :data:`vbpfx.planning.importance.CRITERIA`, or a function from
            :class:`vbpfx.planning.importance.Scoring` to one score per neuron (the lowest go).
        allocation: in place of the method's: ``"global"``, ``"normalised"``, ``"equal"`` or ``"sensitivity"``.
        sensitivity: block -> what the output loses when it alone gives up its share (:func:`vbpfx.sensitivities`), which
            ``allocation="sensitivity"`` compares blocks by; or a function that measures it on a plan. It is given one of equal
            shares, and where this moves the output by nothing for some blocks, one in which these keep no more than their
            floors: a block that moves nothing even so is free, and gives up what it may before any other gives. One block alone
            compares with none, and is not measured.
        latencies: what blocks cost in a runtime (:func:`vbpfx.measure_latencies`), which ``latency=`` needs.
        compensation: in place of the method's: ``"ridge"``, ``"mean"`` or ``"none"``.
        round_to: make widths multiples of it. By default ``"auto"`` keeps those of convolutions at multiples of 8 (of 4 where they have
            5 to 8 channels, and of less where the budget would not be met so), where runtimes are fast at them, and
            rounds nothing else; ``"vbp"`` rounds nothing.
        min_width: floor of every block; by default ``"auto"`` keeps a sixteenth of its width, ``"vbp"`` one neuron.
        uniform: the same width in every block of the same shape, so that one number in a configuration
            (``intermediate_size``) describes it.
        include, exclude: glob patterns over block names and module paths.

    Raises:
        BudgetError: the budget is missing, ambiguous, out of range or cannot be met; a sensitivity is not a finite number.
        AnalysisError: no block, or a pattern that matches none.
        CalibrationError: the statistics are of another model; or the weights of a block are not finite, so that its neurons
            cannot be ranked.
    """
    chosen = PlanOptions.of(**options)
    deciding = Deciding(analysis, chosen, latencies)
    blocks = deciding.blocks
    _require_statistics(blocks, statistics)
    moments = {block.name: pooled(block, statistics.moments[block.name]) for block in blocks}
    samples = deciding.samples(blocks[0], statistics.moments[blocks[0].name])
    scores = {b.name: deciding.scores(b, moments[b.name], samples) for b in blocks}

    def plan(kept: Mapping[str, tuple[int, ...]], allocation: str) -> Plan:
        entries = [deciding.entry(b, kept[b.name], moments[b.name]) for b in blocks if len(kept[b.name]) < b.width]
        rows = max(m.count for b in blocks for m in statistics.moments[b.name])
        return deciding.plan(entries, allocation, rows)

    rates: dict[str, float] = {}
    if chosen.allocation == "sensitivity" and callable(sensitivity) and len(blocks) > 1:  # one compares with none
        equal = deciding.at_share(scores)
        rates = deciding.rates(scores, _of_all(blocks, sensitivity(plan(equal, "equal"))))
        unmoved = [name for name, rate in rates.items() if rate == 0 and len(equal[name]) > deciding.floor[name]]
        if unmoved:  # what its share says nothing about: whether the block does anything at all
            least = deciding.at_floor(scores, unmoved)
            rates |= deciding.rates(scores, sensitivity(plan(least, "equal")), at_floor=True)
    elif sensitivity and not callable(sensitivity):
        rates = deciding.rates(scores, _of_all(blocks, sensitivity))
    allocation = deciding.allocation(rates)
    return plan(deciding.kept(scores, allocation, rates), allocation)


class Deciding:
    """The steps of :func:`make_plan`, of which some see one block alone.

    Attributes:
        blocks: those that the plan may touch.
        floor: block -> its smallest width.
    """

    def __init__(self, analysis: Analysis, chosen: PlanOptions, latencies: Latencies | None = None) -> None:
        self.blocks = select_blocks(analysis, chosen.include, chosen.exclude)
        self._chosen, self._captured = chosen, analysis.captured
        self._cost = _cost(chosen.budget, self._captured, self.blocks, latencies)
        by_ratio = chosen.budget.kind == "ratio"
        self._share = chosen.budget.value if by_ratio else _neurons_that_cost(chosen.budget, self.blocks, self._cost)
        self._prices = _prices(self.blocks, self._cost)
        self.floor = floors(self.blocks, chosen.min_width)
        self._steps = width_steps(self._captured, self.blocks, chosen.budget, self.floor, chosen.round_to)

    def samples(self, block: Block, moments: Sequence[Moments]) -> int:
        """Number of samples that a block's statistics are of."""
        return max(1, moments[0].count // rows_a_sample(self._captured, block.sources[0]))

    def scores(self, block: Block, moments: tuple[Moments, ...], samples: int) -> Tensor:
        """One score per neuron; ``moments`` are :func:`pooled`."""
        return score(self._chosen.criterion, Scoring(block, moments, self._captured.reference, self._share, samples))

    def rates(
        self, scores: Mapping[str, Tensor], sensitivity: Sensitivity, *, at_floor: bool = False
    ) -> dict[str, float]:
        """Block -> D / S (:class:`vbpfx.planning.allocation.Standing`), of those whose D is known.

        Args:
            sensitivity: D, at the share of all neurons that will go; or, ``at_floor``, where the blocks keep no more than
                their floors.

        Raises:
            BudgetError: a sensitivity is negative, or not finite.
        """
        found = {}
        for block in self.blocks:
            if block.name in sensitivity:
                d = float(sensitivity[block.name])
                if not 0 <= d < math.inf:
                    raise BudgetError(
                        f"the sensitivity of block {block.name} is {d}; it must be a finite number of 0 or more: what the output "
                        f"loses when this block alone gives up its share"
                    )
                left = self.floor[block.name] if at_floor else self._at_share(block)
                found[block.name] = d / lowest(scores[block.name], block.width - left)[1]
        return found

    def allocation(self, rates: Mapping[str, float]) -> str:
        """How blocks share what goes: one alone compares with none; by sensitivity only where :meth:`rates` are known.

        Raises:
            BudgetError: ``allocation="sensitivity"`` was asked for, and no block's is known.
        """
        chosen = self._chosen
        if len(self.blocks) == 1 and not rates:
            return "equal"
        if chosen.allocation != "sensitivity" or rates:
            return chosen.allocation
        if chosen.own_allocation:
            return "equal"
        raise BudgetError(
            "allocation='sensitivity' needs that of the blocks: pass sensitivity=vbpfx.sensitivities(analysis, plan, batches), "
            "with a plan of equal shares"
        )

    def at_share(self, scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Block -> the neurons that stay where each gives up the share of all that will go, whatever widths are rounded to.

        Blocks are measured at that, and not at a plan that meets the budget: where such a plan ends between two blocks, or in
        steps of ``round_to``, one of two equal blocks gives up more.
        """
        return {block.name: kept_neurons(scores[block.name], self._at_share(block)) for block in self.blocks}

    def _at_share(self, block: Block) -> int:
        return max(self.floor[block.name], block.width - max(1, round(self._share * block.width)))

    def at_floor(self, scores: Mapping[str, Tensor], narrowed: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Block -> the neurons that stay where the named blocks keep as few as they may, and the others all."""
        widths = {b.name: self.floor[b.name] if b.name in narrowed else b.width for b in self.blocks}
        return {name: kept_neurons(scores[name], width) for name, width in widths.items()}

    def kept(
        self, scores: Mapping[str, Tensor], allocation: str, rates: Mapping[str, float]
    ) -> dict[str, tuple[int, ...]]:
        """Block -> the neurons that stay, from the scores of all blocks, and their :meth:`rates` where the allocation takes these."""
        chosen, blocks = self._chosen, self.blocks
        groups = same_shape(blocks, self._captured.reference) if chosen.uniform else [[block] for block in blocks]
        standing = {b.name: Standing(self._prices[b.name], self._share, rates.get(b.name)) for b in blocks}
        compared = {b.name: ALLOCATIONS[allocation](scores[b.name], standing[b.name]) for b in blocks}
        widths = choose_widths(groups, compared, chosen.budget, floor=self.floor, steps=self._steps, cost=self._cost)
        return {block.name: kept_neurons(scores[block.name], widths[block.name]) for block in blocks}

    def entry(self, block: Block, kept: tuple[int, ...], moments: tuple[Moments, ...]) -> BlockPlan:
        """What becomes of a block of which so many neurons stay; ``moments`` are :func:`pooled`."""
        return _block_plan(block, kept, moments, COMPENSATIONS[self._chosen.compensation])

    def plan(self, entries: Sequence[BlockPlan], allocation: str, rows: int) -> Plan:
        """The plan with those entries; ``rows`` is the largest number of rows that statistics are of."""
        chosen = self._chosen
        widths = {entry.block.name: len(entry.kept) for entry in entries}
        settings = {
            "method": chosen.method,
            "criterion": chosen.criterion if isinstance(chosen.criterion, str) else name_of(chosen.criterion),
            "allocation": allocation,
            "compensation": chosen.compensation,
            "budget": {chosen.budget.kind: chosen.budget.value},
            "round_to": chosen.round_to,
            "uniform": chosen.uniform,
            "neurons": sum(block.width for block in self.blocks),
            "at_floor": [b.name for b in self.blocks if widths.get(b.name, b.width) == self.floor[b.name] < b.width],
            "samples": rows,
        }
        return Plan(tuple(entries), self._captured.fingerprint, self._captured.frontend, settings)


def _of_all(blocks: Sequence[Block], sensitivity: Sensitivity) -> dict[str, float]:
    """Block -> sensitivity; their mean for blocks that a plan of equal shares left whole."""
    given = {b.name: sensitivity[b.name] for b in blocks if b.name in sensitivity}
    mean = sum(given.values()) / max(1, len(given))
    return {b.name: given.get(b.name, mean) for b in blocks} if given else {}


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


def _cost(budget: Budget, captured: Captured, blocks: Sequence[Block], latencies: Latencies | None) -> Cost | None:
    if budget.kind == "latency":
        if latencies is None:
            raise BudgetError(
                "latency= needs what the blocks cost in a runtime: pass latencies=vbpfx.measure_latencies(analysis, target)"
            )
        latencies.require(blocks)
        return latencies.cost
    if budget.kind == "macs":
        return mac_cost(captured, blocks)
    return parameter_cost(captured.reference, blocks) if budget.kind == "params" else None


def pooled(block: Block, moments: tuple[Moments, ...]) -> tuple[Moments, ...]:
    """Moments per source, those of several calls of one layer merged: their neurons share what stands for them."""
    merged = list(moments)
    for pool in block.pools:
        together = functools.reduce(operator.or_, (moments[index] for index in pool))
        for index in pool:
            merged[index] = together
    return tuple(merged)


def _prices(blocks: Sequence[Block], cost: Cost | None) -> dict[str, float]:
    """Block -> what one of its neurons costs under the budget; 1 where the budget is neurons."""
    if cost is None:
        return {block.name: 1.0 for block in blocks}
    full = {block.name: block.width for block in blocks}
    dense = cost(full)
    halved = {b.name: cost(full | {b.name: b.width // 2}) for b in blocks}
    return {b.name: max(1.0, (dense - halved[b.name]) / (b.width - b.width // 2)) for b in blocks}


def _neurons_that_cost(budget: Budget, blocks: Sequence[Block], cost: Cost | None) -> float:
    """About which share of the neurons has to go for a budget of MACs or parameters, each block giving the same share."""
    assert cost is not None
    full, half = ({b.name: max(1, int(b.width * share)) for b in blocks} for share in (1.0, 0.5))
    return min(1.0, 0.5 * (1 - budget.value) * cost(full) / max(1, cost(full) - cost(half)))


def _block_plan(
    block: Block, kept: tuple[int, ...], moments: tuple[Moments, ...], compensation: Compensation
) -> BlockPlan:
    stays = torch.tensor(kept)
    goes = torch.tensor(sorted(set(range(block.width)) - set(kept)))
    once: dict[
        tuple[int, bool], tuple[Tensor, Tensor | None]
    ] = {}  # pooled moments are one object, and so is what stands for them
    found = []
    for m, source in zip(moments, block.sources, strict=True):
        key = (id(m), block.takes_prediction(source))
        if key not in once:
            once[key] = compensation(m, stays, goes, key[1])
        found.append(once[key])
    return BlockPlan(block, kept, tuple(a for a, _ in found), tuple(b for _, b in found))
