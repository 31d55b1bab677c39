"""Entries of a plan: what replaces the removed neurons of one block, and whether a constant channel is worth its place.

The constants a of removed neurons go into the bias of the layer that reads them. A layer that pads with zeros needs a
constant channel for them in every group of channels (:class:`vbpfx.plans.records.ConstantChannel`), in place of one more
neuron. So there are two ways to fill a block of the same width:

- as many neurons as the width, and a = 0 at the layers that pad. Predictions then run through the origin:
  B = S_PK (S_KK + lambda s I)^-1, with the second moments S = C + mu mu^T.
- one neuron less in every group, and a constant channel.

The way with the smaller expected error in the outputs of these layers is taken,

    sum tr(W_P R W_P^T) + |W_P e|^2,    R = Cov(h_P - B h_K),    e = mu_P - a - B mu_K.

The first term is summed over the taps of a window one by one. In the second, the error e is the same at all taps, so
the taps of W_P are summed first.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import Moments
from vbpfx.graph.capture import tensor_named
from vbpfx.planning.budget import kept_neurons
from vbpfx.planning.compensate import Compensation, about_zero, fold
from vbpfx.planning.experts import entry_of_experts
from vbpfx.planning.importance import columns
from vbpfx.plans.records import Block, BlockPlan, Consumer


def block_plan(
    block: Block,
    kept: tuple[int, ...],
    scores: Tensor,
    moments: Sequence[Moments],
    compensation: Compensation,
    model: nn.Module,
) -> BlockPlan:
    """Return the entry for a block of a given width.

    Args:
        block: the block.
        kept: the neurons with the highest scores, as many as the block's new width.
        scores: one score per neuron. If a constant channel takes a place, the kept neurons with the lowest scores make room.
        moments: for every source, :func:`pooled`.
        compensation: what replaces removed neurons.
        model: the dense model, for its weights.
    """
    if block.has_experts:
        return entry_of_experts(block, kept, moments, compensation)
    if block.constant is None:
        return _entry(block, kept, moments, compensation)
    origin = _about_zero_where_padded(block, moments)
    without = _entry(block, kept, origin, compensation)
    if len(kept) < 2 * block.groups:
        return without
    with_constant = _entry(block, kept_neurons(scores, len(kept) - block.groups, block.groups), moments, compensation)
    if not with_constant.constants_in:
        return without
    return min(without, with_constant, key=lambda entry: _expected_error(entry, moments, model))


def _entry(block: Block, kept: tuple[int, ...], moments: Sequence[Moments], compensation: Compensation) -> BlockPlan:
    stays = torch.tensor(kept)
    goes = torch.tensor(sorted(set(range(block.width)) - set(kept)))
    # pooled moments are one object, and so is what replaces their neurons
    once: dict[tuple[int, bool], tuple[Tensor, Tensor | None]] = {}
    found: list[tuple[Tensor, Tensor | None]] = []
    for m, source in zip(moments, block.sources, strict=True):
        if not block.takes_constants(source):
            found.append((torch.zeros(len(goes), dtype=torch.float64), None))
            continue
        key = (id(m), block.takes_prediction(source))
        if key not in once:
            once[key] = compensation(m, stays, goes, key[1])
        found.append(once[key])
    padded = {consumer.source for consumer in block.consumers if consumer.padded}
    needed = any(bool(a.any()) for (a, _), source in zip(found, block.sources, strict=True) if source in padded)
    first = [group[0] for group in block.in_groups(goes.tolist())] if needed else []
    constants_in = tuple(number * block.group_size + channel for number, channel in enumerate(first))
    return BlockPlan(block, kept, tuple(a for a, _ in found), tuple(b for _, b in found), constants_in)


def _expected_error(entry: BlockPlan, moments: Sequence[Moments], model: nn.Module) -> float:
    """Return the expected squared error in the outputs of the layers that read a block, for one position."""
    block, total = entry.block, 0.0
    stays, goes = torch.tensor(entry.kept), torch.tensor(entry.pruned)
    readers: dict[tuple[str, int], Consumer] = {(c.weight, c.source.start): c for c in block.consumers}
    for reader in readers.values():
        m = moments[block.sources.index(reader.source)]
        a, prediction = entry.constants_at(reader.source), entry.prediction_at(reader.source)
        weight = columns(model, reader, block.width)[:, goes]
        mean = m.mean.cpu()
        offset = mean[goes] - a
        if prediction is None:
            total += float(weight.square().sum(0) @ m.variance.cpu()[goes])
        else:
            offset -= prediction @ mean[stays]
            c = m.all_co.covariance.cpu()
            left = c[goes] - prediction @ c[stays]
            residual = left[:, goes] - left[:, stays] @ prediction.T
            total += float(((weight @ residual) * weight).sum())
        dense = tensor_named(model, reader.weight)
        shift = fold(dense, reader.weight_axis, reader.source.at(entry.pruned), offset, reader.groups)
        total += float(shift.square().sum())
    return total


def pooled(block: Block, moments: Sequence[Moments]) -> tuple[Moments, ...]:
    """Return the moments of every source, merged where one layer reads several sources in several calls.

    The calls of a layer share its weights, so the same values must replace their removed neurons. Where a grouped convolution
    reads a source, covariances between different groups are set to 0, so that nothing is predicted from another group. The moments of
    experts are one for each expert; they are taken about zero if the experts have no bias for constants.
    """
    if block.has_experts:
        return tuple(moments) if block.consumers[0].bias else tuple(about_zero(m) for m in moments)
    merged = list(moments)
    for pool in block.pools:
        together = _within_groups(functools.reduce(operator.or_, (moments[index] for index in pool)), block, pool)
        for index in pool:
            merged[index] = together
    return tuple(merged)


def _within_groups(moments: Moments, block: Block, pool: Sequence[int]) -> Moments:
    """Return a pool's moments with covariances of 0 between channels that its readers read in different groups."""
    together = block.read_together(block.sources[pool[0]])
    if together is None:
        return moments
    co, held_out = (None if c is None else replace(c, together=together) for c in (moments.co, moments.held_out))
    return replace(moments, co=co, held_out=held_out)


def _about_zero_where_padded(block: Block, moments: Sequence[Moments]) -> tuple[Moments, ...]:
    """Return the moments, taken about zero and with a mean of zero wherever a layer that pads reads them."""
    padded = {block.sources.index(consumer.source) for consumer in block.consumers if consumer.padded}
    found = list(moments)
    for pool in block.pools:
        if padded & set(pool):
            at_zero = _within_groups(about_zero(moments[pool[0]]), block, pool)
            for index in pool:
                found[index] = at_zero
    return tuple(found)
