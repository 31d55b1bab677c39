"""Strategy: what a run of :func:`vbpfx.prune` will do, settled before any data is seen."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Unpack

from vbpfx.analysis.blocks import Analysis
from vbpfx.measurement.latency import measure_latencies
from vbpfx.measurement.sensitivity import MOST_SAMPLES
from vbpfx.planning.budget import floors, require_memory, require_positive
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.multiples import fitting_multiple
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.planning.select import select_blocks, select_layers
from vbpfx.plans.records import Block, Consumer
from vbpfx.reconstruction.influence import samples_at_once
from vbpfx.reconstruction.schedule import schedule
from vbpfx.reconstruction.steps import chosen_on_the_way, layers_beside, layers_to_fit, samples_that_fit
from vbpfx.runtimes.adapters import DEFAULT
from vbpfx.runtimes.table import best_multiple

# What covariances may cost, as a share of the network's own products, where they only say how wide blocks stay.
_WIDTHS_COVARIANCE_SHARE = 0.25
# Of the memory that may be held: what the samples that are kept take until the last layer is fitted, and what beside them one
# forward pass may take, or a forward and a backward pass.
_KEPT_SHARE, _PASS_SHARE = 0.75, 0.25


@dataclass(frozen=True)
class Fitting:
    """What is asked of the reconstruction; see :func:`vbpfx.prune`."""

    reconstruct: bool | None = None
    refit: bool | None = None
    samples: int | None = None
    memory: float = 8.0

    def __post_init__(self) -> None:
        require_memory(self.memory)
        if self.samples is not None:
            require_positive("samples", self.samples)

    def fits(self, chosen: PlanOptions) -> bool:
        """Whether layers are fitted block after block: as was said, or else as the method does."""
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
        """The options with widths that are multiples of what the runtime is fast at, where one is asked for.

        The multiple is halved where the budget would not be met so (:func:`vbpfx.planning.multiples.fitting_multiple`).
        """
        asked = self.runtime is not None or options.get("latency") is not None
        if not asked or options.get("round_to") is not None:
            return options
        chosen = PlanOptions.of(**options)
        blocks = select_blocks(analysis, chosen.include, chosen.exclude)
        floor = floors(blocks, chosen.min_width)
        best = best_multiple(self.runtime or DEFAULT)
        multiple = fitting_multiple(best, analysis.captured, blocks, chosen.budget, floor)
        return {**options, "round_to": multiple}

    def latencies(self, analysis: Analysis, strategy: Strategy) -> Latencies:
        """What the blocks cost there, for a budget of latency."""
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
    """What will be done.

    Attributes:
        options: what :func:`vbpfx.make_plan` is given; ``chosen`` are the same, checked.
        blocks: those that may be narrowed.
        beside: layers beside the blocks that are fitted, too.
        layers: all that are fitted, in graph order; none where nothing is.
        fits: whether layers are fitted block after block.
        chooses: whether neurons are chosen on the way there, rather than by the plan.
        samples: how many calibration samples are kept for that, and for sensitivities.
        at_once: how many samples' activations are held for a backward pass.
        pass_memory: GiB that one forward pass may hold.
        covariance: what :func:`vbpfx.prepare` is to gather.
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
        """Settle it.

        Raises:
            VbpfxError: options that do not go together, or patterns that match nothing.
        """
        chosen = PlanOptions.of(**options)
        blocks = select_blocks(analysis, chosen.include, chosen.exclude)
        fits, order = fitting.fits(chosen), schedule(analysis)
        refits = fits and (fitting.refit is None or fitting.refit)
        beside = select_layers(layers_beside(analysis), chosen.include, chosen.exclude) if refits else ()
        chooses = fits and chosen.chooses_on_the_way
        measures = chosen.allocation == "sensitivity" and len(blocks) > 1
        # whether nothing is taken from the plan but how wide blocks stay
        widths_alone = chooses and all(chosen_on_the_way(order, block) for block in blocks)
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
