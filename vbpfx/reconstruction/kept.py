"""The calibration samples that are kept: for gradients, sensitivities and reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import Ranks
from vbpfx.distributed.samples import Samples
from vbpfx.reconstruction.influence import Gradients


class Keeping:
    """Runs batches for a prepared graph's observers; keeps the first samples of the data, and takes gradients on these.

    Args:
        forward: what runs a batch, where no gradients are taken.
        samples: how many are kept, of all ranks together.
        gradients: on the prepared graph; None for none.
        divisible: whether the graph takes any number of samples: then batches are cut.
    """

    def __init__(
        self, forward: Callable[[Inputs], None], samples: int, gradients: Gradients | None, *, divisible: bool
    ) -> None:
        self.forward, self.wanted, self.gradients, self.divisible = forward, samples, gradients, divisible
        self.batches: list[Inputs] = []
        self.starts: list[int] = []

    def run(self, batch: Inputs, start: int) -> None:
        """The whole batch, for the statistics."""
        count, left = batch.batch_size or 1, self.wanted - start
        own = self._keep(batch, start)
        if own is not None and self.gradients is not None:
            self.gradients.add(own, start)
        if own is None or self.gradients is None:
            self.forward(batch)
        elif count > left and self.divisible:
            self.forward(batch.samples(left, count))

    def run_before(self, batch: Inputs, start: int) -> None:
        """A batch whose gradients are known."""
        self._keep(batch, start)

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

    def _keep(self, batch: Inputs, start: int) -> Inputs | None:
        """What is kept of a batch."""
        if start >= self.wanted:
            return None
        own = batch.first(self.wanted - start) if self.divisible else batch
        self.batches.append(own)
        self.starts.append(start)
        return own
