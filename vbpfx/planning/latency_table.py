"""Latency tables: the measured latency of every block in a runtime at some widths, and predictions from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vbpfx.errors import BudgetError
from vbpfx.plans.records import Block


@dataclass(frozen=True)
class Latencies:
    """The measured latencies of one network in one runtime.

    Let t_b(w) be the latency of block b alone at width w, interpolated linearly between the measured points. The
    latency of the network is predicted as

        T(w) = T_dense - k sum_b (t_b(d_b) - t_b(w_b)).

    Attributes:
        runtime: name of the runtime.
        batch: number of samples in a batch.
        threads: number of the runtime's threads; None if the runtime chooses it.
        dense: T_dense, in seconds.
        points: block -> pairs (width, seconds) in ascending order of widths; the last width is the block's own.
        correction: k. What blocks save by themselves, times k, is what the network saves; k comes from a measurement of
            the whole network.

    Raises:
        BudgetError: a latency is not a finite number above 0, or the correction is not a finite number of 0 or more.
    """

    runtime: str
    batch: int
    threads: int | None
    dense: float
    points: Mapping[str, tuple[tuple[int, float], ...]]
    correction: float = 1.0

    def __post_init__(self) -> None:
        times = {"the whole network": [self.dense], **{f"block {n}": [t for _, t in p] for n, p in self.points.items()}}
        for what, seconds in times.items():
            if not all(0 < t < math.inf for t in seconds):
                raise BudgetError(
                    f"the latency of {what} was measured as {seconds} seconds: every one must be a finite number above 0; "
                    f"measure again, with a larger batch where the clock is too coarse"
                )
        if not 0 <= self.correction < math.inf:
            raise BudgetError(
                f"the correction of a latency table is {self.correction}, expected a finite number of 0 or more"
            )

    def ratio(self, widths: Mapping[str, int]) -> float:
        """Return the predicted latency at these widths divided by the dense network's.

        Args:
            widths: block -> hidden width; blocks that are left out keep their full width.

        Raises:
            BudgetError: a block was not measured.
        """
        return 1 - self.correction * sum(self._saved(name, width) for name, width in widths.items()) / self.dense

    def cost(self, widths: Mapping[str, int]) -> int:
        """Return the predicted latency at these widths, in billionths of the dense network's.

        Args:
            widths: as for :meth:`ratio`.

        Raises:
            BudgetError: a block was not measured.
        """
        return round(1e9 * self.ratio(widths))

    def require(self, blocks: Iterable[Block]) -> None:
        """Check that these blocks were measured.

        Args:
            blocks: blocks of the model that is to be pruned.

        Raises:
            BudgetError: a block was not measured, or its width differs from the one that was measured.
        """
        for block in blocks:
            if block.name not in self.points or self.points[block.name][-1][0] != block.width:
                raise BudgetError(
                    f"block {block.name} (width {block.width}) was not measured: measure the blocks of this model with "
                    f"vbpfx.measure_latencies"
                )

    def _saved(self, name: str, width: int) -> float:
        widths, seconds = zip(*self.points[name], strict=True)
        rising = np.maximum.accumulate(seconds)  # noise must not make a narrower block slower than a wider one
        return float(rising[-1] - np.interp(width, widths, rising))
