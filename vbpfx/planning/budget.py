"""Budget: choose the width of every block.

The neurons of all blocks stand in one ranking, lowest score first, with ties broken by block and index. Neurons are
removed in this order until the budget is met. Every block keeps at least its floor, the smallest width that it may
have. ``ratio`` is met to the neuron. For ``macs``, ``params`` and ``latency`` the smallest number of neurons is removed
that meets the budget. If widths must be multiples of a step, budgets are met as closely as the steps allow.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.errors import BudgetError
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.plans.records import KINDS, Block, Kind
from vbpfx.rules.layers import attention
from vbpfx.rules.table import operator_of

Cost = Callable[[Mapping[str, int]], int]

_KINDS = {
    "ratio": "fraction of the hidden neurons to remove",
    "macs": "fraction of the dense MACs to keep",
    "params": "fraction of the dense parameters to keep",
    "latency": "fraction of the dense latency to keep",
}


@dataclass(frozen=True)
class Budget:
    """How much to remove: ``kind`` is ``ratio``, ``macs``, ``params`` or ``latency``, and ``value`` is in (0, 1).

    ``shares`` are the ratios of several kinds of blocks, each by itself; ``value`` is then their mean.
    """

    kind: str
    value: float
    shares: Mapping[Kind, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> Budget:
        """Return the budget that is given as the one keyword argument that is not None.

        Raises:
            BudgetError: none or several are given, or the value is not a number in (0, 1).
        """
        named = {kind: value for kind, value in given.items() if value is not None}
        if len(named) != 1:
            options = ", ".join(f"{kind}= ({meaning})" for kind, meaning in _KINDS.items())
            found = " and ".join(f"{kind}={value!r}" for kind, value in named.items()) or "none"
            raise BudgetError(f"exactly one budget is needed, found {found}; choose one of {options}")
        kind, value = next(iter(named.items()))
        if kind == "ratio" and isinstance(value, Mapping):
            if not value or not set(value) <= set(KINDS):
                raise BudgetError(
                    f"ratio={value!r} names kinds of blocks with their ratios; choose from {', '.join(KINDS)}"
                )
            shares = {of: cls.of(ratio=share).value for of, share in value.items()}
            return cls(kind, sum(shares.values()) / len(shares), shares)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
            raise BudgetError(f"{kind}={value!r} is not a number between 0 and 1, exclusive: it is the {_KINDS[kind]}")
        return cls(kind, float(value))

    def apart(self) -> list[tuple[tuple[Kind, ...], Budget]]:
        """Return the kinds of blocks that are ranked together, each time with their own budget."""
        if not self.shares:
            return [(KINDS, self)]
        return [((kind,), Budget("ratio", share)) for kind, share in self.shares.items()]

    @property
    def stated(self) -> float | dict[Kind, float]:
        """The value as it was given."""
        return dict(self.shares) or self.value


def floors(blocks: Sequence[Block], min_width: int | None) -> dict[str, int]:
    """Return the smallest width of every block: ``min_width``, by default a sixteenth of the block's own width.

    A block whose channels are in groups keeps the same number of channels in each.
    """

    def least(block: Block) -> int:
        wanted = math.ceil(block.width / 16) if min_width is None else min_width
        return rounded_up(wanted, block.groups, block.width)

    return {block.name: least(block) for block in blocks}


def choose_widths(
    groups: Sequence[Sequence[Block]],
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    floor: Mapping[str, int],
    steps: Mapping[str, int],
    cost: Cost | None,
) -> dict[str, int]:
    """Return the width of every block under the budget.

    Args:
        groups: the blocks in groups. The blocks of a group have the same width before and afterwards.
        scores: block -> one score per neuron, (d,).
        floor: block -> its smallest width.
        steps: block -> the number that its width must be a multiple of, besides the number of its groups; the block's full
            width is always allowed. With ``ratio`` the total is as close to the budget as possible; the other budgets
            are never exceeded.
        cost: a function from widths to the MACs, parameters or latency of the whole model; None with ``ratio``.

    Raises:
        BudgetError: the budget cannot be met with the floors; the message names the nearest one that can.
    """
    heads = [group[0] for group in groups]
    full = {head.name: head.width for head in heads}
    limits = _Limits(groups, floor, steps)
    steps = limits.steps()
    lowest = limits.lowest()
    # the k-th removal from a group takes the k-th neuron of each of its blocks: its score is the mean of theirs
    ranked = [torch.stack([_ranked(scores[b.name], b.groups) for b in group]).mean(0) for group in groups]
    order = _removal_order(ranked, [(head.width - lowest[head.name]) // head.groups for head in heads])
    if not len(order):
        remedies = " or ".join(limits.remedies(lambda widths: widths != full))
        raise BudgetError(
            f"no budget can be met: {limits.named} leave no neuron that may go{limits.unmoved()}"
            + (f"; use {remedies}" if remedies else "")
        )

    def after(removed: int) -> dict[str, int]:
        gone = torch.bincount(order[:removed], minlength=len(heads)).tolist()
        return {head.name: head.width - count * head.groups for head, count in zip(heads, gone, strict=True)}

    def everywhere(widths: Mapping[str, int]) -> dict[str, int]:
        return {block.name: widths[group[0].name] for group in groups for block in group}

    def neurons(widths: Mapping[str, int]) -> int:
        return sum(widths[group[0].name] * len(group) for group in groups)

    if cost is None:
        total = neurons(full)
        wanted, most = round(budget.value * total), total - neurons(after(len(order)))
        if not wanted:
            raise BudgetError(f"ratio={budget.value:g} removes none of {total} neurons; use {1 / total:.1g} or more")
        if wanted > most:
            raise BudgetError(
                f"ratio={budget.value:g} removes {wanted} of {total} neurons, but {limits.named} leave at most {most}"
                f"{limits.unmoved()}; use ratio={math.floor(1e4 * most / total) / 1e4:g} or less"
                + "".join(f", or {r}" for r in limits.remedies(lambda widths: total - neurons(widths) >= wanted))
            )
        enough = _fewest(len(order), lambda removed: total - neurons(after(removed)) >= wanted)
        exact = min((after(max(0, enough - 1)), after(enough)), key=lambda w: abs(total - neurons(w) - wanted))
        kept = total - wanted
        # an excess of half a step is allowed, so that the total ends on the nearer side
        rounded = _round_widths(exact, full, lowest, steps, lambda widths: neurons(widths) - kept, 0.5)
        if rounded == full:
            step = max(steps.values())
            raise BudgetError(
                f"ratio={budget.value:g} removes {wanted} of {total} neurons, but widths must be multiples of {step}, and the nearest total with such widths keeps all the neurons. Use a larger ratio, or a smaller round_to"
            )
        return everywhere(rounded)

    def spent(widths: Mapping[str, int]) -> int:
        return cost(everywhere(widths))

    dense, target = spent(full), budget.value * spent(full)
    least = spent(after(len(order)))
    if least > target:
        raise BudgetError(
            f"{budget.kind}={budget.value:g} cannot be met: with every block as narrow as {limits.named} allow, {least / dense:.4f} of "
            f"the dense model's {budget.kind} remain{limits.unmoved()}; use {budget.kind}="
            f"{math.ceil(1e4 * least / dense) / 1e4:g} or more"
            + "".join(f", or {remedy}" for remedy in limits.remedies(lambda widths: spent(widths) <= target))
        )
    enough = _fewest(len(order), lambda removed: spent(after(removed)) <= target)
    return everywhere(_round_widths(after(enough), full, lowest, steps, lambda widths: spent(widths) - target))


@dataclass(frozen=True)
class _Limits:
    """What keeps blocks from becoming narrower: their floors, and the multiples that their widths must be.

    Attributes:
        groups: the blocks in groups of the same width.
        floor: block -> its smallest width.
        multiples: block -> the number that its width must be a multiple of, besides the number of its groups.
    """

    groups: Sequence[Sequence[Block]]
    floor: Mapping[str, int]
    multiples: Mapping[str, int]

    def steps(self, divisor: int = 1) -> dict[str, int]:
        """Return, for the first block of every group, what its width must be a multiple of; ``divisor`` makes it smaller."""
        heads = [group[0] for group in self.groups]
        return {h.name: math.lcm(max(1, self.multiples[h.name] // divisor), h.groups) for h in heads}

    def lowest(self, divisor: int = 1, *, floors: bool = True) -> dict[str, int]:
        """Return, for the first block of every group, its smallest width; without ``floors`` a single neuron may be left."""
        steps = self.steps(divisor)
        full = {group[0].name: group[0].width for group in self.groups}
        return {name: rounded_up(self.floor[name] if floors else 1, step, full[name]) for name, step in steps.items()}

    @property
    def rounds(self) -> bool:
        """Whether widths must be multiples of more than the number of their groups."""
        return self.steps() != self.steps(max(self.multiples.values()))

    @property
    def named(self) -> str:
        """The limits, for messages."""
        return "the floors and round_to" if self.rounds else "the floors"

    def unmoved(self) -> str:
        """Return how many blocks cannot be narrowed because of their multiples, with an example; "" if there are none."""
        lowest, free = self.lowest(), self.lowest(max(self.multiples.values()))
        stuck = [b for g in self.groups for b in g if lowest[g[0].name] == g[0].width > free[g[0].name]]
        if not stuck:
            return ""
        block = stuck[0]
        step = self.multiples[block.name]
        shared = f" and of its {block.groups} groups" if block.groups > 1 else ""
        return (
            f": {len(stuck)} of {sum(map(len, self.groups))} blocks keep all their neurons, among them {block.name}, because no smaller "
            f"width than {block.width} is a multiple of {step}{shared}"
        )

    def remedies(self, met: Callable[[dict[str, int]], bool]) -> list[str]:
        """Return which other options would make a budget possible.

        Args:
            met: whether the budget is met with these smallest widths, for the first block of every group.
        """
        most = max(self.multiples.values())
        smaller = next((k for k in _halves(most) if met(self.lowest(most // k))), None)
        found = ["a smaller min_width"] if met(self.lowest(floors=False)) else []
        found += [f"round_to={smaller}"] if smaller is not None else []
        together = self.rounds and met(self.lowest(most, floors=False))
        return found or (["a smaller min_width and round_to"] if together else [])


def _halves(number: int) -> list[int]:
    """Return the number divided by 2, 4, 8, ..., down to 1."""
    return [number >> power for power in range(1, number.bit_length())]


def same_shape(blocks: Sequence[Block], model: nn.Module) -> list[list[Block]]:
    """Return the blocks in groups whose layers have the same shapes, so that one configured number can serve a group."""
    tensors = named_tensors(model)
    groups: dict[Any, list[Block]] = defaultdict(list)
    for block in blocks:
        shapes = sorted((tuple(tensors[p.name].shape), p.axis, *p.place) for p in block.parameters)
        groups[block.width, block.groups, tuple(shapes)].append(block)
    return list(groups.values())


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """Return the smallest number up to ``most`` for which ``enough`` is true, by bisection."""
    few = 0
    while few < most:
        middle = (few + most) // 2
        few, most = (few, middle) if enough(middle) else (middle + 1, most)
    return most


def _ranked(scores: Tensor, groups: int) -> Tensor:
    """Return the scores of removals from a block, lowest first: each takes one neuron of every group of channels."""
    return scores.reshape(groups, -1).sort(dim=1, stable=True).values.mean(0)


def _removal_order(ranked: Sequence[Tensor], removable: Sequence[int]) -> Tensor:
    """Return the group number of every neuron that may be removed, lowest score first.

    Of each group ``removable`` neurons may be removed, those with its lowest scores; the floor protects the rest.
    """
    values = [scores[:count] for scores, count in zip(ranked, removable, strict=True)]
    owners = [torch.full((len(part),), number) for number, part in enumerate(values)]
    return torch.cat(owners)[torch.cat(values).argsort(stable=True)]


def kept_neurons(scores: Tensor, width: int, groups: int = 1) -> tuple[int, ...]:
    """Return the indices of the ``width`` highest scores, ascending; of equal scores the later ones are kept.

    With groups, these are the highest ``width / groups`` scores of each group.
    """
    parts = scores.reshape(groups, -1)
    size = parts.shape[1]
    order = parts.argsort(stable=True)[:, size - width // groups :] + size * torch.arange(groups)[:, None]
    return tuple(sorted(order.flatten().tolist()))


def _round_widths(
    exact: dict[str, int],
    full: Mapping[str, int],
    lowest: Mapping[str, int],
    steps: Mapping[str, int],
    excess: Callable[[Mapping[str, int]], float],
    slack: float = 0.0,
) -> dict[str, int]:
    """Round widths to steps: round all down, then round some up, largest remainder first.

    A width is rounded up if the excess over the budget is then at most ``slack`` of the step.
    """
    widths = {name: max(lowest[name], width // steps[name] * steps[name]) for name, width in exact.items()}
    widths = {name: exact[name] if exact[name] == full[name] else width for name, width in widths.items()}
    for name in sorted(exact, key=lambda name: widths[name] - exact[name]):
        wider = min(widths[name] + steps[name], full[name])
        if exact[name] > widths[name] and excess(widths | {name: wider}) <= slack * steps[name]:
            widths[name] = wider
    return widths


def rounded_up(width: int, step: int, full: int) -> int:
    """Return the next multiple of the step, or the full width if it is smaller."""
    return min(full, math.ceil(width / step) * step)


def require_positive(name: str, value: Any) -> int:
    """Return the value if it is a positive integer, and raise a BudgetError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BudgetError(f"{name}={value!r} is not a positive integer")
    return value


