"""Importance: the input of a criterion, which gives every hidden neuron of a block a score.

The neurons with the lowest scores are removed first.

h is the activation at a consumer's input, C is its covariance, and w_j is column j of the consumer's weight. If a block
has several consumer inputs, their scores are added (several calls of one layer count once). The criteria are in
:mod:`vbpfx.planning.criteria`, one per file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import Moments
from vbpfx.graph.capture import tensor_named
from vbpfx.plans.records import Block, Consumer


@dataclass(frozen=True)
class Scoring:
    """What a criterion gets to score a block's neurons.

    Attributes:
        block: the block; for a stack of experts, one of its experts.
        moments: the activation moments for every entry of ``block.sources``; those of several calls of one layer are
            pooled.
        model: the model, for its weights.
        ratio: the share of all neurons that will be removed, as far as it is known.
        samples: number of calibration samples.
    """

    block: Block
    moments: tuple[Moments, ...]
    model: nn.Module
    ratio: float
    samples: int

    @cached_property
    def inputs(self) -> list[tuple[Moments, Tensor]]:
        """The moments of every distinct consumer input, with the weights (out, d) that read it, float64."""
        found = []
        for pool in self.block.pools:
            sources = [self.block.sources[index] for index in pool]
            readers: dict[str, Consumer] = {c.weight: c for c in self.block.consumers if c.source in sources}
            weights = [columns(self.model, reader, self.block.width) for reader in readers.values()]
            found.append((self.moments[pool[0]], torch.cat(weights)))
        return found


Criterion = Callable[[Scoring], Tensor]


def columns(model: nn.Module, consumer: Consumer, width: int) -> Tensor:
    """Return the columns of a consumer's weight at a block's channels, (out, d) float64.

    The positions of a convolution's window count as further outputs. With groups, the columns are 0 at other groups' outputs. There
    are then as many rows as channels: outputs that have the same products of columns, W^T W. Of a stack, they are those of one expert
    (:meth:`vbpfx.plans.records.Block.expert`).
    """
    weight = tensor_named(model, consumer.weight).detach()
    if consumer.routing is not None:  # one expert of a stack
        return weight[consumer.routing.at].movedim(consumer.weight_axis - 1, -1).double().cpu()
    weight = weight.double().cpu()
    if consumer.groups > 1:
        parts = [rows.movedim(1, -1).reshape(-1, rows.shape[1]) for rows in weight.chunk(consumer.groups, 0)]
        whole: Tensor = torch.block_diag(*(_with_fewer_rows(part) for part in parts))  # type: ignore[no-untyped-call]
        return whole[:, consumer.source.at(range(width))]
    own = weight.index_select(consumer.weight_axis, consumer.source.at(range(width)))
    return own.movedim(consumer.weight_axis, -1).reshape(-1, width)


def _with_fewer_rows(weight: Tensor) -> Tensor:
    """Return a matrix R with R^T R = W^T W, and no more rows than columns."""
    return weight if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight, mode="r").R


def summed_variance(block: Block, moments: tuple[Moments, ...]) -> Tensor:
    """Return the sum of a block's variances over its consumer inputs, or over its factors, (d,) float64.

    Args:
        moments: as in :class:`Scoring`.
    """
    if block.has_experts:  # every expert reads channels of its own
        return torch.cat([m.variance.cpu() for m in moments])
    pools = [pool[0] for pool in block.pools] or range(len(moments))  # factors are read by no layer
    return torch.stack([moments[index].variance.cpu() for index in pools]).sum(0)
