"""The calibration samples that are kept: for gradients, sensitivities and reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from vbpfx.calibration.checkpoint import Work
from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import Ranks
from vbpfx.distributed.samples import Samples
from vbpfx.reconstruction.influence import Gradients


class Keeping:
    """Runs batches for a prepared graph's observers; keeps the first samples of the data, and takes gradients on these.

    Batches that are larger than what may run at once run in parts, and what is kept of them are those parts: everything behind
    calibration takes its samples as they are kept, and holds no more at once either.

    Args:
        forward: runs batches where no gradients are taken.
        samples: how many are kept, of all ranks together.
        gradients: on the prepared graph; None for none.
        most: how many samples may run at once; None where the graph does not take any number of samples, so that no batch can
            be cut.
    """

    def __init__(self, forward: Work, samples: int, gradients: Gradients | None, *, most: int | None) -> None:
        self.forward, self.wanted, self.gradients, self.most = forward, samples, gradients, most
        self.batches: list[Inputs] = []
        self.starts: list[int] = []

    def run(self, batch: Inputs, start: int) -> None:
        """The whole batch, for the statistics."""
        for part, begun in self._parts(batch, start):
            own, rest = self._keep(part, begun)
            if own is not None and self.gradients is not None:
                self.gradients.add(own, begun)
            if rest is not None:
                self.forward.run(rest, begun)

    def run_before(self, batch: Inputs, start: int) -> None:
        """A batch whose gradients are known."""
        for part, begun in self._parts(batch, start):
            _, rest = self._keep(part, begun)
            if rest is not None:
                self.forward.run_before(rest, begun)

    def state(self) -> dict[str, Tensor]:
        """The gradients; the samples come from the data again."""
        return self.gradients.state() if self.gradients is not None else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        if self.gradients is not None:
            self.gradients.restore(state)

    def samples(self, ranks: Ranks) -> Samples:
        """What was kept."""
        total = ranks.sums([sum(batch.batch_size or 1 for batch in self.batches)])[0]
        return Samples(tuple(self.batches), tuple(self.starts), int(total), ranks)

    def _parts(self, batch: Inputs, start: int) -> Iterator[tuple[Inputs, int]]:
        """A batch in parts that may run at once, and the number of each part's first sample."""
        samples = batch.batch_size
        if self.most is None or samples is None or samples <= self.most:
            yield batch, start
            return
        for begun in range(0, samples, self.most):
            yield batch.samples(begun, begun + self.most), start + begun

    def _keep(self, batch: Inputs, start: int) -> tuple[Inputs | None, Inputs | None]:
        """What is kept of a batch, and what of it runs without gradients."""
        count, left = batch.batch_size or 1, self.wanted - start
        if left <= 0:
            return None, batch
        own = batch.first(left) if self.most is not None else batch
        self.batches.append(own)
        self.starts.append(start)
        if self.gradients is None:
            return own, batch
        return own, batch.samples(left, count) if self.most is not None and count > left else None
