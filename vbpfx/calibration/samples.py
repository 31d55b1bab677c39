"""Samples that several methods look at, and where a rank's share of them stands among all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Samples:
    """One rank's share of the samples that are kept.

    Attributes:
        batches: the rank's own.
        starts: per batch the number of its first sample among those of all ranks.
        total: how many samples all ranks have.
        ranks: those ranks.
    """

    batches: tuple[Inputs, ...]
    starts: tuple[int, ...]
    total: int
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, batches: Sequence[Inputs] | Samples) -> Samples:
        """A sequence of batches as the samples of one process alone."""
        if isinstance(batches, Samples):
            return batches
        *starts, total = accumulate((batch.batch_size or 1 for batch in batches), initial=0)
        return cls(tuple(batches), tuple(starts), total)
