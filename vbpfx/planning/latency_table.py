"""What every block costs in a runtime at every width: measured points, and the latency that they predict."""

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

    With t_b(w) the latency of block b alone at width w, linear between the points that were measured, the network's is

        T(w) = T_dense - k sum_b (t_b(d_b) - t_b(w_b)).

    Attributes:
        runtime: name of the runtime.
        batch: samples at once.
        threads: the runtime's threads; None for its own choice.
        dense: T_dense, seconds.
        points: block -> (width, seconds) in ascending order of widths, the last one the block's own width.
        correction: k, by which what blocks save alone becomes what the network saves, from a measurement of it.

    Raises:
        BudgetError: a latency is not a finite number above 0, or the correction none of 0 or more.
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
        """Predicted latency at these widths over the dense network's.

        Args:
            widths: block -> hidden width; blocks that are left out stay as they are.

        Raises:
            BudgetError: a block was not measured.
        """
        return 1 - self.correction * sum(self._saved(name, width) for name, width in widths.items()) / self.dense

    def cost(self, widths: Mapping[str, int]) -> int:
        """Predicted latency at these widths, in billionths of the dense network's.

        Args:
            widths: as for :meth:`ratio`.

        Raises:
            BudgetError: a block was not measured.
        """
        return round(1e9 * self.ratio(widths))

    def require(self, blocks: Iterable[Block]) -> None:
        """Check that these blocks were measured.

        Args:
            blocks: of the model that is to be pruned.

        Raises:
            BudgetError: one was not, or at another width.
        """
        for block in blocks:
            if block.name not in self.points or self.points[block.name][-1][0] != block.width:
                raise BudgetError(
                    f"block {block.name} (width {block.width}) was not measured: measure the blocks of this model with "
                    f"vbpfx.measure_latencies"
                )

    def _saved(self, name: str, width: int) -> float:
        widths, seconds = zip(*self.points[name], strict=True)
        rising = np.maximum.accumulate(seconds)  # noise must not make a narrower block dearer
        return float(rising[-1] - np.interp(width, widths, rising))
