"""Budget: how wide every block stays.

One ranking over the neurons of all blocks, lowest score first, ties by block and index; the budget says
how far down it goes. Every block keeps at least its floor. ``ratio`` is met to the neuron; ``macs`` and
``params`` by the smallest number of neurons whose removal is enough.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.capture import Captured, named_tensors
from vbpfx.errors import BudgetError
from vbpfx.records import Block

Cost = Callable[[Mapping[str, int]], int]

_KINDS = {
    "ratio": "fraction of the hidden neurons to remove",
    "macs": "fraction of the dense MACs to keep",
    "params": "fraction of the dense parameters to keep",
}


@dataclass(frozen=True)
class Budget:
    """How much to remove: one of ``ratio``, ``macs``, ``params``, and its value in (0, 1)."""

    kind: str
    value: float

    @classmethod
    def of(cls, **given: Any) -> Budget:
        """The one budget among the keyword arguments that is not None.

        Raises:
            BudgetError: none or several are given, or the value is no number in (0, 1).
        """
        named = {kind: value for kind, value in given.items() if value is not None}
        if len(named) != 1:
            options = ", ".join(f"{kind}= ({meaning})" for kind, meaning in _KINDS.items())
            found = " and ".join(f"{kind}={value!r}" for kind, value in named.items()) or "none"
            raise BudgetError(f"exactly one budget is needed, found {found}; choose one of {options}")
        kind, value = next(iter(named.items()))
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
            raise BudgetError(f"{kind}={value!r} is not a number between 0 and 1, exclusive: it is the {_KINDS[kind]}")
        return cls(kind, float(value))


def floors(blocks: Sequence[Block], min_width: int | None) -> dict[str, int]:
    """Smallest width of every block: ``min_width``, by default a sixteenth of the block's own width."""
    if min_width is None:
        return {block.name: math.ceil(block.width / 16) for block in blocks}
    return {block.name: min(min_width, block.width) for block in blocks}


def choose_widths(
    blocks: Sequence[Block],
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    floor: Mapping[str, int],
    round_to: int,
    cost: Cost | None,
) -> dict[str, int]:
    """The width of every block under the budget.

    Args:
        scores: one per neuron, (d,).
        floor: smallest width per block.
        round_to: widths are multiples of it, or the block's own width. Under ``ratio`` the total is the
            nearest one possible; ``macs`` and ``params`` are never exceeded.
        cost: MACs or parameters of the whole model at given widths; None under ``ratio``.

    Raises:
        BudgetError: the budget cannot be met above the floors; the nearest that can is named.
    """
    full = {block.name: block.width for block in blocks}
    lowest = {name: _rounded_up(floor[name], round_to, full[name]) for name in full}
    order = _removal_order(blocks, scores, lowest)
    if not len(order):
        raise BudgetError("no budget can be met: min_width and round_to leave no neuron that may go; use smaller ones")

    def after(removed: int) -> dict[str, int]:
        gone = torch.bincount(order[:removed], minlength=len(blocks)).tolist()
        return {block.name: block.width - count for block, count in zip(blocks, gone, strict=True)}

    if cost is None:
        total = sum(full.values())
        wanted = round(budget.value * total)
        if not wanted:
            raise BudgetError(f"ratio={budget.value:g} removes none of {total} neurons; use {1 / total:.1g} or more")
        if wanted > len(order):
            raise BudgetError(
                f"ratio={budget.value:g} removes {wanted} of {total} neurons, but the floors leave at most "
                f"{len(order)}; use ratio={math.floor(1e4 * len(order) / total) / 1e4:g} or less, or a smaller min_width"
            )
        exact = after(wanted)
        # half a step of excess: the total ends on whichever side is nearer
        kept = total - wanted + round_to / 2
        return _round_widths(exact, full, lowest, round_to, lambda widths: sum(widths.values()) - kept)
    dense, target = cost(full), budget.value * cost(full)
    least = cost(after(len(order)))
    if least > target:
        raise BudgetError(
            f"{budget.kind}={budget.value:g} cannot be met: with every block at its floor {least / dense:.4f} of the "
            f"dense model's {budget.kind} remain; use {budget.kind}={math.ceil(1e4 * least / dense) / 1e4:g} or more, "
            f"or a smaller min_width"
        )
    few, enough = 0, len(order)
    while few < enough:
        middle = (few + enough) // 2
        few, enough = (few, middle) if cost(after(middle)) <= target else (middle + 1, enough)
    return _round_widths(after(enough), full, lowest, round_to, lambda widths: cost(widths) - target)


