"""The stages that every way of pruning runs. A :class:`Source` implements the steps that differ between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import fx

from vbpfx.analysis.blocks import Analysis, find_blocks
from vbpfx.calibration.prepare import Statistics
from vbpfx.distributed.ranks import ALONE, Ranks
from vbpfx.graph.capture import Captured
from vbpfx.measurement.latency import measure_result
from vbpfx.pipeline.strategy import Fitting, Strategy, Target
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.options import PlanArguments
from vbpfx.plans.files import plan_digest
from vbpfx.plans.records import Plan
from vbpfx.report.make import make_report
from vbpfx.report.report import Report
from vbpfx.rewrite.convert import convert
from vbpfx.rewrite.verify import Verification

# Tracing looks at shapes alone; the oracle runs three networks, and a few samples are enough for it.
EXAMPLE_SAMPLES = 4


class Observed(Protocol):
    """The result of calibration, which has at least these attributes for every source."""

    @property
    def statistics(self) -> Statistics:
        """The statistics of the blocks."""


class Result:
    """The result of every way of pruning. Printing it shows the report.

    Attributes:
        plan, statistics, analysis, report, verification: what the stages made. ``verification`` is None if it was not
            asked for.
    """

    plan: Plan
    statistics: Statistics
    analysis: Analysis
    report: Report
    verification: Verification | None

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@dataclass(frozen=True)
class Made(Result):
    """What the stages made, before the source writes it.

    Attributes:
        captured: the dense graph.
        graph_module: the narrowed graph.
        analysis, statistics, plan, verification, report: as in :class:`Result`.
    """

    captured: Captured
    graph_module: fx.GraphModule
    analysis: Analysis
    statistics: Statistics
    plan: Plan
    verification: Verification | None
    report: Report


ObservedT = TypeVar("ObservedT", bound=Observed)
ResultT = TypeVar("ResultT", bound=Result)


class Source(ABC, Generic[ObservedT, ResultT]):
    """A network to prune. A subclass decides where its weights are, how it runs, and where the result is written.

    The methods are called once each, in the order in which :func:`run_stages` lists them.

    Attributes:
        ranks: the processes that share the work.
        share: whether the narrowed graph shares the memory of unchanged weights (:func:`vbpfx.convert`).
    """

    ranks: Ranks = ALONE
    share: bool = False

    @abstractmethod
    def capture(self) -> Captured:
        """Return the network as a graph."""

    @abstractmethod
    def observe(self, analysis: Analysis, strategy: Strategy) -> ObservedT:
        """Run the calibration data through the graph, and return the statistics that the plan is made from."""

    @abstractmethod
    def plan(self, analysis: Analysis, strategy: Strategy, observed: ObservedT, latencies: Latencies | None) -> Plan:
        """Choose the neurons to keep and what replaces the others, and fit layers if the strategy says so."""

    @contextmanager
    def writing(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Iterator[None]:
        """Write the weights before the result is verified, for sources that verify the written files.

        The files are removed again if a later stage fails.
        """
        yield

    @abstractmethod
    def verify(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Verification:
        """Run the substitution oracle."""

    def arguments(
        self, captured: Captured, options: PlanArguments, fitting: Fitting, target: Target
    ) -> Mapping[str, Any]:
        """Return the arguments that the report shows."""
        return {}

    @abstractmethod
    def result(self, made: Made) -> ResultT:
        """Write what has not been written yet, and return the result for the caller."""


def run_stages(
    source: Source[ObservedT, ResultT],
    options: PlanArguments,
    *,
    fitting: Fitting,
    target: Target,
    verify: bool = True,
) -> ResultT:
    """Run the stages in order, and return the result of the source.

    Args:
        source: the network.
        options: the budget and the method, as :func:`vbpfx.make_plan` takes them.
        fitting: the settings of the reconstruction.
        target: where the narrowed network will run.
        verify: run the substitution oracle.
    """
    captured = source.capture()
    analysis = find_blocks(captured)
    strategy = Strategy.of(analysis, fitting, **target.rounded(options, analysis))
    by_latency = strategy.chosen.budget.kind == "latency"
    latencies = source.ranks.of_first(lambda: target.latencies(analysis, strategy)) if by_latency else None
    observed = source.observe(analysis, strategy)
    plan = source.plan(analysis, strategy, observed, latencies)
    statistics = observed.statistics
    del observed  # it may hold calibration samples
    if source.ranks.count > 1:
        source.ranks.meet("plan", plan_digest(plan))
    small = convert(captured, plan, share=source.share)
    with source.writing(captured, small, plan):
        verification = source.verify(captured, small, plan) if verify else None
        latency = source.ranks.of_first(lambda: measure_result(small, captured, plan, latencies)) if latencies else None
        report = make_report(
            captured, small, analysis, plan, verification, latency,
            statistics=statistics, arguments=source.arguments(captured, options, fitting, target),
        )  # fmt: skip
        return source.result(Made(captured, small, analysis, statistics, plan, verification, report))
