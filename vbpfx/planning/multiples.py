"""Limits of widths: the number that they are rounded to, and their floors, both smaller if the budget could not be met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from vbpfx.graph.capture import Captured
from vbpfx.planning.budget import Budget, Cost, floors, mac_cost, parameter_cost, rounded_up
from vbpfx.plans.records import Block
from vbpfx.rules.calls import called_module
from vbpfx.rules.layers import convolution
from vbpfx.rules.table import operator_of

# Convolutions are fast at multiples of this in every runtime that was measured.
CHANNELS = 8
# ONNX Runtime's layout holds 16 channels on processors with AVX-512. A grouped convolution leaves it, and its neighbours
# convert their values, unless every group fills it; without groups the layout is filled up with zeros.
_WIDER_IN_GROUPS = 2
# Kernels of grouped products accept rows of a multiple of this only.
_GROUPED_PRODUCT_BYTES = 16


def width_steps(
    captured: Captured, blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int], round_to: int | None
) -> dict[str, int]:
    """Return, for every block, the number that its width must be a multiple of.

    It is ``round_to``, if given. Otherwise it is 8 for blocks with convolutions, 4 for those of 5 to 8 channels, and
    smaller if the budget could not be met; it is 1 for all other blocks. With groups, the width of each group is a
    multiple of 16, or of a smaller power of 2 if the group is narrower. Runtimes lay the channels of convolutions out
    in groups of 8 or of 4, and an odd width costs more than it saves, even in the narrowest layers. Matrix products are
    fast at any width (``benchmarks/rounding.py``).
    """
    least = {block.name: least_step(block, captured) for block in blocks}
    aligned = {b.name: least[b.name] if least[b.name] > b.groups else 1 for b in blocks}
    if round_to is not None:
        return {name: math.lcm(round_to, step) for name, step in aligned.items()}
    convolved = blocks_with_convolutions(captured, blocks)

    def steps(most: int) -> dict[str, int]:
        return {b.name: b.groups * _in_a_group(b, most) if b.name in convolved else aligned[b.name] for b in blocks}

    return steps(_fitting(CHANNELS, steps, captured, blocks, budget, floor))


def least_step(block: Block, captured: Captured) -> int:
    """Return the number that a block's width must be a multiple of, whatever the rounding: its number of groups.

    In a stack of experts that grouped products read, the width of each expert is also a multiple of 16 bytes, which their kernels
    require, unless the dense width is none.
    """
    if not any(consumer.routing is not None and consumer.routing.kind == "offsets" for consumer in block.consumers):
        return block.groups
    alignment = max(1, _GROUPED_PRODUCT_BYTES // captured.nodes[block.sources[0].node].meta["val"].element_size())
    return block.groups * (alignment if block.group_size % alignment == 0 else 1)


def fitting_floors(
    captured: Captured, blocks: Sequence[Block], budget: Budget, min_width: int | None, *, constants: bool
) -> dict[str, int]:
    """Return the smallest width of every block: ``min_width``, by default a sixteenth of its own, as a possible multiple.

    If a layer that pads reads a block, each group keeps two channels: one neuron, and a constant channel, without which the
    means of all other neurons would be lost. It may keep one if the budget could not be met otherwise. Groups of two channels
    have no place for both.

    Args:
        constants: whether constants replace removed neurons.
    """
    steps = {block.name: least_step(block, captured) for block in blocks}
    wanted = floors(blocks, min_width)
    least = {block.name: rounded_up(wanted[block.name], steps[block.name], block.width) for block in blocks}
    needing = {b.name: 2 * b.groups for b in blocks if constants and b.constant is not None and b.group_size > 2}
    roomy = {name: max(width, needing.get(name, 1)) for name, width in least.items()}
    return roomy if _is_met(steps, blocks, budget, roomy, cost_of(captured, blocks, budget)) else least


def fitting_multiple(
    multiple: int, captured: Captured, blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int]
) -> int:
    """Return the multiple, halved until the budget can be met with the widths of all blocks rounded to it."""

    def steps(most: int) -> dict[str, int]:
        return {block.name: math.lcm(most, least_step(block, captured)) for block in blocks}

    return _fitting(multiple, steps, captured, blocks, budget, floor)


def blocks_with_convolutions(captured: Captured, blocks: Sequence[Block]) -> set[str]:
    """Return the names of the blocks that a convolution produces, carries or reads."""
    graph = captured.graph_module
    convolutions = {n.name for n in graph.graph.nodes if operator_of(n, called_module(graph, n)).rule is convolution}
    return {
        block.name
        for block in blocks
        if convolutions & {*(carrier.node for carrier in block.carriers), *(reader.node for reader in block.readers)}
    }


def _fitting(
    multiple: int,
    steps: Callable[[int], Mapping[str, int]],
    captured: Captured,
    blocks: Sequence[Block],
    budget: Budget,
    floor: Mapping[str, int],
) -> int:
    cost = cost_of(captured, blocks, budget)
    while multiple > 1 and not _is_met(steps(multiple), blocks, budget, floor, cost):
        multiple //= 2
    return multiple


def cost_of(captured: Captured, blocks: Sequence[Block], budget: Budget) -> Cost | None:
    """Return a function from widths to what the budget counts; None for a ratio and for latencies."""
    if budget.kind == "macs":
        return mac_cost(captured, blocks)
    return parameter_cost(captured.reference, blocks) if budget.kind == "params" else None


def _is_met(
    steps: Mapping[str, int], blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int], cost: Cost | None
) -> bool:
    """Return whether the budget can be met with these steps, without rounding all blocks to their full widths."""
    full = {block.name: block.width for block in blocks}
    lowest = {name: rounded_up(floor[name], steps[name], width) for name, width in full.items()}
    if cost is not None:
        return cost(lowest) <= budget.value * cost(full)
    removable = sum(full.values()) - sum(lowest.values())
    if budget.kind == "latency":  # the latency of these widths is only measured later
        return removable > 0
    wanted = round(budget.value * sum(full.values()))
    spare = [steps[name] for name in full if lowest[name] < full[name]]
    return bool(spare) and wanted <= removable and 2 * wanted > min(spare)


def _in_a_group(block: Block, most: int) -> int:
    """Return the multiple for one group of a convolution's channels; ``most`` is the multiple for a single group."""
    wider = _WIDER_IN_GROUPS if block.groups > 1 else 1
    return min(wider * most, _below(wider * CHANNELS, block.group_size))


def _below(multiple: int, width: int) -> int:
    """Return the multiple, halved until it is smaller than the width."""
    while multiple > 1 and multiple >= width:
        multiple //= 2
    return multiple
