"""Steps: which layers are fitted block after block, in which order, and whose neurons are chosen on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vbpfx.analysis.blocks import Analysis
from vbpfx.reconstruction.residual import find_residual_sum
from vbpfx.reconstruction.stream import held_bytes
from vbpfx.records import Block, BlockPlan, Consumer, Plan

_FEWEST_SAMPLES = 64


@dataclass(frozen=True)
class Step:
    """One layer on the way.

    Attributes:
        layer: the layer.
        chooses: the plan's entry whose neurons are chosen here; None where nothing is.
    """

    layer: Consumer
    chooses: BlockPlan | None


def steps_of(analysis: Analysis, plan: Plan, beside: Sequence[Consumer], choose: bool) -> list[Step]:
    """The layers to fit, in graph order.

    Args:
        beside: layers beside the blocks that are fitted, too.
        choose: choose neurons on the way, of the blocks that admit it.
    """
    first = {entry.block.consumers[0].node: entry for entry in plan.blocks}
    choosing = {node: e for node, e in first.items() if choose and chosen_on_the_way(analysis, e.block)}
    layers = layers_to_fit(analysis, [entry.block for entry in plan.blocks], beside)
    return [Step(layer, choosing.get(layer.node)) for layer in layers]


def chosen_on_the_way(analysis: Analysis, block: Block) -> bool:
    """Whether reconstruction chooses a block's neurons itself: layers of their own read one value, and nothing else does."""
    fittable = {layer.node for layer in analysis.layers}
    return len(block.sources) == 1 and not block.reductions and fittable >= {c.node for c in block.consumers}


def samples_that_fit(analysis: Analysis, memory: float) -> int:
    """How many samples the two streams may hold in so many GiB."""
    a_sample = 2 * held_bytes(analysis.captured, (layer.node for layer in analysis.layers))
    return max(_FEWEST_SAMPLES, int(memory * 2**30 / max(1, a_sample)))


def layers_beside(analysis: Analysis) -> tuple[Consumer, ...]:
    """The layers that write to a residual stream and read no block: attention's output projections, for one."""
    reading = {consumer.node for block in analysis.blocks for consumer in block.consumers}
    others = (layer for layer in analysis.layers if layer.node not in reading)
    return tuple(layer for layer in others if find_residual_sum(analysis.captured, layer.node) is not None)


def layers_to_fit(analysis: Analysis, blocks: Sequence[Block], beside: Sequence[Consumer]) -> list[Consumer]:
    """The layers that reconstruction may fit when it narrows these blocks, in graph order."""
    chosen = {c.node for block in blocks for c in block.consumers} | {layer.node for layer in beside}
    return [layer for layer in analysis.layers if layer.node in chosen]
