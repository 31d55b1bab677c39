"""Multiples: what widths are rounded to, and to how much less where that would leave nothing, or too little, to remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vbpfx.graph.capture import Captured
from vbpfx.planning.budget import Budget, Cost, mac_cost, parameter_cost, rounded_up
from vbpfx.plans.records import Block
from vbpfx.rules.ops import called_module, is_convolution

# The multiple at which convolutions are fast in every runtime that was measured.
CHANNELS = 8


def width_steps(
    captured: Captured, blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int], round_to: int | None
) -> dict[str, int]:
    """What the width of every block is a multiple of: ``round_to``; where it is None, 8 for convolutions, 4 for those of 5 to 8 channels.

    Runtimes lay the channels of convolutions out in groups of 8, or of halves, and an odd width costs more than it saves, in the
    narrowest layers, too. Products of matrices take any width (``benchmarks/rounding.py``).
    """
    if round_to is not None:
        return dict.fromkeys((block.name for block in blocks), round_to)
    convolved = blocks_with_convolutions(captured, blocks)

    def steps(most: int) -> dict[str, int]:
        return {b.name: min(most, _below(CHANNELS, b.width)) if b.name in convolved else 1 for b in blocks}

    return steps(_fitting(CHANNELS, steps, captured, blocks, budget, floor))


def fitting_multiple(
    multiple: int, captured: Captured, blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int]
) -> int:
    """The multiple, halved until all blocks can be rounded to it and the budget is still met."""

    def steps(most: int) -> dict[str, int]:
        return dict.fromkeys((block.name for block in blocks), most)

    return _fitting(multiple, steps, captured, blocks, budget, floor)


def blocks_with_convolutions(captured: Captured, blocks: Sequence[Block]) -> set[str]:
    """The names of the blocks that a convolution makes, carries or reads."""
    graph = captured.graph_module
    convolutions = {n.name for n in graph.graph.nodes if is_convolution(n, called_module(graph, n))}
    return {
        block.name
        for block in blocks
        if convolutions
        & {*(carrier.node for carrier in block.carriers), *(consumer.node for consumer in block.consumers)}
    }


def _fitting(
    multiple: int,
    steps: Callable[[int], Mapping[str, int]],
    captured: Captured,
    blocks: Sequence[Block],
    budget: Budget,
    floor: Mapping[str, int],
) -> int:
    cost: Cost | None = None
    if budget.kind == "macs":
        cost = mac_cost(captured, blocks)
    elif budget.kind == "params":
        cost = parameter_cost(captured.reference, blocks)
    while multiple > 1 and not _is_met(steps(multiple), blocks, budget, floor, cost):
        multiple //= 2
    return multiple


def _is_met(
    steps: Mapping[str, int], blocks: Sequence[Block], budget: Budget, floor: Mapping[str, int], cost: Cost | None
) -> bool:
    """Whether the blocks can give what the budget asks at these steps, and the nearest total is not all of them."""
    full = {block.name: block.width for block in blocks}
    lowest = {name: rounded_up(floor[name], steps[name], width) for name, width in full.items()}
    if cost is not None:
        return cost(lowest) <= budget.value * cost(full)
    removable = sum(full.values()) - sum(lowest.values())
    if budget.kind == "latency":  # what widths cost there is measured later
        return removable > 0
    wanted = round(budget.value * sum(full.values()))
    spare = [steps[name] for name in full if lowest[name] < full[name]]
    return bool(spare) and wanted <= removable and 2 * wanted > min(spare)


def _below(multiple: int, width: int) -> int:
    """The multiple, halved until it is smaller than the width."""
    while multiple > 1 and multiple >= width:
        multiple //= 2
    return multiple
