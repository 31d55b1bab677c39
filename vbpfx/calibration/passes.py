"""Forward passes: what calibration does with a batch if only the statistics are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from vbpfx.data.inputs import Inputs


class Forward:
    """Calibration work that only runs forward passes, in which the graph's observers gather statistics.

    Args:
        forward: a function that runs a batch.
    """

    def __init__(self, forward: Callable[[Inputs], None]) -> None:
        self.forward = forward

    def run(self, batch: Inputs, start: int) -> None:
        """Run one batch."""
        self.forward(batch)

    def run_before(self, batch: Inputs, start: int) -> None:
        """Do nothing: the observers' restored moments include this batch."""

    def state(self) -> dict[str, Tensor]:
        """Return no state: the observers' moments are all."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: there is no state."""


def run_forward(observed: fx.GraphModule, inputs: Inputs) -> None:
    """Run one batch through the graph, without gradients."""
    with torch.inference_mode():
        inputs.run(observed)
