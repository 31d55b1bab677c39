"""Run calibration: one pass over the data gathers everything that the later stages need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.calibrate import calibrate
from vbpfx.calibration.compiled import Compile, compiling, forward_passes
from vbpfx.calibration.passes import Forward
from vbpfx.calibration.prepare import Statistics, statistics
from vbpfx.calibration.samples import Samples
from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import ALONE, Ranks
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured
from vbpfx.graph.memory import samples_in_a_pass
from vbpfx.pipeline.strategy import Strategy
from vbpfx.planning.options import in_words
from vbpfx.reconstruction.influence import Gradients, Influence, is_differentiable
from vbpfx.reconstruction.kept import Keeping

# A function that runs one batch and gives the observers of a prepared graph their values.
Run = Callable[[Inputs], None]


@dataclass(frozen=True)
class Calibration:
    """Calibration data, and the settings of the pass over it.

    Attributes:
        batches: the batches. They are iterated over once.
        total: the number of batches; None if it is not known.
        mask, progress, ranks, checkpoint, checkpoint_every, compile: see :func:`vbpfx.prune`.
    """

    batches: Iterable[Any]
    total: int | None = None
    mask: MaskArgument | None = None
    progress: bool = True
    ranks: Ranks = ALONE
    checkpoint: str | Path | None = None
    checkpoint_every: int = 50
    compile: Compile = False


@dataclass(frozen=True)
class CalibrationResult:
    """The result of calibration.

    Attributes:
        statistics: the statistics of the blocks.
        samples: the samples that were kept.
        influence: layer to fit -> how much errors in its output count, measured on these samples.
    """

    statistics: Statistics
    samples: Samples
    influence: Mapping[str, Influence]


def run_calibration(
    captured: Captured,
    observed: fx.GraphModule,
    run: Run | None,
    read: Callable[[Any], Inputs],
    calibration: Calibration,
    strategy: Strategy,
) -> CalibrationResult:
    """Run every batch once to gather statistics. Keep the first samples, and take gradients on them if layers are fitted.

    Args:
        captured: the dense graph.
        observed: the dense graph with observers.
        run: runs a batch for the observers. With None, ``observed`` itself runs.
        read: turns a batch into the arguments of a forward call.
    """
    gradients = None
    if strategy.layers and is_differentiable(captured, strategy.layers, strategy.at_once):
        reading = {c.node for block in strategy.blocks for c in block.consumers}  # neurons are chosen at these layers
        gradients = Gradients(captured, strategy.layers, observed, metrics=reading, at_once=strategy.at_once)
    passes = Forward(run) if run else forward_passes(observed, calibration.compile)
    # a runtime returns the inputs of all consumer layers together, at the end of its run
    together = [source.node for block in strategy.blocks for source in block.sources] if run else []
    most = samples_in_a_pass(captured, strategy.pass_memory, together) if captured.divisible else None
    if most is not None and most > strategy.at_once:
        most -= most % strategy.at_once  # so the groups of samples for gradients do not depend on how batches are cut
    keeping = Keeping(passes, strategy.samples, gradients, most=most)
    calibrate(
        observed,
        calibration.batches,
        read=read,
        work=keeping,
        total=calibration.total,
        progress=calibration.progress,
        ranks=calibration.ranks,
        checkpoint=calibration.checkpoint,
        checkpoint_every=calibration.checkpoint_every,
        settings={
            "options": in_words(strategy.options),
            "samples": strategy.samples,
            "at_once": strategy.at_once,
            "most": most,
            "gradients": sorted(layer.node for layer in strategy.layers) if gradients else None,
            **compiling(calibration.compile),
        },
    )
    influence = gradients.influences(ranks=calibration.ranks) if gradients else {}
    return CalibrationResult(statistics(observed), keeping.samples(calibration.ranks), influence)


def require_batches(calibration: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over the batches. Raise a CalibrationError if the data is one batch, or not iterable."""
    if isinstance(calibration, (Tensor, Mapping)):
        raise CalibrationError(f"calibration is one {type(calibration).__name__}; pass an iterable of batches: [batch]")
    try:
        return iter(calibration)
    except TypeError as error:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, expected an iterable of batches"
        ) from error


def first_batch(calibration: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, and an iterable over all batches, the first one included. The data is iterated over once."""
    iterator = require_batches(calibration)
    missing = object()
    first = next(iterator, missing)
    if first is missing:
        raise CalibrationError("the calibration data is empty: pass at least one batch")
    return first, itertools.chain([first], iterator)
