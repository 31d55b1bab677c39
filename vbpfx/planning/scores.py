"""Scores: look up criteria by name, and compute the scores of a block with them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import Tensor

from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.planning.criteria import NAMES
from vbpfx.planning.importance import Criterion, Scoring

_FILES = {name: importlib.import_module(f"vbpfx.planning.criteria.{name}") for name in NAMES}

CRITERIA: Mapping[str, Criterion] = {name: getattr(file, name) for name, file in _FILES.items()}
NEED_COVARIANCE = tuple(name for name, file in _FILES.items() if getattr(file, "NEEDS_COVARIANCE", False))


def name_of(criterion: Criterion) -> str:
    """Return the name of a function, or of a callable object's class.

    Its ``repr`` would hold an address in memory, which differs from run to run.
    """
    name: str = getattr(criterion, "__name__", type(criterion).__name__)
    return name


def score(criterion: str | Criterion, about: Scoring) -> Tensor:
    """Return the scores of one block, (d,) float64 on the CPU.

    Args:
        criterion: the name of a criterion, or the user's own function.
        about: the block, with its statistics and weights.

    Raises:
        BudgetError: the user's function did not return one finite number per neuron.
        CalibrationError: a named criterion cannot rank the neurons, or gave scores that are not finite, because of the
            block's weights or statistics.
    """
    if isinstance(criterion, str):
        try:
            scores = CRITERIA[criterion](about)
        except CalibrationError as error:
            raise CalibrationError(
                f"block {about.block.name}: criterion {criterion!r} cannot rank its neurons: {error}, or leave the block out with "
                f"exclude={about.block.name!r}"
            ) from error
        if not bool(scores.isfinite().all()):
            raise CalibrationError(
                f"block {about.block.name}: criterion {criterion!r} gives scores that are not finite, so its neurons cannot be "
                f"ranked: weights of {', '.join(about.block.layers)} hold NaN or infinity, or their squares overflow; load or "
                f"train them again, or leave the block out with exclude={about.block.name!r}"
            )
        return scores
    found = criterion(about)
    if not isinstance(found, Tensor) or found.shape != (about.block.width,) or not bool(found.isfinite().all()):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BudgetError(
            f"criterion={getattr(criterion, '__name__', criterion)} returned {shape} for block {about.block.name}: it must "
            f"return a tensor of {about.block.width} finite numbers, one per neuron"
        )
    return found.detach().double().cpu()
