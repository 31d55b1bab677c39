"""Calibration samples that several methods use, with their position among the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Samples:
    """One rank's share of the calibration samples that are kept.

    Attributes:
        batches: the batches of this rank.
        starts: for every batch the number of its first sample among those of all ranks.
        total: the number of samples of all ranks together.
        ranks: the processes that share the samples.
    """

    batches: tuple[Inputs, ...]
    starts: tuple[int, ...]
    total: int
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, batches: Sequence[Inputs] | Samples) -> Samples:
        """Return a sequence of batches as the samples of a single process; :class:`Samples` are returned as they are."""
        if isinstance(batches, Samples):
            return batches
        *starts, total = accumulate((batch.batch_size or 1 for batch in batches), initial=0)
        return cls(tuple(batches), tuple(starts), total)
