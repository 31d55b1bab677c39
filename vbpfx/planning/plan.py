"""Plan: choose the neurons to keep from statistics and a budget, and compute what replaces the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.moments import Moments
from vbpfx.calibration.prepare import Statistics, rows_a_sample
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.graph.capture import Captured
from vbpfx.planning.allocation import ALLOCATIONS, Standing, lowest
from vbpfx.planning.bases import find_basis, in_basis
from vbpfx.planning.budget import (
    Budget,
    Cost,
    choose_widths,
    kept_neurons,
    same_shape,
)
from vbpfx.planning.compensate import COMPENSATIONS
from vbpfx.planning.entries import block_plan, pooled
from vbpfx.planning.experts import is_predictable, is_unseen, scores_of_experts
from vbpfx.planning.importance import Criterion, Scoring
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.multiples import cost_of, fitting_floors, least_step, width_steps
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.planning.products import products_score
from vbpfx.planning.scores import name_of, score
from vbpfx.planning.select import select_blocks
from vbpfx.plans.records import COMBINED, Basis, Block, BlockPlan, Plan

# Block -> the loss of the network's output when this block alone gives up its share of neurons.
Sensitivity = Mapping[str, float]


def make_plan(
    analysis: Analysis,
    statistics: Statistics,
    *,
    sensitivity: Sensitivity | Callable[[Plan], Sensitivity] | None = None,
    latencies: Latencies | None = None,
    **options: Unpack[PlanArguments],
) -> Plan:
    """Choose the neurons to remove and what replaces them. The result is deterministic; ties are broken by index.

    ``method="vbp"`` (VBP, ICCV 2025, arXiv 2507.12988) ranks all hidden neurons by their sample variance. It removes
    the lowest fraction, and moves their means into the next bias, b2' = b2 + W2[:, P] mu_P. ``"auto"`` ranks neurons by
    greedy OBS, and predicts the removed neurons from the kept ones. With ``sensitivity`` it removes more from blocks
    whose loss hardly affects the output; otherwise it removes the same share from every block. See
    :mod:`vbpfx.planning.importance`, :mod:`vbpfx.planning.allocation` and :mod:`vbpfx.planning.compensate`.

    Args:
        analysis, statistics: what :func:`find_blocks` and :func:`statistics` returned.
        ratio: fraction of the hidden neurons of the chosen blocks to remove (the paper's p); or a fraction for every kind of
            blocks, such as ``{"mlp": 0.25, "query": 0.6, "value": 0.1}``, in place of ``kinds``.
        macs, params, latency: fraction of the dense model's MACs / parameters / latency to keep. Exactly one of these
            three or ``ratio`` must be given.
        method: ``"vbp"``, or ``"auto"`` (default).
        criterion: replaces the method's criterion: a name in :data:`vbpfx.planning.scores.CRITERIA`, or a function
            from :class:`vbpfx.planning.importance.Scoring` to one score per neuron (the lowest are removed).
        allocation: replaces the method's allocation: ``"global"``, ``"normalised"``, ``"equal"`` or ``"sensitivity"``.
        sensitivity: block -> the loss of the output when this block alone gives up its share
            (:func:`vbpfx.sensitivities`), which ``allocation="sensitivity"`` needs; or a function that measures this
            for a plan. The function is called with a plan of equal shares. If some blocks do not change the output
            then, it is called again with a plan in which these blocks keep only their floors. A block that does not
            change the output even then costs nothing, and gives up its neurons before all others. A model with one
            block needs no comparison, and is not measured.
        latencies: the latencies of the blocks in a runtime (:func:`vbpfx.measure_latencies`), which ``latency=`` needs.
        compensation: replaces the method's compensation: ``"ridge"``, ``"mean"`` or ``"none"``.
        round_to: make widths multiples of this number, and of the number of groups where an axis is in groups (of grouped
            convolutions, experts, heads). By default ``"auto"`` makes the widths of convolutions multiples of 8, at which runtimes are fast (of 4 for 5 to 8 channels, and of less if the budget could not be met), and the
            widths of groups of grouped convolutions multiples of 16. It rounds nothing else; ``"vbp"`` rounds nothing.
        min_width: smallest width of every block; by default a sixteenth of its width with ``"auto"``, one neuron with
            ``"vbp"``. A block that a padded convolution reads keeps at least two channels (of each group), so that a constant
            channel has a place beside a neuron, unless the budget cannot be met then.
        uniform: give all blocks of the same shape the same width, so that one number in a configuration
            (``intermediate_size``) describes it.
        include, exclude: glob patterns over block names and module paths.
        kinds: the kinds of blocks to narrow: ``"mlp"`` for hidden neurons (default), ``"value"`` for the channels of
            attention's values in each head, ``"query"`` for those of its queries and keys; or several of them.

    Raises:
        BudgetError: the budget is missing, ambiguous, out of range or cannot be met; a sensitivity is not a finite number.
        AnalysisError: there is no block, or a pattern matches none.
        CalibrationError: the statistics are of another model; or the weights of a block are not finite, so that its neurons
            cannot be ranked.
    """
    chosen = PlanOptions.of(**options)
    deciding = Deciding(analysis, chosen, latencies)
    blocks = deciding.blocks
    _require_statistics(blocks, statistics)
    moments = {block.name: pooled(block, statistics.moments[block.name]) for block in blocks}
    samples = deciding.samples(blocks[0], statistics.moments[blocks[0].name])
    bases: dict[str, Basis] = {}
    scores: dict[str, Tensor] = {}
    for b in blocks:
        if deciding.combines(b):
            bases[b.name], scores[b.name] = find_basis(b, moments[b.name], analysis.captured.reference)
            moments[b.name] = in_basis(b, moments[b.name], bases[b.name])
        else:
            scores[b.name] = deciding.scores(b, moments[b.name], samples)

    def plan(kept: Mapping[str, tuple[int, ...]], allocation: str) -> Plan:
        entries = [
            replace(deciding.entry(b, kept[b.name], scores[b.name], moments[b.name]), basis=bases.get(b.name))
            for b in blocks
            if len(kept[b.name]) < b.width
        ]
        rows = max(m.count for b in blocks for m in statistics.moments[b.name])
        return deciding.plan(entries, allocation, rows)

    rates: dict[str, float] = {}
    if chosen.allocation == "sensitivity" and callable(sensitivity) and len(blocks) > 1:  # a single block needs none
        equal = deciding.at_share(scores)
        rates = deciding.rates(scores, _of_all(blocks, sensitivity(plan(equal, "equal"))))
        unmoved = [name for name, rate in rates.items() if rate == 0 and len(equal[name]) > deciding.floor[name]]
        if unmoved:  # measure again with as few neurons as possible, to see whether these blocks do anything at all
            least = deciding.at_floor(scores, unmoved)
            rates |= deciding.rates(scores, sensitivity(plan(least, "equal")), at_floor=True)
    elif sensitivity and not callable(sensitivity):
        rates = deciding.rates(scores, _of_all(blocks, sensitivity))
    allocation = deciding.allocation(rates)
    return plan(deciding.kept(scores, allocation, rates), allocation)


class Deciding:
    """The steps of :func:`make_plan`, some of which need to see one block only.

    Attributes:
        blocks: the blocks that the plan may narrow.
        floor: block -> its smallest width.
    """

    def __init__(self, analysis: Analysis, chosen: PlanOptions, latencies: Latencies | None = None) -> None:
        self.blocks = select_blocks(analysis, chosen.include, chosen.exclude, chosen.kinds)
        self._chosen, self._captured = chosen, analysis.captured
        self._cost = _cost(chosen.budget, self._captured, self.blocks, latencies)
        by_ratio = chosen.budget.kind == "ratio"
        self._share = chosen.budget.value if by_ratio else _neurons_that_cost(chosen.budget, self.blocks, self._cost)
        self._experts: dict[str, dict[str, int]] = {}
        self._prices = _prices(self.blocks, self._cost)
        constants = chosen.compensation != "none"
        self.floor = fitting_floors(self._captured, self.blocks, chosen.budget, chosen.min_width, constants=constants)
        self._steps = width_steps(self._captured, self.blocks, chosen.budget, self.floor, chosen.round_to)

    def combines(self, block: Block) -> bool:
        """Return whether channels of a block are replaced by linear combinations: those of attention are, where it is possible."""
        return block.linear and block.kind in COMBINED and self._chosen.combines

    def samples(self, block: Block, moments: Sequence[Moments]) -> int:
        """Return the number of samples in a block's statistics."""
        rows = sum(m.count for m in moments) if block.has_experts else moments[0].count
        return max(1, rows // rows_a_sample(self._captured, block.sources[0], block.groups))

    def scores(self, block: Block, moments: tuple[Moments, ...], samples: int) -> Tensor:
        """Return one score per neuron; ``moments`` must be :func:`pooled`. The criterion is for blocks that layers read."""
        if block.factors:
            return products_score(block, moments)

        def by(criterion: str | Criterion, own: Block, of: tuple[Moments, ...]) -> Tensor:
            return score(criterion, Scoring(own, of, self._captured.reference, self._share_of(block), samples))

        if not block.has_experts:
            return by(self._chosen.criterion, block, moments)
        return scores_of_experts(
            block,
            moments,
            lambda expert, own: by(self._chosen.criterion, expert, (own,)),
            lambda expert, own: by("magnitude", expert, (own,)),
        )

    def rates(
        self, scores: Mapping[str, Tensor], sensitivity: Sensitivity, *, at_floor: bool = False
    ) -> dict[str, float]:
        """Return D / S (:class:`vbpfx.planning.allocation.Standing`) for every block whose D is known.

        Args:
            scores: block -> one score per neuron.
            sensitivity: block -> D, measured where the block gives up its share of the neurons.
            at_floor: D was measured where the block keeps no more than its floor.

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
        """Return the name of the allocation to use.

        It is ``"equal"`` for a single block, and where ``method="auto"`` would use sensitivities but no :meth:`rates`
        are known.

        Raises:
            BudgetError: ``allocation="sensitivity"`` was asked for, but no block's sensitivity is known.
        """
        chosen = self._chosen
        if len(self.blocks) == 1 and not rates:
            return "equal"
        if chosen.allocation != "sensitivity" or rates:
            return chosen.allocation
        if chosen.own_allocation:
            return "equal"
        raise BudgetError(
            "allocation='sensitivity' needs the sensitivities of the blocks: pass sensitivity=vbpfx.sensitivities(analysis, plan, batches), "
            "with a plan of equal shares"
        )

    def at_share(self, scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Return, for every block, the neurons to keep if all blocks give up the same share, without rounding to steps.

        Sensitivities are measured at these widths, and not at a plan that meets the budget. In such a plan one of two
        equal blocks may give up more than the other, because of ``round_to`` or because the last neuron must come from
        one of them.
        """
        return {block.name: _highest(block, scores, self._at_share(block)) for block in self.blocks}

    def _share_of(self, block: Block) -> float:
        """Return the share of a block's neurons to remove, as far as it is known."""
        return self._chosen.budget.shares.get(block.kind, self._share)

    def _at_share(self, block: Block) -> int:
        step = least_step(block, self._captured)
        removed = max(1, round(self._share_of(block) * block.width / step)) * step
        return max(self.floor[block.name], block.width - removed)

    def at_floor(self, scores: Mapping[str, Tensor], narrowed: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Return, for every block, the neurons to keep if the named blocks are at their floors and the others whole."""
        widths = {b.name: self.floor[b.name] if b.name in narrowed else b.width for b in self.blocks}
        return {b.name: _highest(b, scores, widths[b.name]) for b in self.blocks}

    def kept(
        self, scores: Mapping[str, Tensor], allocation: str, rates: Mapping[str, float]
    ) -> dict[str, tuple[int, ...]]:
        """Return, for every block, the neurons to keep under the budget.

        Args:
            scores: block -> one score per neuron.
            allocation: name of the allocation.
            rates: block -> D / S (:meth:`rates`), for ``"sensitivity"``.
        """
        chosen, widths = self._chosen, dict[str, int]()
        for kinds, budget in chosen.budget.apart():
            blocks = [block for block in self.blocks if block.kind in kinds]
            groups = same_shape(blocks, self._captured.reference) if chosen.uniform else [[block] for block in blocks]
            standing = {b.name: Standing(self._prices[b.name], self._share_of(b), rates.get(b.name)) for b in blocks}
            compared = {b.name: ALLOCATIONS[allocation](scores[b.name], standing[b.name]) for b in blocks}
            if blocks:
                widths |= choose_widths(groups, compared, budget, floor=self.floor, steps=self._steps, cost=self._cost)
        return {block.name: _highest(block, scores, widths[block.name]) for block in self.blocks}

    def entry(self, block: Block, kept: tuple[int, ...], scores: Tensor, moments: tuple[Moments, ...]) -> BlockPlan:
        """Return the plan's entry for a block (:func:`vbpfx.planning.entries.block_plan`); ``moments`` must be :func:`pooled`."""
        compensation = COMPENSATIONS[self._chosen.compensation]
        if block.has_experts:
            unseen = sum(map(is_unseen, moments))
            fitting = self._chosen.compensation == "ridge"
            few = sum(not is_unseen(m) and not is_predictable(m) for m in moments) if fitting else 0
            self._experts[block.name] = {"experts": block.groups, "unseen": unseen, "few_rows": few}
        return block_plan(block, kept, scores, moments, compensation, self._captured.reference)

    def plan(self, entries: Sequence[BlockPlan], allocation: str, rows: int) -> Plan:
        """Return the plan with these entries; ``rows`` is the largest number of rows in any statistics."""
        chosen = self._chosen
        widths = {entry.block.name: entry.width for entry in entries}
        settings: dict[str, Any] = {
            "method": chosen.method,
            "criterion": chosen.criterion if isinstance(chosen.criterion, str) else name_of(chosen.criterion),
            "allocation": allocation,
            "compensation": chosen.compensation,
            "budget": {chosen.budget.kind: chosen.budget.stated},
            "round_to": chosen.round_to,
            "uniform": chosen.uniform,
            "kinds": list(chosen.kinds),
            "neurons": sum(block.width for block in self.blocks),
            "at_floor": [b.name for b in self.blocks if widths.get(b.name, b.width) == self.floor[b.name] < b.width],
            "samples": rows,
        }
        lacking = {name: found for name, found in self._experts.items() if found["unseen"] or found["few_rows"]}
        if lacking:
            settings["experts"] = lacking
        return Plan(tuple(entries), self._captured.fingerprint, self._captured.frontend, settings)


def _highest(block: Block, scores: Mapping[str, Tensor], width: int) -> tuple[int, ...]:
    return kept_neurons(scores[block.name], width, block.groups)


def _of_all(blocks: Sequence[Block], sensitivity: Sensitivity) -> dict[str, float]:
    """Return a sensitivity for every block; blocks that were not narrowed, and so not measured, get the mean."""
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
        if found != [(width,) for width in block.measured]:
            raise CalibrationError(
                f"block {block.name} has inputs of the widths {list(block.measured)}, the statistics hold {found}; "
                f"gather them from this model's prepared graph"
            )


def _cost(budget: Budget, captured: Captured, blocks: Sequence[Block], latencies: Latencies | None) -> Cost | None:
    if budget.kind == "latency":
        if latencies is None:
            raise BudgetError(
                "latency= needs the latencies of the blocks in a runtime: pass latencies=vbpfx.measure_latencies(analysis, target)"
            )
        latencies.require(blocks)
        return latencies.cost
    return cost_of(captured, blocks, budget)


def _prices(blocks: Sequence[Block], cost: Cost | None) -> dict[str, float]:
    """Return, for every block, the cost of one neuron in the unit of the budget; 1 for a ratio of neurons."""
    if cost is None:
        return {block.name: 1.0 for block in blocks}
    full = {block.name: block.width for block in blocks}
    dense = cost(full)
    halved = {b.name: cost(full | {b.name: b.width // 2}) for b in blocks}
    return {b.name: max(1.0, (dense - halved[b.name]) / (b.width - b.width // 2)) for b in blocks}


def _neurons_that_cost(budget: Budget, blocks: Sequence[Block], cost: Cost | None) -> float:
    """Estimate which share of every block's neurons must be removed to meet a budget other than ``ratio``."""
    assert cost is not None
    full, half = ({b.name: max(1, int(b.width * share)) for b in blocks} for share in (1.0, 0.5))
    return min(1.0, 0.5 * (1 - budget.value) * cost(full) / max(1, cost(full) - cost(half)))
