"""Calibration samples that are kept in memory for gradients, sensitivities and reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from vbpfx.calibration.checkpoint import Work
from vbpfx.calibration.samples import Samples
from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import Ranks
from vbpfx.reconstruction.influence import Gradients


class Keeping:
    """Calibration work that keeps the first samples of the data, and takes gradients on them.

    Every batch runs through the prepared graph, whose observers gather statistics. A batch that is larger than ``most``
    runs in parts, and these parts are kept in its place. All later stages run the kept parts one by one, so they do not
    hold more samples at once either.

    Args:
        forward: runs the samples for which no gradients are taken.
        samples: the number of samples to keep, of all ranks together.
        gradients: the gradients on the prepared graph; None to take none.
        most: the largest number of samples that run at once; None if the graph does not accept every batch size, so
            that batches cannot be split.
    """

    def __init__(self, forward: Work, samples: int, gradients: Gradients | None, *, most: int | None) -> None:
        self.forward, self.wanted, self.gradients, self.most = forward, samples, gradients, most
        self.batches: list[Inputs] = []
        self.starts: list[int] = []

    def run(self, batch: Inputs, start: int) -> None:
        """Run the whole batch, and keep the samples of it that are still wanted."""
        for part, begun in self._parts(batch, start):
            own, rest = self._keep(part, begun)
            if own is not None and self.gradients is not None:
                self.gradients.add(own, begun)
            if rest is not None:
                self.forward.run(rest, begun)

    def run_before(self, batch: Inputs, start: int) -> None:
        """Keep the wanted samples of a batch that a checkpoint covers, and do not run it again."""
        for part, begun in self._parts(batch, start):
            _, rest = self._keep(part, begun)
            if rest is not None:
                self.forward.run_before(rest, begun)

    def state(self) -> dict[str, Tensor]:
        """Return the gradients' state. The samples are not a part of it: they are read from the data again."""
        return self.gradients.state() if self.gradients is not None else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned."""
        if self.gradients is not None:
            self.gradients.restore(state)

    def samples(self, ranks: Ranks) -> Samples:
        """Return the kept samples."""
        total = ranks.sums([sum(batch.batch_size or 1 for batch in self.batches)])[0]
        return Samples(tuple(self.batches), tuple(self.starts), int(total), ranks)

    def _parts(self, batch: Inputs, start: int) -> Iterator[tuple[Inputs, int]]:
        """Yield the batch in parts that are small enough to run at once, each with the number of its first sample."""
        samples = batch.batch_size
        if self.most is None or samples is None or samples <= self.most:
            yield batch, start
            return
        for begun in range(0, samples, self.most):
            yield batch.samples(begun, begun + self.most), start + begun

    def _keep(self, batch: Inputs, start: int) -> tuple[Inputs | None, Inputs | None]:
        """Keep what is still wanted of a batch. Return the kept part, and the part that runs without gradients."""
        count, left = batch.batch_size or 1, self.wanted - start
        if left <= 0:
            return None, batch
        own = batch.first(left) if self.most is not None else batch
        self.batches.append(own)
        self.starts.append(start)
        if self.gradients is None:
            return own, batch
        return own, batch.samples(left, count) if self.most is not None and count > left else None