def _removal_order(blocks: Sequence[Block], scores: Mapping[str, Tensor], lowest: Mapping[str, int]) -> Tensor:
    """Block number of every neuron that may go, lowest score first."""
    values, owners = [], []
    for number, block in enumerate(blocks):
        # What the floor protects are the block's own best neurons.
        removable = scores[block.name].sort(stable=True).values[: block.width - lowest[block.name]]
        values.append(removable)
        owners.append(torch.full((len(removable),), number))
    return torch.cat(owners)[torch.cat(values).argsort(stable=True)]


def kept_neurons(scores: Tensor, width: int) -> tuple[int, ...]:
    """Indices of the ``width`` highest scores, ascending; of equal scores the later one stays."""
    return tuple(sorted(scores.argsort(stable=True)[len(scores) - width :].tolist()))


def _round_widths(
    exact: dict[str, int],
    full: Mapping[str, int],
    lowest: Mapping[str, int],
    round_to: int,
    excess: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """Round down, then give back whole steps, largest remainder first, while the excess is not positive."""
    if round_to == 1:
        return exact
    widths = {name: max(lowest[name], width // round_to * round_to) for name, width in exact.items()}
    widths = {name: exact[name] if exact[name] == full[name] else width for name, width in widths.items()}
    for name in sorted(exact, key=lambda name: widths[name] - exact[name]):
        wider = min(widths[name] + round_to, full[name])
        if exact[name] > widths[name] and excess(widths | {name: wider}) <= 0:
            widths[name] = wider
    return widths


def _rounded_up(width: int, step: int, full: int) -> int:
    return min(full, math.ceil(width / step) * step)


def require_positive(name: str, value: Any) -> int:
    """The value, if it is a positive integer; a BudgetError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BudgetError(f"{name}={value!r} is not a positive integer")
    return value


def mac_cost(captured: Captured, blocks: Sequence[Block]) -> Cost:
    """MACs of the model per sample at given widths.

    Every product is linear in each hidden axis that its node carries or contracts, so a node's count
    scales with w / d of each.
    """
    values = {node.name: node.meta["val"] for node in captured.graph_module.graph.nodes}
    touching = _Axes()
    for block in blocks:
        for node, axis, _ in block.carriers:
            touching.stand_on((node, axis), block)
            touching.of[node][node, axis] = values[node].shape[axis]
        for consumer in block.consumers:
            source, axis = consumer.source.node, consumer.source.axis % values[consumer.source.node].ndim
            touching.of[consumer.node][source, axis] = values[source].shape[axis]
    return _multilinear(captured.macs, touching)


def parameter_cost(model: nn.Module, blocks: Sequence[Block]) -> Cost:
    """Parameters of the model at given widths, the biases that the fold makes included."""
    tensors = named_tensors(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    touching = _Axes()
    for block in blocks:
        for entry in block.parameters:
            touching.stand_on((entry.name, entry.axis), block)
            touching.of[entry.name][entry.name, entry.axis] = tensors[entry.name].shape[entry.axis]
    created = {
        consumer.bias: (consumer.weight, 1 - consumer.weight_axis)
        for block in blocks
        for consumer in block.consumers
        if consumer.creates_bias
    }
    makers = {bias: [block for block in blocks if any(c.bias == bias for c in block.consumers)] for bias in created}
    count = _multilinear(sizes, touching)

    def cost(widths: Mapping[str, int]) -> int:
        biases = sum(
            touching.kept((weight, axis), tensors[weight].shape[axis], widths)
            for bias, (weight, axis) in created.items()
            if any(widths[block.name] < block.width for block in makers[bias])
        )
        return count(widths) + biases

    return cost


class _Axes:
    """The narrowed axes that counts are proportional to.

    Attributes:
        of: node or parameter -> its narrowed axes, with their sizes.
    """

    def __init__(self) -> None:
        self.of: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
        self._blocks: dict[tuple[str, int], list[Block]] = defaultdict(list)

    def stand_on(self, axis: tuple[str, int], block: Block) -> None:
        """The block is a part of the axis; said once for every part that it is."""
        self._blocks[axis].append(block)

    def kept(self, axis: tuple[str, int], size: int, widths: Mapping[str, int]) -> int:
        """Size of an axis afterwards."""
        return size - sum(block.width - widths[block.name] for block in self._blocks.get(axis, ()))


def _multilinear(counts: Mapping[str, int], touching: _Axes) -> Cost:
    fixed = sum(count for name, count in counts.items() if name not in touching.of)
    moving = [(counts[name], axes) for name, axes in touching.of.items() if counts.get(name)]

    def cost(widths: Mapping[str, int]) -> int:
        total = fixed
        for count, axes in moving:
            for axis, size in axes.items():
                count = count * touching.kept(axis, size, widths) // size
            total += count
        return total

    return cost
