"""Forward passes: what calibration does with a batch where nothing more is wanted than the statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from vbpfx.data.inputs import Inputs


class Forward:
    """Forward passes, and nothing beside what the graph's observers gather.

    Args:
        forward: what runs a batch.
    """

    def __init__(self, forward: Callable[[Inputs], None]) -> None:
        self.forward = forward

    def run(self, batch: Inputs, start: int) -> None:
        """One batch."""
        self.forward(batch)

    def run_before(self, batch: Inputs, start: int) -> None:
        """Nothing: the observers have seen it."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the observers'."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


def run_forward(observed: fx.GraphModule, inputs: Inputs) -> None:
    """One batch through the graph, without gradients."""
    with torch.inference_mode():
        inputs.run(observed)
