"""The dependency analysis: find which hidden axes can be narrowed, and why the others cannot.

Every axis of every tensor is a vertex of a graph. The rules of :mod:`vbpfx.rules.ops` tell which axes correspond
channel by channel; these are joined by edges. Everything in a connected component must be narrowed together. A
component is a block if weights produce it, weights contract it, and no axis in it is opaque (used in a way that forbids
narrowing). Names, sizes and architectures play no part in this. The analysis makes one pass over the nodes and one over
the components, so its time is linear in the size of the graph.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import networkx as nx
from torch import fx

from vbpfx.analysis.adapters import Adapter, find_adapters
from vbpfx.analysis.components import Component, components
from vbpfx.analysis.constants import PADDED, find_constant_channel
from vbpfx.analysis.evidence import Evidence, Unread, depends, find_evidence
from vbpfx.analysis.experts import find_experts, touches_experts
from vbpfx.analysis.linear import PRODUCTS, is_linear
from vbpfx.analysis.sizes import is_share
from vbpfx.analysis.softmax import softmaxed
from vbpfx.analysis.stacks import Span
from vbpfx.display.tables import counted, table
from vbpfx.display.templates import render
from vbpfx.graph.capture import Captured
from vbpfx.plans.records import (
    DEFAULT_KINDS,
    Block,
    ConstantChannel,
    Consumer,
    Factor,
    Kind,
    ParameterAxis,
    Reduction,
    Refusal,
    SizeLiteral,
    ValueAxis,
)
from vbpfx.rules.axes import Axis
from vbpfx.rules.calls import called_module
from vbpfx.rules.table import operator_of
from vbpfx.rules.windows import window_of

_SEES_NO_DATA = (
    "it does not depend on the model's inputs: it is computed from parameters and constants only, so no data can tell which of "
    "its channels matter (compute its value once and store it as a constant)"
)
# The most columns of a convolution's regression, channels of a group times entries of its window: the time for a fit grows with the
# cube of this number. It is 512 channels with windows of 3x3.
_MOST_COLUMNS = 4608
# The end of the names of blocks of queries and keys, beside the block of the same layer's values.
_OF_QUERIES = ":qk"
_Content = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Analysis:
    """The result of :func:`find_blocks`.

    Attributes:
        blocks: every axis that can be narrowed exactly, in graph order.
        refusals: every axis that a weight produces but that cannot be narrowed, with the reason.
        captured: the graph that was analysed.
        layers: every layer that a regression can fit, in graph order. Such a layer computes y = W x + b from each position or,
            if it is a convolution, from windows that are not too wide. It reads values that come from the model's inputs, and is
            the only user of its weight. A layer that is called several times has one entry per call. The entries' sources begin
            at channel 0.
    """

    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]
    captured: Captured = field(repr=False)
    layers: tuple[Consumer, ...] = field(repr=False, default=())

    @property
    def usual(self) -> tuple[Block, ...]:
        """The blocks that are narrowed if no kinds are asked for: those with hidden neurons, without attention."""
        return tuple(block for block in self.blocks if block.kind in DEFAULT_KINDS)

    @property
    def neurons(self) -> int:
        """Number of hidden neurons in the blocks that are narrowed by default."""
        return sum(block.width for block in self.usual)

    def __str__(self) -> str:
        return "".join(table(*content) for content in self._tables())

    def _repr_html_(self) -> str:
        blocks, refusals = self._tables()
        return render("analysis/blocks.html.jinja", blocks=blocks, refusals=refusals)

    @property
    def _flags(self) -> str:
        flags = ", ".join(f"{name}={value!r}" for name, value in self.captured.flags.items())
        return f"; captured with {flags}, and for nothing else" if flags else ""

    def _tables(self) -> tuple[_Content, _Content]:
        """Title, columns and rows of two tables: the blocks and the refusals."""
        others = len(self.blocks) - len(self.usual)
        blocks = [(b.name, *([b.kind] if others else []), b.width, ", ".join(b.layers)) for b in self.blocks]
        refusals = [(r.label, r.width, len(r.producers), r.node, r.reason) for r in self.refusals]
        beside = f"; {counted(others, 'block')} of attention, narrowed if kinds asks for them" if others else ""
        return (
            f"{counted(len(blocks) - others, 'block')}, {counted(self.neurons, 'hidden neuron')}{beside}{self._flags}",
            ("block", *(["kind"] if others else []), "width", "layers"),
            blocks,
        ), (
            f"{counted(len(refusals), 'axis', 'axes')} refused",
            ("axis of", "width", "layers", "at node", "because"),
            refusals,
        )


def find_blocks(captured: Captured) -> Analysis:
    """Find every hidden channel axis that can be narrowed exactly, and every one that cannot, with the reason.

    A *hidden axis* begins at the rows of weights, passes through operators that treat channels one by one, and ends at
    weights that sum over it. Nothing is changed.

    Args:
        captured: what :func:`capture` returned.
    """
    evidence = find_evidence(captured)
    linked, adapters = _with_parts(evidence), find_adapters(captured.graph_module, evidence)
    look = _Look(captured.graph_module, linked, adapters, evidence)
    found = [_judge(component, look) for component in components(evidence)]
    blocks = [entry for entry in found if isinstance(entry, Block)]
    refusals = [entry for entry in found if isinstance(entry, Refusal)]
    known = {name for names in evidence.produced.values() for name in names}
    unread: dict[Unread, list[str]] = defaultdict(list)
    for weight, why in evidence.unread.items():
        if weight not in known:
            unread[why].append(weight)
    refusals += [Refusal(why.owner, why.width, tuple(names), why.node, why.reason) for why, names in unread.items()]
    order = evidence.position
    blocks.sort(key=lambda block: (order[block.carriers[0].node], block.carriers[0].start))
    refusals.sort(key=lambda refusal: min(map(evidence.first_use, refusal.producers)))
    return Analysis(
        _with_unique_names(blocks),
        tuple(dict.fromkeys(refusals)),
        captured,
        _layers(captured.graph_module, adapters, evidence),
    )


def _layers(network: fx.GraphModule, adapters: list[Adapter], evidence: Evidence) -> tuple[Consumer, ...]:
    """Return the calls of all layers that a regression can fit. For such a layer it can fit every call."""
    found: list[Consumer] = []
    parts = {weight for adapter in adapters for weight in (adapter.down, adapter.up)}
    plain = [c for consumers in evidence.contracted.values() for c in consumers if c.routing is None]
    calls = Counter(consumer.weight for consumer in plain)
    for consumer in {c.node: c for c in plain}.values():
        x, y = (evidence.nodes[name].meta["val"].shape for name in (consumer.source.node, consumer.node))
        channel = consumer.source.axis % len(x)
        pointwise = all(evidence.sizes.get(Axis(consumer.weight, dim, True), 1) == 1 for dim in range(2, 5))
        same_positions = len(x) == len(y) and all(x[i] == y[i] for i in range(len(x)) if i != channel)
        node = evidence.nodes[consumer.node]
        window = window_of(node, called_module(network, node))
        read = evidence.sizes.get(Axis(consumer.weight, consumer.weight_axis, True))
        windows = window is not None and read is not None and read * window.taps <= _MOST_COLUMNS
        own_bias = consumer.creates_bias or (
            len(evidence.uses[consumer.bias]) == calls[consumer.weight] and consumer.bias not in evidence.tied
        )
        sees_data = evidence.nodes[consumer.source.node] in evidence.fed
        one_row_each = windows or (pointwise and same_positions)
        if sees_data and consumer.weight not in parts and consumer.alone and own_bias and one_row_each:
            found.append(consumer)
    fittable = Counter(layer.weight for layer in found)
    complete = [layer for layer in found if fittable[layer.weight] == calls[layer.weight]]
    return tuple(sorted(complete, key=lambda layer: evidence.position[layer.node]))


def _with_parts(evidence: Evidence) -> nx.Graph[Axis]:
    """Return the graph of all axes with all links between them, to measure distances."""
    graph = evidence.graph.copy()
    graph.add_edges_from((link.whole, link.part) for link in evidence.parts)
    graph.add_edges_from((link.whole, link.part) for link in evidence.grouped)
    graph.add_edges_from((link.whole, link.inner) for link in evidence.stacked)
    graph.add_edges_from((pair.first, pair.second) for pair in evidence.pairs)
    return graph


class _Look(NamedTuple):
    """What components are judged by: the graph, and everything that was found in it."""

    network: fx.GraphModule
    linked: nx.Graph[Axis]
    adapters: list[Adapter]
    evidence: Evidence


def _judge(component: Component, look: _Look) -> Block | Refusal | None:
    """Return a block or a refusal for a component; None if no weight produces it."""
    axes, evidence = component.axes, look.evidence
    produced = sorted({p for axis in axes for p in evidence.produced.get(axis, ())}, key=evidence.first_use)
    if not produced:
        return None
    consumers = [
        replace(consumer, source=_at(consumer.source, span, evidence))
        for span in component.spans
        for consumer in evidence.contracted.get(span.axis, ())
    ]
    consumers.sort(key=lambda consumer: (evidence.position[consumer.node], consumer.source.start))
    # a weight has one column for the constants, so that all calls of a layer take them from there if one of them pads
    padding = {consumer.weight for consumer in consumers if consumer.padded}
    consumers = [replace(consumer, padded=consumer.weight in padding) for consumer in consumers]
    reductions = [
        replace(reduction, source=_at(reduction.source, span, evidence))
        for span in component.spans
        for reduction in evidence.reduced.get(span.axis, ())
    ]
    reductions.sort(key=lambda reduction: (evidence.position[reduction.node], reduction.source.start))
    factors = [
        replace(
            factor,
            source=_at(factor.source, span, evidence),
            shift_free=softmaxed(evidence.nodes[factor.node], look.network),
        )
        for span in component.spans
        for factor in evidence.paired.get(span.axis, ())
    ]
    factors.sort(key=lambda factor: (evidence.position[factor.node], factor.role, factor.source.start))
    of_keys = component.of_keys or ()
    parameters = [
        ParameterAxis(
            axis.owner, axis.dim, s.start, s.step, size=s.size, stride=s.stride, dual=(axis, s.start) in of_keys
        )
        for axis, s in ((span.axis, span) for span in component.spans)
        if axis.is_parameter
    ]
    parameters += [
        ParameterAxis(c.weight, c.weight_axis, c.source.start, c.source.step, c.groups)
        for c in {(c.weight, c.source.start): c for c in consumers if c.groups > 1}.values()
    ]
    parameters.sort(key=lambda entry: (evidence.first_use(entry.name), entry.name, entry.axis, entry.start))
    values = [
        ValueAxis(axis.owner, axis.dim, *span[1:], dual=(axis, span.start) in of_keys)
        for span in component.spans
        if not (axis := span.axis).is_parameter
    ]
    values.sort(key=lambda carrier: (evidence.position[carrier.node], *carrier[1:]))
    node, reason = _obstacle(component, consumers, factors, reductions, parameters, look.linked, evidence)
    if not reason:
        node, reason = _adapted(consumers, look.adapters)
    groups = component.groups if component.groups > 1 else _groups(component, evidence)
    experts = 1
    if not reason and touches_experts(produced, consumers, evidence):
        groups = find_experts(component.width, produced, consumers, reductions, parameters, values, evidence)
        if isinstance(groups, int):
            experts, width = groups, component.width
            sizes = [evidence.sizes[Axis(p.name, p.axis, True)] for p in parameters]
            parameters = [
                replace(p, groups=experts, size=width, stride=size) for p, size in zip(parameters, sizes, strict=True)
            ]
    if not reason and isinstance(groups, tuple):
        node, reason = groups
    constant: ConstantChannel | None = None
    if not reason and padding:
        made = _constant_channel(produced, consumers, reductions, parameters, values, look)
        constant, node, reason = (made, "", "") if isinstance(made, ConstantChannel) else (None, *made)
    if reason:
        weights = tuple(dict.fromkeys(evidence.origins.get(name, name) for name in produced))
        return Refusal(_enclosing(weights), component.width, weights, node, reason)
    linear = component.of_keys is not None and not reductions and constant is None
    if linear and is_linear(produced, consumers, parameters, values, look.network, evidence):
        reading = {(consumer.weight, consumer.weight_axis) for consumer in consumers}
        parameters = [replace(p, dual=p.dual or (p.name, p.axis) in reading) for p in parameters]
    else:
        linear = False
    literals = {_in_component(entry, component, evidence) for axis in axes for entry in evidence.literals.get(axis, ())}
    return Block(
        name=_name([*produced, *(consumer.weight for consumer in consumers)], factors),
        width=component.width * experts,
        producers=tuple(produced),
        consumers=tuple(dict.fromkeys(consumers)),
        reductions=tuple(dict.fromkeys(reductions)),
        parameters=tuple(parameters),
        literals=tuple(sorted(literals, key=str)),
        carriers=tuple(values),
        constant=constant,
        groups=groups if isinstance(groups, int) else 1,
        kind=_kind(component, factors, values, evidence),
        factors=tuple(dict.fromkeys(factors)),
        linear=linear,
    )


def _at(source: ValueAxis, span: Span, evidence: Evidence) -> ValueAxis:
    """Return the place of a component's channels where a layer reads them, with axes counted from the end."""
    counting = span.counting
    if span.size and not span.stride:
        counting -= evidence.nodes[span.axis.owner].meta["val"].ndim
    return source._replace(
        start=span.start,
        step=span.step,
        size=span.size,
        stride=span.stride,
        counting=counting,
        divisor=span.divisor,
    )


