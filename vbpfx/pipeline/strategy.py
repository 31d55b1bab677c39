"""Strategy: what a run of :func:`vbpfx.prune` will do, decided before any data is read."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.measurement.latency import measure_latencies
from vbpfx.measurement.sensitivity import MOST_SAMPLES
from vbpfx.planning.budget import require_memory, require_positive
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.multiples import fitting_floors, fitting_multiple
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.planning.select import select_blocks, select_layers
from vbpfx.plans.records import Block, Consumer
from vbpfx.reconstruction.influence import samples_at_once
from vbpfx.reconstruction.schedule import schedule
from vbpfx.reconstruction.steps import chosen_on_the_way, layers_beside, layers_to_fit, samples_that_fit
from vbpfx.runtimes.adapters import DEFAULT
from vbpfx.runtimes.table import best_multiple

# The cost that covariances may have, as a share of the network's own products, if they only decide the widths of blocks.
_WIDTHS_COVARIANCE_SHARE = 0.25
# Shares of the memory that calibration may hold: for the kept samples until the last layer is fitted, and beside them for
# one forward pass, or one forward and backward pass.
_KEPT_SHARE, _PASS_SHARE = 0.75, 0.25


@dataclass(frozen=True)
class Fitting:
    """The settings of the reconstruction; see :func:`vbpfx.prune`."""

    reconstruct: bool | None = None
    refit: bool | None = None
    samples: int | None = None
    memory: float = 8.0

    def __post_init__(self) -> None:
        require_memory(self.memory)
        if self.samples is not None:
            require_positive("samples", self.samples)

    def fits(self, chosen: PlanOptions) -> bool:
        """Return whether layers are fitted block after block: the caller's choice, or else the method's."""
        return chosen.reconstructs if self.reconstruct is None else self.reconstruct


@dataclass(frozen=True)
class Target:
    """Where the network will run; see :func:`vbpfx.prune`."""

    runtime: str | None = None
    runtime_batch: int = 1
    runtime_threads: int | None = None

    def __post_init__(self) -> None:
        require_positive("runtime_batch", self.runtime_batch)
        if self.runtime_threads is not None:
            require_positive("runtime_threads", self.runtime_threads)

    def rounded(self, options: PlanArguments, analysis: Analysis) -> PlanArguments:
        """Return the options with ``round_to`` set to a multiple at which the runtime is fast.

        The options stay as they are if no runtime and no latency budget is asked for, or if they have a ``round_to``. The
        multiple is halved until the budget can be met (:func:`vbpfx.planning.multiples.fitting_multiple`).
        """
        asked = self.runtime is not None or options.get("latency") is not None
        if not asked or options.get("round_to") is not None:
            return options
        chosen = PlanOptions.of(**options)
        blocks = select_blocks(analysis, chosen.include, chosen.exclude, chosen.kinds)
        constants = chosen.compensation != "none"
        floor = fitting_floors(analysis.captured, blocks, chosen.budget, chosen.min_width, constants=constants)
        best = best_multiple(self.runtime or DEFAULT)
        multiple = fitting_multiple(best, analysis.captured, blocks, chosen.budget, floor)
        return {**options, "round_to": multiple}

    def latencies(self, analysis: Analysis, strategy: Strategy) -> Latencies:
        """Measure the latencies of the blocks in the runtime, for a latency budget."""
        return measure_latencies(
            analysis,
            strategy.chosen.budget.value,
            blocks=strategy.blocks,
            runtime=self.runtime or DEFAULT,
            batch=self.runtime_batch,
            threads=self.runtime_threads,
            round_to=strategy.chosen.round_to or 1,
        )


@dataclass(frozen=True)
class Strategy:
    """What a run will do.

    Attributes:
        options: the options for :func:`vbpfx.make_plan`.
        chosen: the same options, checked.
        blocks: the blocks that may be narrowed.
        beside: the layers outside the blocks that are fitted as well.
        layers: all layers that are fitted, in graph order. It is empty if no layer is fitted.
        fits: whether layers are fitted block after block.
        chooses: whether the reconstruction chooses the neurons, rather than the plan.
        samples: how many calibration samples are kept, for the reconstruction and for sensitivities.
        at_once: how many samples go through one backward pass together.
        pass_memory: GiB that one forward pass may hold.
        covariance: the argument ``covariance`` of :func:`vbpfx.prepare`.
    """

    options: PlanArguments
    chosen: PlanOptions
    blocks: tuple[Block, ...]
    beside: tuple[Consumer, ...]
    layers: list[Consumer]
    fits: bool
    chooses: bool
    samples: int
    at_once: int
    pass_memory: float
    covariance: bool | float

    @classmethod
    def of(cls, analysis: Analysis, fitting: Fitting, **options: Unpack[PlanArguments]) -> Strategy:
        """Return the strategy for an analysed network and the options of a run.

        Raises:
            VbpfxError: options do not go together, or a pattern matches nothing.
        """
        chosen = PlanOptions.of(**options)
        blocks = select_blocks(analysis, chosen.include, chosen.exclude, chosen.kinds)
        fits, order = fitting.fits(chosen), schedule(analysis)
        refits = fits and (fitting.refit is None or fitting.refit)
        beside = select_layers(layers_beside(analysis, blocks), chosen.include, chosen.exclude) if refits else ()
        chooses = fits and chosen.chooses_on_the_way
        measures = chosen.allocation == "sensitivity" and len(blocks) > 1
        # whether the plan decides only the widths of the blocks
        widths_alone = chooses and all(block.kind == "mlp" and chosen_on_the_way(order, block) for block in blocks)
        if widths_alone and not measures:
            options = {**options, "criterion": "variance", "compensation": "mean"}
            chosen = PlanOptions.of(**options)
        layers = layers_to_fit(order, analysis, blocks, beside) if fits else []
        fitting_memory = samples_that_fit(order, layers, _KEPT_SHARE * fitting.memory)
        samples = min(MOST_SAMPLES, fitting_memory) if measures else 0
        if fits:
            samples = fitting.samples or fitting_memory
        return cls(
            options=options,
            chosen=chosen,
            blocks=blocks,
            beside=beside,
            layers=layers,
            fits=fits,
            chooses=chooses,
            samples=samples,
            at_once=samples_at_once(analysis.captured, _PASS_SHARE * fitting.memory),
            pass_memory=_PASS_SHARE * fitting.memory,
            covariance=chosen.needs_covariance and (_WIDTHS_COVARIANCE_SHARE if widths_alone else True),
        )
