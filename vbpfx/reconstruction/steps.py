"""Steps: which layers are fitted block after block, in which order, and whose neurons are chosen on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vbpfx.analysis.blocks import Analysis
from vbpfx.graph.capture import Captured
from vbpfx.graph.held import GIB, held_bytes, input_bytes, output_bytes
from vbpfx.plans.records import Block, BlockPlan, Consumer, Plan, Source
from vbpfx.reconstruction.residual import find_residual_sum
from vbpfx.reconstruction.schedule import Calls, Schedule

# One of five is held out.
_FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Step:
    """One layer on the way.

    Attributes:
        calls: all calls of the layer.
        chooses: the plan's entry whose neurons are chosen here; None where nothing is.
    """

    calls: Calls
    chooses: BlockPlan | None

    @property
    def layer(self) -> Consumer:
        """The first call."""
        return self.calls[0]


def steps_of(order: Schedule, analysis: Analysis, plan: Plan, beside: Sequence[Consumer], choose: bool) -> list[Step]:
    """The layers to fit, in the order of computation.

    Args:
        order: of this analysis.
        beside: layers beside the blocks that are fitted, too.
        choose: choose neurons on the way, of the blocks that admit it.
    """
    choosing = {e.block.name: e for e in plan.blocks if choose and chosen_on_the_way(order, e.block)}
    reading = {c.node: name for name, e in choosing.items() for c in e.block.consumers}
    fitted = {layer.node for layer in layers_to_fit(order, analysis, [entry.block for entry in plan.blocks], beside)}
    steps = []
    for calls in order.layers:
        if calls[0].node in fitted:
            steps.append(Step(calls, choosing.pop(reading.get(calls[0].node, ""), None)))
    return steps


def chosen_on_the_way(order: Schedule, block: Block) -> bool:
    """Whether reconstruction chooses a block's neurons itself: layers of their own read it, and nothing else does.

    Where it is read at several calls, every layer must be called at all of them: there one fit does for all.
    """
    fittable = {layer.node for calls in order.layers for layer in calls}
    read: dict[str, set[Source]] = defaultdict(set)
    for consumer in block.consumers:
        read[consumer.weight].add(consumer.source)
    alike = all(sources == set(block.sources) for sources in read.values())
    one_start = len({(source.start, source.step) for source in block.sources}) == 1
    return alike and one_start and not block.reductions and fittable >= {c.node for c in block.consumers}


def samples_that_fit(order: Schedule, layers: Sequence[Consumer], memory: float) -> int:
    """How many samples may be kept in so many GiB, at least 8.

    Counted are the samples themselves, how much each layer's positions count (:mod:`vbpfx.reconstruction.influence`), and what the
    two streams hold, or the outputs that narrowed networks' are compared with, which is earlier.

    Args:
        layers: those that are fitted.
    """
    captured = order.captured
    streams = 2 * held_bytes(captured, (layer.node for calls in order.layers for layer in calls))
    weights = sum(_weight_bytes(captured, layer) for layer in layers)
    a_sample = input_bytes(captured) + weights + max(weights, streams, output_bytes(captured))
    return max(_FEWEST_SAMPLES, int(memory * GIB / max(1, a_sample)))


def _weight_bytes(captured: Captured, layer: Consumer) -> int:
    """Bytes per sample of one float32 number for every position of a layer's value."""
    node = captured.nodes[layer.node]
    value: Tensor = node.meta["val"]
    positions = value.numel() // max(1, value.shape[layer.source.axis])
    return 4 * positions // (captured.batch or captured.inputs.batch_size or 1)


def layers_beside(analysis: Analysis) -> tuple[Consumer, ...]:
    """The layers that write to a residual stream and read no block: attention's output projections, for one."""
    reading = {consumer.node for block in analysis.blocks for consumer in block.consumers}
    others = (layer for layer in analysis.layers if layer.node not in reading)
    return tuple(layer for layer in others if find_residual_sum(analysis.captured, layer.node) is not None)


def layers_to_fit(
    order: Schedule, analysis: Analysis, blocks: Sequence[Block], beside: Sequence[Consumer]
) -> list[Consumer]:
    """The layers that reconstruction may fit when it narrows these blocks, call by call, in graph order.

    Of a layer beside the blocks every call must be among ``beside``.
    """
    chosen = {c.node for block in blocks for c in block.consumers} | {layer.node for layer in beside}
    fitted = {c.node for calls in order.layers if all(c.node in chosen for c in calls) for c in calls}
    return [layer for layer in analysis.layers if layer.node in fitted]
