"""Spectra: the activation variances of a block's neurons, highest first, and which neurons are kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbpfx.calibration.prepare import Statistics
from vbpfx.planning.entries import pooled
from vbpfx.planning.importance import summed_variance
from vbpfx.plans.records import Block, Plan

# The number of entries of one spectrum, and of all spectra of a network. A report need not hold more than a chart can
# show.
_MOST_ENTRIES = 200
_FEWEST_ENTRIES = 40
_ALL_ENTRIES = 6000


@dataclass(frozen=True)
class Spectrum:
    """The variances of one block's N hidden neurons in descending order, reduced to n <= N entries.

    Entry i stands for the ranks i N // n to (i + 1) N // n - 1 (rank 0 has the highest variance).

    Attributes:
        neurons: N, the number of neurons.
        variances: for each entry, the sample variance of one of its neurons (in the first entry the highest of all, in
            the last the lowest). It is summed over the values that consumers read, as the score of
            ``criterion="variance"``, and has four significant digits.
        kept: for each entry, how many neurons of its ranks are kept.
        among_highest: how many of the K kept neurons are among the K neurons of highest variance. These are all K if
            the criterion is the variance.
        variance_kept: the kept neurons' share of the sum of all variances.
    """

    neurons: int
    variances: tuple[float, ...]
    kept: tuple[int, ...]
    among_highest: int
    variance_kept: float

    @property
    def bounds(self) -> tuple[int, ...]:
        """The first rank of every entry, followed by N."""
        return tuple(i * self.neurons // len(self.variances) for i in range(len(self.variances) + 1))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spectrum:
        """Restore a spectrum from ``dataclasses.asdict``, after it was written as JSON and read again."""
        return cls(**dict(data) | {"variances": tuple(data["variances"]), "kept": tuple(data["kept"])})


def spectra(blocks: tuple[Block, ...], statistics: Statistics, plan: Plan) -> dict[str, Spectrum]:
    """Return block -> its spectrum, for every block with gathered statistics."""
    kept = {entry.block.name: entry.kept for entry in plan.blocks}
    seen = [block for block in blocks if block.name in statistics.moments]
    entries = min(_MOST_ENTRIES, max(_FEWEST_ENTRIES, _ALL_ENTRIES // max(1, len(seen))))
    return {
        b.name: reduced(
            summed_variance(b, pooled(b, statistics.moments[b.name])), kept.get(b.name, tuple(range(b.width))), entries
        )
        for b in seen
    }


def reduced(variances: Tensor, kept: tuple[int, ...], entries: int = _MOST_ENTRIES) -> Spectrum:
    """Return the spectrum of neurons with these variances, (N,), of which ``kept`` are kept.

    Among neurons of equal variance, kept ones rank first. So if the criterion is the variance, ties do not look like
    exceptions.

    Args:
        entries: the spectrum has at most this many entries.
    """
    neurons = len(variances)
    stays = torch.zeros(neurons, dtype=torch.bool)
    stays[torch.tensor(kept)] = True
    ties = torch.argsort(stays.int(), descending=True, stable=True)
    order = ties[torch.argsort(variances[ties], descending=True, stable=True)]
    entries = min(entries, neurons)
    bounds = [i * neurons // entries for i in range(entries + 1)]
    shown = [i * (neurons - 1) // max(1, entries - 1) for i in range(entries)]  # one rank for each entry
    total = float(variances.sum())
    return Spectrum(
        neurons,
        tuple(float(f"{v:.4g}") for v in variances[order][shown].tolist()),
        tuple(int(stays[order[start:stop]].sum()) for start, stop in itertools.pairwise(bounds)),
        int(stays[order[: len(kept)]].sum()),
        float(f"{float(variances[stays].sum()) / total:.4g}") if total else 1.0,
    )
