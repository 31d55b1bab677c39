"""Choice: which neurons of a block stay, by greedy elimination from the fit of the layer that reads them.

The elimination (:mod:`vbpfx.planning.elimination`) starts from the layer's fit on all channels. All columns of a channel go together.
If the channels of the block are in groups, each group loses as many. A layer that pads its input has a place for a constant channel
in each group, or for one more neuron; the way that costs less is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbpfx.planning.elimination import PENALTY, elimination_costs
from vbpfx.plans.records import BlockPlan
from vbpfx.reconstruction.layer_input import LayerInput, Part
from vbpfx.reconstruction.regression import Sums


@dataclass(frozen=True)
class Regression:
    """The regression of one part of a layer.

    Attributes:
        part: the part.
        weight: its weights as a matrix (outputs, columns), in the dense network.
        sums: the sums of its rows.
    """

    part: Part
    weight: Tensor
    sums: Sums


@dataclass(frozen=True)
class Removal:
    """Neurons to remove, and what that costs.

    Attributes:
        cost: how much the squared error of the layers that read the block grows.
        pruned: the neurons, ascending.
        constants: how many constant channels stay in each group.
    """

    cost: float
    pruned: list[int]
    constants: int


class Choice:
    """The choice of a block's neurons at one layer.

    Args:
        entry: the plan's entry for the block, whose width is kept.
        read: what the layer reads.
        positions: the block's channels among the layer's.
        gone: the layer's channels that are removed already.
    """

    def __init__(self, entry: BlockPlan, read: LayerInput, positions: Tensor, gone: Iterable[int]) -> None:
        self.entry, self.read, self.positions, self.gone = entry, read, positions, set(gone)
        self.block = entry.block
        self.constant = next((read.channels + i for i, h in enumerate(read.held) if h.block == self.block.name), None)
        self.means = torch.zeros(self.block.width, dtype=torch.float64)
        self._ways = [(False, self._planned())] if self.constant is None else [(True, 0), (False, 1)]
        if entry.width < 2 * self.block.groups:
            self._ways = self._ways[:1]
        self._found = [Removal(0.0, [], constants) for _, constants in self._ways]

    def _planned(self) -> int:
        """Return how many constant channels the plan has in each group."""
        return len(self.entry.constants_in) // self.block.groups

    def eliminate(self, regression: Regression, fitted: Tensor, others: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Choose the neurons that one part of the layer reads.

        Args:
            regression: the part's regression.
            fitted: its fit on all channels, (outputs, columns), which errors are measured by.
            others: for every other layer that reads the block its weight (out, n, ...) at n of the block's channels, and these.
        """
        part, block = regression.part, self.block
        (own,) = part.holds(self.positions).nonzero(as_tuple=True)  # the block's channels that the part reads
        local = self.positions[own] - part.first
        weights = []
        for weight, channels in others:
            here = torch.isin(channels, own)
            at = self.positions[channels[here]] - part.first
            weights.append(self.read.of_another(weight[:, here], at, part))
        present = torch.tensor([i for i, c in enumerate(part.channels) if c not in self.gone])
        place = {int(c): i for i, c in enumerate(present)}
        among = torch.tensor([place[int(c)] for c in local])
        columns = self.read.columns(present)
        inputs = [(regression.sums.all.xx[columns][:, columns], torch.cat([fitted, *weights])[:, columns])]
        groups = own // block.group_size
        self.means[own] = self.read.means(regression.sums.mean_x, part)[local]
        for number, (without, constants) in enumerate(self._ways):
            each = block.group_size - self.entry.width // block.groups + constants
            first = place[part.channels.index(self.constant)] if without and self.constant is not None else None
            remove = each * len(set(groups.tolist())) + without
            order, costs = elimination_costs(
                inputs, remove, among, PENALTY, group=self.read.taps, first=first, shares=groups
            )
            neuron = dict(zip(among.tolist(), own.tolist(), strict=True))
            before = self._found[number]
            pruned = sorted([*before.pruned, *(neuron[i] for i in order.tolist() if i in neuron)])
            self._found[number] = Removal(before.cost + float(costs.sum()), pruned, constants)

    def result(self) -> BlockPlan:
        """Return the entry with the chosen neurons; the means of the others are their constants."""
        block, best = self.block, min(self._found, key=lambda way: way.cost)
        constants_in = tuple(
            number * block.group_size + channel
            for number, gone in enumerate(block.in_groups(best.pruned))
            for channel in gone[: best.constants]
        )
        # without a constant channel, layers that pad the axis have no place for constants
        without = {c.source for c in block.consumers if c.padded and not constants_in}
        means = self.means[best.pruned]
        constants = tuple(torch.zeros_like(means) if source in without else means for source in block.sources)
        kept = tuple(sorted(set(range(block.width)) - set(best.pruned)))
        return BlockPlan(block, kept, constants, constants_in=constants_in)
