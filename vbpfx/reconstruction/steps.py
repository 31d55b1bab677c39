"""Steps: which layers are fitted, in which order, and which of them choose a block's neurons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.graph.capture import Captured
from vbpfx.graph.memory import GIB, input_bytes, output_bytes, peak_bytes
from vbpfx.plans.records import Block, BlockPlan, Consumer, Plan
from vbpfx.reconstruction.residual import find_residual_sum
from vbpfx.reconstruction.schedule import Calls, Schedule
from vbpfx.rules.calls import called_module
from vbpfx.rules.layers import convolution, transposed_convolution
from vbpfx.rules.table import operator_of

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


def steps_of(
    order: Schedule,
    analysis: Analysis,
    plan: Plan,
    beside: Sequence[Consumer],
    choose: bool,
    chosen: Collection[str] = (),
) -> list[Step]:
    """Return the layers to fit, in the order of computation.

    Args:
        order: the schedule of this analysis.
        beside: layers outside the blocks that are fitted, too.
        choose: whether to choose the neurons of the blocks where this is possible (:func:`chosen_on_the_way`).
        chosen: the names of blocks whose channels are chosen already.
    """
    choosing = {
        e.block.name: e
        for e in plan.blocks
        if choose and e.block.name not in chosen and chosen_on_the_way(order, e.block)
    }
    reading = {c.node: name for name, e in choosing.items() for c in e.block.consumers}
    fitted = {layer.node for layer in layers_to_fit(order, analysis, [entry.block for entry in plan.blocks], beside)}
    steps = []
    for calls in order.layers:
        if calls[0].node in fitted:
            steps.append(Step(calls, choosing.pop(reading.get(calls[0].node, ""), None)))
    return steps


def chosen_on_the_way(order: Schedule, block: Block) -> bool:
    """Return whether reconstruction can choose a block's neurons itself.

    It can if layers that can be fitted read the block, each at one place of its input, and no statistic (such as a norm) is taken
    over it.
    """
    fittable = {layer.node for calls in order.layers for layer in calls}
    places: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for consumer in block.consumers:
        places[consumer.weight].add(consumer.source.place)
    return (
        bool(places)
        and all(len(found) == 1 for found in places.values())
        and not block.reductions
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


def layers_beside(analysis: Analysis, blocks: Sequence[Block]) -> tuple[Consumer, ...]:
    """Return the layers that are fitted even if they read no narrowed block.

    These are layers that write to a residual stream, such as attention's output projections, and convolutions.

    Args:
        blocks: the blocks that may be narrowed. Layers that read other blocks stay.
    """
    captured = analysis.captured
    others = {c.node for block in analysis.usual if block not in blocks for c in block.consumers}
    others -= {c.node for block in blocks for c in block.consumers}

    def is_beside(layer: Consumer) -> bool:
        node = captured.nodes[layer.node]
        rule = operator_of(node, called_module(captured.graph_module, node)).rule
        convolves = rule is convolution or rule is transposed_convolution
        return convolves or find_residual_sum(captured, layer.node) is not None

    return tuple(layer for layer in analysis.layers if layer.node not in others and is_beside(layer))


def layers_to_fit(
    order: Schedule, analysis: Analysis, blocks: Sequence[Block], beside: Sequence[Consumer]
) -> list[Consumer]:
    """Return every call of the layers that reconstruction may fit when it narrows these blocks, in graph order.

    A layer may be fitted if all its calls read one of the blocks or are among ``beside``, and if it is behind one of the blocks. In
    front of all blocks a layer sees what it saw in the dense network.
    """
    reading = {c.node for block in blocks for c in block.consumers}
    behind: set[fx.Node] = set()
    for node in analysis.captured.graph_module.graph.nodes:
        if node.name in reading or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    chosen = reading | {layer.node for layer in beside if analysis.captured.nodes[layer.node] in behind}
    fitted = {c.node for calls in order.layers if all(c.node in chosen for c in calls) for c in calls}
    return [layer for layer in analysis.layers if layer.node in fitted]
