"""Prune networks whose weights are in memory: gather statistics in one pass over the data, plan, and fit layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.prepare import prepare
from vbpfx.data.inputs import Inputs, all_axes
from vbpfx.graph.capture import Captured
from vbpfx.measurement.sensitivity import sensitivities
from vbpfx.pipeline.calibration import Calibration, CalibrationResult, Run, run_calibration
from vbpfx.pipeline.stages import ResultT, Source
from vbpfx.pipeline.strategy import Fitting, Strategy, Target
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.options import PlanArguments
from vbpfx.planning.plan import make_plan
from vbpfx.planning.scores import name_of
from vbpfx.plans.records import Plan
from vbpfx.reconstruction.reconstruct import reconstruct
from vbpfx.rewrite.verify import Verification, verify


class InMemory(Source[CalibrationResult, ResultT]):
    """A network whose weights are in memory.

    Args:
        calibration: the data, and how to run it.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration, self.ranks = calibration, calibration.ranks

    @abstractmethod
    def read(self, batch: Any) -> Inputs:
        """Return a batch of the calibration data as arguments of the captured graph."""

    def forward(self, observed: fx.GraphModule) -> Run | None:
        """Return a function that runs a batch for the observers of a prepared graph, or None to run the graph itself."""
        return None

    def observe(self, analysis: Analysis, strategy: Strategy) -> CalibrationResult:
        """Run every batch once through the prepared graph, or through the function that :meth:`forward` returns."""
        observed = prepare(
            analysis.captured,
            analysis,
            blocks=strategy.blocks,
            mask=self.calibration.mask,
            covariance=strategy.covariance,
        )
        run = self.forward(observed)
        return run_calibration(analysis.captured, observed, run, self.read, self.calibration, strategy)

    def plan(
        self, analysis: Analysis, strategy: Strategy, observed: CalibrationResult, latencies: Latencies | None
    ) -> Plan:
        """Make the plan. The kept samples serve to measure the sensitivities of the blocks and to fit layers."""
        progress = self.calibration.progress
        plan = make_plan(
            analysis,
            observed.statistics,
            sensitivity=lambda alike: sensitivities(analysis, alike, observed.samples, progress=progress),
            latencies=latencies,
            **strategy.options,
        )
        if not strategy.fits:
            return plan
        return reconstruct(
            analysis, plan, observed.samples, observed.influence,
            beside=strategy.beside, choose=strategy.chooses, mask=self.calibration.mask, progress=progress,
        )  # fmt: skip

    def verify(self, captured: Captured, small: fx.GraphModule, plan: Plan) -> Verification:
        """Run the substitution oracle on both networks in memory."""
        return verify(captured, small, plan)

    def arguments(self, captured: Captured, options: PlanArguments, fitting: Fitting, target: Target) -> dict[str, Any]:
        """Return the arguments of :func:`vbpfx.prune` that differ from its defaults, ready for JSON. Functions become names."""
        return _given(captured, self.calibration, options, fitting, target)


def _given(
    captured: Captured, calibration: Calibration, options: PlanArguments, fitting: Fitting, target: Target
) -> dict[str, Any]:
    """Return the arguments of :func:`vbpfx.prune` that differ from its defaults, ready for JSON."""
    compiled = None if calibration.compile is False else calibration.compile
    all_open = bool(captured.inputs.open) and captured.inputs.open == all_axes(captured.inputs)
    given = {
        **options,
        "mask": calibration.mask,
        "compile": compiled,
        **_changed(fitting),
        **_changed(target),
        "frontend": "export" if captured.frontend == "export" else None,
        "open_sizes": all_open or None,
    }
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _changed(settings: Fitting | Target) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    default = vars(type(settings)())
    return {name: value for name, value in vars(settings).items() if value != default[name]}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return name_of(value)