def _kind(component: Component, factors: Sequence[Factor], values: Sequence[ValueAxis], evidence: Evidence) -> Kind:
    if factors:
        return "query"
    return "value" if _passes_attention(values, component.stacked, evidence) else "mlp"


def _passes_attention(values: Sequence[ValueAxis], stacked: bool, evidence: Evidence) -> bool:
    """Return whether an axis has heads, and passes through a product of two computed values that keeps its channels.

    The values of attention do. A single head has an axis of its own, too, of length 1.
    """
    axes = {value.node: evidence.nodes[value.node].meta["val"].ndim for value in values}
    for value in values:
        node = evidence.nodes[value.node]
        made = node.name in evidence.makers([value])
        if not made and operator_of(node).rule in PRODUCTS and (stacked or axes[value.node] > min(axes.values())):
            return True
    return False


def _groups(component: Component, evidence: Evidence) -> int | tuple[str, str]:
    """Return into how many equal parts grouped convolutions divide a component; or the node and why it cannot be narrowed."""
    places: dict[Axis, list[tuple[int, int]]] = defaultdict(list)
    for span in component.spans:
        places[span.axis].append((span.start, span.step))
    needed = [1]
    for axis, found in places.items():
        for groups, node in evidence.divided.get(axis, ()):
            size, step = evidence.sizes[axis] // groups, found[0][1]
            aligned = size % step == 0 and all((s - s % step) % size == 0 and other == step for s, other in found)
            if component.width * len(found) != evidence.sizes[axis] or not aligned or component.width % (size // step):
                return node, f"a grouped convolution divides it, together with other channels, into {groups} groups"
            needed.append(component.width // (size // step))
    total = math.lcm(*needed)
    if total > 1 and (component.width % total or component.width < 2 * total):
        node = next(node for axis in places for _, node in evidence.divided.get(axis, ()))
        return node, "grouped convolutions divide it into groups of a single channel"
    return total


def _constant_channel(
    produced: Sequence[str],
    consumers: Sequence[Consumer],
    reductions: Sequence[Reduction],
    parameters: Sequence[ParameterAxis],
    values: Sequence[ValueAxis],
    look: _Look,
) -> ConstantChannel | tuple[str, str]:
    """Return how a channel can be made constant for the layers that pad the axis, or the node and the reason why it cannot."""
    if reductions:
        reason = f"{PADDED}, and a statistic is taken over it, in which a constant channel would count"
        return reductions[0].node, reason
    making = look.evidence.makers(values)
    return find_constant_channel(produced, making, consumers, parameters, values, look.network, look.evidence)


def _in_component(literal: SizeLiteral, component: Component, evidence: Evidence) -> SizeLiteral:
    """Return the literal; ``follows`` is true if the model's code computes the right number at every width."""
    computed = evidence.computed_sizes.get(literal, ())
    axes = {axis for number in computed for axis in evidence.read[number].axes}
    if not len(computed) == len(axes) == 1:
        return literal
    covered = Counter(span.axis for span in component.spans if span.step == 1 and not span.size)
    stated = Axis(literal.owner, literal.axis, literal.of_parameter)
    if any(covered[axis] * component.width != evidence.sizes[axis] for axis in (*axes, stated)):
        return literal
    (number,), size = computed, evidence.sizes[next(iter(axes))]
    count = literal.stop - literal.start
    return replace(literal, follows=is_share(number, evidence.read, count, size, component.width))


def _obstacle(
    component: Component,
    consumers: list[Consumer],
    factors: list[Factor],
    reductions: list[Reduction],
    parameters: list[ParameterAxis],
    linked: nx.Graph[Axis],
    evidence: Evidence,
) -> tuple[str, str]:
    """Return the node and the reason that keep a component from being a block; empty strings if it is one."""
    axes = component.axes
    opaque = [axis for axis in axes if axis in evidence.opaque]
    if opaque:
        producers = {axis for axis in axes if axis in evidence.produced}
        near = nx.multi_source_dijkstra_path_length(linked.subgraph(axes), producers, weight=None)
        first = min(opaque, key=lambda axis: (near.get(axis, len(axes)), evidence.position.get(axis.owner, -1)))
        return evidence.opaque[first][0]
    if not consumers and not factors:
        return "", "no layer reads it"
    if consumers and factors:
        return factors[0].node, "a product of two activations sums over it, and a layer reads it, too"
    readers: list[Consumer | Factor | Reduction] = [*consumers, *factors, *reductions]
    if evidence.fed.isdisjoint(evidence.nodes[reader.source.node] for reader in readers):
        return readers[0].source.node, _SEES_NO_DATA
    if (stream := _residual_sum(axes, evidence)) is not None:
        return stream, "it is a residual stream: layers that read it are added to it"
    for name in dict.fromkeys(
        [*(entry.name for entry in parameters), *(c.bias for c in consumers if not c.creates_bias and not c.padded)]
    ):
        if name in evidence.tied:
            return "", f"{name} is tied to {', '.join(evidence.tied[name][1:])}"
    for consumer in consumers:
        if consumer.routing is not None:  # vbpfx.analysis.experts looks at these
            continue
        calls = {evidence.position[other.node] for other in consumers if other.weight == consumer.weight}
        if not consumer.creates_bias and not consumer.padded and not calls.issuperset(evidence.uses[consumer.bias]):
            return "", (
                f"the constants that replace removed neurons would be added to {consumer.bias}, but "
                f"{len(evidence.uses[consumer.bias])} calls share this bias"
            )
    return "", ""


def _adapted(consumers: list[Consumer], adapters: list[Adapter]) -> tuple[str, str]:
    """Return the node and the reason if an adapter forbids narrowing: the axis is its rank, or the adapter reads it."""
    for consumer in consumers:
        for down, up, base in adapters:
            if consumer.weight == up:
                return consumer.node, (
                    f"it is the rank of a low-rank adapter: {down} and {up} only add a change to {base}"
                )
            if consumer.weight == down:
                return consumer.node, (
                    f"{down} and {up} adapt {base}, which reads it, and the adapter has no bias that could take the constants of "
                    f"removed neurons: merge the adapter into {base} first (PEFT: model.merge_and_unload())"
                )
    return "", ""


def _residual_sum(axes: set[Axis], evidence: Evidence) -> str | None:
    """Return the sum at which a value that layers computed from the axis is added to the axis; None if there is none.

    Such an axis is a residual stream. It could be narrowed exactly, but it is the width of the network and not the
    hidden width of a block. Products need care: a product of the axis with a value computed from it is a gate
    (squeeze-and-excite), and the result still is the axis. A product of a value computed from the axis with anything
    else is a gated branch, and the result counts as computed from the axis.
    """
    values = {axis.owner for axis in axes if not axis.is_parameter} - evidence.lookups  # these hold parameters
    carriers = {evidence.nodes[name] for name in values}
    makers = {evidence.nodes[name] for axis in axes for name in evidence.producing.get(axis, ())}
    start = min(evidence.position[n.name] for n in carriers)
    made_of_it: dict[fx.Node, bool] = {}
    for node in sorted(carriers, key=lambda n: evidence.position[n.name]):
        if node in makers:
            made_of_it[node] = depends(node, carriers, start, evidence.position)
            continue
        sources = (a.all_input_nodes[0] if operator_of(a).takes_apart else a for a in node.all_input_nodes)
        operands = {made_of_it[source] for source in sources if source in made_of_it}
        if operands == {True, False} and operator_of(node).adds:
            return node.name
        if operands or node in evidence.computed:  # an axis may also begin here, at an embedding
            made_of_it[node] = operands == {True} or (
                operands == {True, False}
                and operator_of(node).joins == "product"
                and not _gates_the_stream(node, made_of_it, makers, start, evidence.position)
            )
    return None


def _gates_the_stream(
    product: fx.Node, made_of_it: dict[fx.Node, bool], makers: set[fx.Node], start: int, position: dict[str, int]
) -> bool:
    """Return whether the branch factor of a product gates its stream factor.

    It does if it is computed from the values that the stream factor comes from. Otherwise the stream factor gates the
    branch.
    """
    stream, branch = ([n for n in product.all_input_nodes if made_of_it.get(n) is made] for made in (False, True))
    roots, stack, seen = set(), list(stream), set(stream)
    while stack:
        node = stack.pop()
        carried = [n for n in node.all_input_nodes if made_of_it.get(n) is False and n not in seen]
        if node in makers or not carried:
            roots.add(node)
            continue
        seen.update(carried)
        stack += carried
    return any(depends(node, roots, start - 1, position) for node in branch)


def _name(weights: Sequence[str], factors: Sequence[Factor]) -> str:
    """Return a name for a block, which need not be unique: the module that contains it, with a mark for queries and keys."""
    return _enclosing(weights) + (_OF_QUERIES if factors else "")


def _enclosing(weights: Sequence[str]) -> str:
    """Return the path of the innermost module that contains the layers of all these weights."""
    paths = [weight.split(".")[:-1] for weight in weights]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _with_unique_names(blocks: list[Block]) -> tuple[Block, ...]:
    """Give every block a unique name.

    A block that is alone in its module is named after the module. The others are named by their first and last layers,
    by their weights, or by their rows in the first weight, whichever of these is unique first. Attention's blocks are named
    after all others, and leave them their names.
    """
    usual, others = ([b for b in blocks if (b.kind in DEFAULT_KINDS) is first] for first in (True, False))
    names: dict[int, str] = {}
    for some in (usual, others):
        choices = [_names(block) for block in some]
        common = [Counter(found) for found in zip(*choices, strict=True)]
        taken = set(names.values())
        for number, (block, found) in enumerate(zip(some, choices, strict=True)):
            free = (
                name
                for name, count in zip(found, common, strict=True)
                if name.removesuffix(_OF_QUERIES) and count[name] == 1 and name not in taken
            )
            names[id(block)] = next(free, f"{found[-1]}#{number}")
    return tuple(replace(block, name=names[id(block)]) for block in blocks)


def _names(block: Block) -> tuple[str, str, str, str]:
    """Return the names that a block may get, the shortest first."""
    last = _layer(block.consumers[-1].weight if block.consumers else block.producers[-1])
    between = f"{_layer(block.producers[0])}->{last}" + (_OF_QUERIES if block.factors else "")
    all_of_them = "+".join(block.producers) + "->" + "+".join(consumer.weight for consumer in block.consumers)
    return block.name, between, all_of_them, f"{between}[{_range(block)}]"


def _range(block: Block) -> str:
    """Return the range of the block's rows in the weight of its first producer."""
    first = next(entry for entry in block.parameters if entry.name == block.producers[0])
    return f"{first.start}:{first.start + first.step * block.width}"


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0] or weight
