"""Calibrate and plan a model whose weights are read piece by piece.

Every piece of the graph runs on all batches, and its observers gather statistics as in :func:`vbpfx.calibrate`. A block is
scored as soon as its statistics are complete, so its covariance of width^2 numbers is not held any longer than that.
Compensation by regression needs both the covariance and the choice of neurons to keep. The choice is known only when all
blocks have their scores, so this compensation takes a second pass through the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.calibrate import misfit, not_finite
from vbpfx.calibration.moments import Moments
from vbpfx.calibration.observer import Observer
from vbpfx.calibration.prepare import Statistics, observers, prepare
from vbpfx.data.inputs import Inputs
from vbpfx.display.progress import progress_bar
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.graph.capture import Captured
from vbpfx.pipeline.loading import Loading, Loans, Piece, runnable
from vbpfx.planning.entries import pooled
from vbpfx.planning.options import PlanOptions
from vbpfx.planning.plan import Deciding
from vbpfx.plans.records import Block, BlockPlan, Plan

Finish = Callable[[Block, tuple[Moments, ...]], None]


def require_streamable(chosen: PlanOptions) -> None:
    """Raise a BudgetError for options that need the whole model in memory."""
    instead = "use method='vbp', with criterion=, allocation= and compensation= of your choice, or vbpfx.prune"
    if chosen.reconstructs:
        raise BudgetError(
            f"method='auto' needs gradients through the whole model, and here the weights are read piece by piece: {instead}"
        )
    if chosen.allocation == "sensitivity":
        raise BudgetError(f"allocation='sensitivity' runs the whole model once for every block: {instead}")
    if chosen.budget.kind == "latency":
        raise BudgetError(
            f"latency= is measured on blocks whose weights are in memory: {instead}, with ratio=, macs= or params="
        )


@dataclass(frozen=True)
class Scored:
    """The result of the first pass through the graph.

    Attributes:
        statistics: the statistics of the blocks, without covariances.
        scores: block -> one score per neuron.
    """

    statistics: Statistics
    scores: Mapping[str, Tensor]


class Streaming:
    """Passes through the graph of a model whose weights are read piece by piece.

    Args:
        analysis: the analysis of the model, which was captured on the meta device.
        chosen: the options of the plan.
        loans: the model's weights.
        batches: the calibration data.
        mask: see :func:`vbpfx.prepare`.
        memory: bytes for the weights of a piece, and as many again for the values that batches hold between two pieces.
        progress: show bars on standard error.
    """

    def __init__(
        self,
        analysis: Analysis,
        chosen: PlanOptions,
        loans: Loans,
        batches: Sequence[Inputs],
        *,
        mask: MaskArgument | None,
        memory: float,
        progress: bool,
    ) -> None:
        self.analysis, self.chosen, self.deciding = analysis, chosen, Deciding(analysis, chosen)
        self.blocks, self.loans, self.batches = {b.name: b for b in self.deciding.blocks}, loans, batches
        self.mask, self.memory, self.progress = mask, memory, progress
        self.starts = list(accumulate((batch.batch_size or 1 for batch in batches), initial=0))

    def score(self) -> Scored:
        """Gather statistics and score the blocks in a first pass.

        Raises:
            CalibrationError: a batch does not fit the model or leads to activations that are not finite, or the options need
                covariances and the batches do not fit in memory together.
        """
        deciding = self.deciding
        scores: dict[str, Tensor] = {}
        moments: dict[str, tuple[Moments, ...]] = {}

        def take_scores(block: Block, found: tuple[Moments, ...]) -> None:
            moments[block.name] = tuple(replace(m, co=None, held_out=None) for m in found)
            first = deciding.blocks[0]
            samples = deciding.samples(*((first, moments[first.name]) if first.name in moments else (block, found)))
            with self._weights_of(block):
                scores[block.name] = deciding.scores(block, pooled(block, found), samples)

        self._run("scoring", self.chosen.scores_need_covariance, take_scores)
        return Scored(Statistics(moments), scores)

    def plan(self, scored: Scored) -> Plan:
        """Make the plan, with a second pass if the compensation needs covariances.

        Raises:
            BudgetError: the budget cannot be met.
            CalibrationError: as :meth:`score` does.
        """
        deciding, moments = self.deciding, scored.statistics.moments
        allocation = deciding.allocation({})
        kept = deciding.kept(scored.scores, allocation, {})
        narrowed = [block for block in deciding.blocks if len(kept[block.name]) < block.width]
        entries: dict[str, BlockPlan] = {}

        def take_entry(block: Block, found: tuple[Moments, ...]) -> None:
            if block in narrowed:
                with self._weights_of(block):
                    entries[block.name] = deciding.entry(
                        block, kept[block.name], scored.scores[block.name], pooled(block, found)
                    )

        if self.chosen.compensation == "ridge":
            self._run("folding", True, take_entry)
        else:
            for block in narrowed:
                take_entry(block, moments[block.name])
        rows = max(m.count for found in moments.values() for m in found)
        return deciding.plan([entries[block.name] for block in narrowed], allocation, rows)

    def _weights_of(self, block: Block) -> AbstractContextManager[None]:
        """Return a context in which the model holds the weights of a block."""
        names = list({entry.name: None for entry in block.parameters})
        return self.loans.lent(self.analysis.captured.reference, names)

    def _run(self, title: str, covariance: bool, finish: Finish) -> None:
        """Gather statistics of all batches. Call ``finish`` with a block as soon as its statistics are complete."""
        captured = self.analysis.captured
        observed = runnable(
            prepare(captured, self.analysis, blocks=self.blocks.values(), mask=self.mask, covariance=covariance)
        )
        nodes = {str(node.target): node.name for node in observed.graph.nodes if node.op == "call_module"}
        order = {node.name: number for number, node in enumerate(observed.graph.nodes)}
        places: dict[str, list[tuple[str, Observer]]] = defaultdict(list)
        for path, module in observed.named_children():
            if isinstance(module, Observer):
                places[module.name].append((nodes[path], module))
        last = max((name for own in places.values() for name, _ in own), key=order.__getitem__)
        loading = Loading(observed, self.loans, samples_of(captured), self.memory, until=last)
        ways = _ways(self.batches, captured, loading.samples_at_once())
        if covariance and len(ways) > 1:
            raise CalibrationError(
                f"{self.starts[-1]} samples need {len(ways)} passes through the model with this memory, but covariances need a "
                f"single pass: pass fewer samples, raise memory=, or choose a criterion and a compensation that need no "
                f"covariances, such as those of method='vbp'"
            )
        waiting = dict(places)

        def behind(piece: Piece) -> None:
            advance()
            if way is not ways[-1]:
                return
            passed = [name for name, own in waiting.items() if all(order[n] <= order[piece.last] for n, _ in own)]
            for name in passed:
                own = list(dict.fromkeys(o for _, placed in waiting.pop(name) for o in placed.gathering))
                self._require_finite(own, observed)
                finish(self.blocks[name], tuple(o.moments or Moments.nothing(o.width) for o in own))
                for observer in own:
                    observer.moments = None

        with progress_bar(title, len(ways) * len(loading.pieces), self.progress) as advance:
            for way in ways:
                self._run_way(loading, way, observed, behind)

    def _run_way(self, loading: Loading, way: range, observed: fx.GraphModule, behind: Callable[[Piece], None]) -> None:
        watching = observers(observed)
        running: list[int] = []

        def before(number: int) -> None:
            running[:] = [way[number]]
            for observer in watching:
                observer.rows = self.starts[way[number]] * observer.rows_a_sample

        def passed(piece: Piece) -> None:
            running.clear()
            behind(piece)

        try:
            loading.run([self.batches[number] for number in way], before=before, behind=passed)
        except Exception as error:  # the model's own operators may raise any exception
            if not running:  # no batch was running: a weight cannot be read, or the user's criterion fails
                raise
            number = running[0]
            first = self.batches[0] if number else None
            raise CalibrationError(misfit(number + 1, self.batches[number], first, observed, error)) from error

    def _require_finite(self, own: Sequence[Observer], observed: fx.GraphModule) -> None:
        bad = next((o for o in own if o.bad_call is not None), None)
        if bad is not None and bad.bad_call is not None:
            raise CalibrationError(not_finite(bad.bad_call + 1, bad.name, self.batches[bad.bad_call], observed))


def samples_of(captured: Captured) -> int:
    """Return the batch size of the shapes in a captured graph."""
    return captured.batch or captured.inputs.batch_size or 1


def _ways(batches: Sequence[Inputs], captured: Captured, at_once: int) -> list[range]:
    """Divide the batches, in order, into groups that run through the graph together. Return the numbers of each group."""
    a_sample = sum(t.numel() for t in captured.inputs.tensors) / (captured.inputs.batch_size or 1)
    found: list[range] = []
    start, size = 0, 0.0
    for number, batch in enumerate(batches):
        samples = sum(t.numel() for t in batch.tensors) / max(
            1.0, a_sample
        )  # counted in samples of the captured size, because texts differ in length
        if number > start and size + samples > at_once:
            found.append(range(start, number))
            start, size = number, 0.0
        size += samples
    return [*found, range(start, len(batches))]