def require_memory(value: Any) -> float:
    """Return the value if it is a number of GiB above 0, and raise a BudgetError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise BudgetError(f"memory={value!r} is not a number of GiB above 0")
    return float(value)


def mac_cost(captured: Captured, blocks: Sequence[Block]) -> Cost:
    """Return a function from widths to the model's MACs per sample.

    The MACs of a node are linear in the size of each hidden axis that it carries or contracts. So they scale with w / d
    for each of these axes.
    """
    values = {node.name: node.meta["val"] for node in captured.graph_module.graph.nodes}
    counts, touching = _with_attention_divided(captured), _Axes()
    for block in blocks:
        for carrier in block.carriers:
            node, axis = carrier.node, carrier.axis
            touching.stand_on((node, axis), block, block.groups if carrier.of_one_group or block.has_experts else 1)
            touching.of[node][node, axis] = values[node].shape[axis]
        for factor in block.factors:
            source, axis = factor.source.node, factor.source.axis % values[factor.source.node].ndim
            where = factor.node + _LOGITS if factor.node + _LOGITS in counts else factor.node
            touching.of[where][source, axis] = values[source].shape[axis]
        for consumer in block.consumers:
            source, axis = consumer.source.node, consumer.source.axis % values[consumer.source.node].ndim
            touching.of[consumer.node][source, axis] = values[source].shape[axis]
    return _multilinear(counts, touching)


# The end of the name under which the products of queries and keys in an attention call are counted.
_LOGITS = " logits"


def _with_attention_divided(captured: Captured) -> dict[str, int]:
    """Return the MACs per node, with those of attention in two parts: products of queries and keys, and sums of values."""
    counts = dict(captured.macs)
    for name, count in captured.macs.items():
        node = captured.nodes[name]
        if operator_of(node).rule is attention:
            query, value = (node.args[i].meta["val"].shape[-1] for i in (0, 2))  # type: ignore[union-attr]
            counts[name + _LOGITS] = count * query // (query + value)
            counts[name] = count - counts[name + _LOGITS]
    return counts


def parameter_cost(model: nn.Module, blocks: Sequence[Block]) -> Cost:
    """Return a function from widths to the model's number of parameters, including the biases that folding adds."""
    tensors = named_tensors(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    touching = _Axes()
    for block in blocks:
        for entry in block.parameters:
            touching.stand_on((entry.name, entry.axis), block, entry.groups)
            touching.of[entry.name][entry.name, entry.axis] = tensors[entry.name].shape[entry.axis]
    created = {
        consumer.bias: (consumer.weight, 1 - consumer.weight_axis)
        for block in blocks
        for consumer in block.consumers
        if consumer.creates_bias and not consumer.padded
    }
    makers: dict[str, dict[str, Block]] = {bias: {} for bias in created}
    for block in blocks:
        for consumer in block.consumers:
            if consumer.bias in makers:
                makers[consumer.bias][block.name] = block
    count = _multilinear(sizes, touching)

    def cost(widths: Mapping[str, int]) -> int:
        biases = sum(
            touching.kept((weight, axis), tensors[weight].shape[axis], widths)
            for bias, (weight, axis) in created.items()
            if any(widths[block.name] < block.width for block in makers[bias].values())
        )
        return count(widths) + biases

    return cost


class _Axes:
    """The narrowed axes to whose sizes MACs or parameter counts are proportional.

    Attributes:
        of: node or parameter -> its narrowed axes with their sizes in the dense model.
    """

    def __init__(self) -> None:
        self.of: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
        self._blocks: dict[tuple[str, int], list[tuple[Block, int]]] = defaultdict(list)

    def stand_on(self, axis: tuple[str, int], block: Block, groups: int = 1) -> None:
        """Note that the block, or one of its groups, is a part of the axis; called once for every part that belongs to it."""
        self._blocks[axis].append((block, groups))

    def kept(self, axis: tuple[str, int], size: int, widths: Mapping[str, int]) -> int:
        """Return the size of an axis after its blocks are narrowed to these widths."""
        return size - sum((block.width - widths[block.name]) // groups for block, groups in self._blocks.get(axis, ()))


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
