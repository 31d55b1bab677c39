"""Steps: which layers are fitted, in which order, and which of them choose a block's neurons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vbpfx.analysis.blocks import Analysis
from vbpfx.graph.capture import Captured
from vbpfx.graph.memory import GIB, input_bytes, output_bytes, peak_bytes
from vbpfx.plans.records import Block, BlockPlan, Consumer, Plan, ValueAxis
from vbpfx.reconstruction.residual import find_residual_sum
from vbpfx.reconstruction.schedule import Calls, Schedule

# The fewest samples to keep: one of five is held out, and a choice needs at least one that is.
_FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Step:
    """One layer to fit.

    Attributes:
        calls: all calls of the layer.
        chooses: the plan's entry for the block whose neurons are chosen at this layer; None if none are chosen here.
    """

    calls: Calls
    chooses: BlockPlan | None

    @property
    def layer(self) -> Consumer:
        """The first call of the layer."""
        return self.calls[0]


def steps_of(order: Schedule, analysis: Analysis, plan: Plan, beside: Sequence[Consumer], choose: bool) -> list[Step]:
    """Return the layers to fit, in the order of computation.

    Args:
        order: the schedule of this analysis.
        beside: layers outside the blocks that are fitted, too.
        choose: whether to choose the neurons of the blocks where this is possible (:func:`chosen_on_the_way`).
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
    """Return whether reconstruction can choose a block's neurons itself.

    It can if layers that can be fitted read the block, and no statistic (such as a norm) is taken over it. Its channels must not be
    in groups, since each group keeps as many. If the block
    has several sources, every layer must read all of them, so that one fit covers all calls.
    """
    fittable = {layer.node for calls in order.layers for layer in calls}
    read: dict[str, set[ValueAxis]] = defaultdict(set)
    for consumer in block.consumers:
        read[consumer.weight].add(consumer.source)
    alike = all(sources == set(block.sources) for sources in read.values())
    one_start = len({(source.start, source.step) for source in block.sources}) == 1
    return (
        alike
        and one_start
        and not block.reductions
        and block.groups == 1
        and fittable >= {c.node for c in block.consumers}
    )


def samples_that_fit(order: Schedule, layers: Sequence[Consumer], memory: float) -> int:
    """Return how many samples can be kept in ``memory`` GiB; at least 8.

    This counts the samples themselves, one weight for every position of each fitted layer
    (:mod:`vbpfx.reconstruction.influence`), and the largest of three things that are held at different times: another
    set of these weights, what the two streams hold, and the dense network's outputs, with which outputs of narrowed
    networks are compared.

    Args:
        layers: the layers that are fitted.
    """
    captured = order.captured
    streams = 2 * peak_bytes(captured, (layer.node for calls in order.layers for layer in calls))
    weights = sum(_weight_bytes(captured, layer) for layer in layers)
    a_sample = input_bytes(captured) + weights + max(weights, streams, output_bytes(captured))
    return max(_FEWEST_SAMPLES, int(memory * GIB / max(1, a_sample)))


def _weight_bytes(captured: Captured, layer: Consumer) -> int:
    """Return the bytes per sample of one float32 number for every position of a layer's output."""
    node = captured.nodes[layer.node]
    value: Tensor = node.meta["val"]
    positions = value.numel() // max(1, value.shape[layer.source.axis])
    return 4 * positions // (captured.batch or captured.inputs.batch_size or 1)


def layers_beside(analysis: Analysis) -> tuple[Consumer, ...]:
    """Return the layers that write to a residual stream and read no block, such as attention's output projections."""
    reading = {consumer.node for block in analysis.blocks for consumer in block.consumers}
    others = (layer for layer in analysis.layers if layer.node not in reading)
    return tuple(layer for layer in others if find_residual_sum(analysis.captured, layer.node) is not None)


def layers_to_fit(
    order: Schedule, analysis: Analysis, blocks: Sequence[Block], beside: Sequence[Consumer]
) -> list[Consumer]:
    """Return every call of the layers that reconstruction may fit when it narrows these blocks, in graph order.

    A layer may be fitted if all its calls read one of the blocks or are among ``beside``.
    """
    chosen = {c.node for block in blocks for c in block.consumers} | {layer.node for layer in beside}
    fitted = {c.node for calls in order.layers if all(c.node in chosen for c in calls) for c in calls}
    return [layer for layer in analysis.layers if layer.node in fitted]
