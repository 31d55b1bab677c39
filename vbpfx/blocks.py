"""The dependency analysis: which hidden axes can be narrowed, and why the others cannot.

Every axis of every tensor is a vertex; :mod:`vbpfx.ops` says which axes run channel by channel into
which. A connected component is then everything that must be narrowed together. It is a block if weights
produce it, weights contract it, and nothing opaque touches it: names, sizes and architectures decide
nothing. One pass over the nodes and one over the components: linear in the size of the graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import fx

from vbpfx.axes import Axis
from vbpfx.capture import Captured
from vbpfx.evidence import Evidence, gather
from vbpfx.ops import is_sum
from vbpfx.records import Block, Consumer, ParameterAxis, Refusal
from vbpfx.tables import counted, table


@dataclass(frozen=True)
class Analysis:
    """What :func:`find_blocks` found.

    Attributes:
        blocks: every axis that can be narrowed exactly, in graph order.
        refusals: every axis that a weight produces and that cannot, with the reason.
        captured: the graph that was analysed.
    """

    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]
    captured: Captured = field(repr=False)

    @property
    def neurons(self) -> int:
        """Number of hidden neurons in all blocks."""
        return sum(block.width for block in self.blocks)

    def __str__(self) -> str:
        blocks = [(b.name, b.width, ", ".join(b.layers)) for b in self.blocks]
        refusals = [(r.name or "(whole model)", r.width, len(r.producers), r.node, r.reason) for r in self.refusals]
        return table(
            f"{counted(len(blocks), 'block')}, {counted(self.neurons, 'hidden neuron')}",
            ("block", "width", "layers"),
            blocks,
        ) + table(
            f"{counted(len(refusals), 'axis', 'axes')} refused",
            ("axis of", "width", "layers", "at node", "because"),
            refusals,
        )


def find_blocks(captured: Captured) -> Analysis:
    """Find every hidden channel axis that can be narrowed exactly, and every one that cannot, with its reason.

    Read-only. A *hidden axis* begins at the rows of weights, passes through operators that treat channels
    one by one, and ends at weights that sum over it.
    """
    evidence = gather(captured)
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    for component in nx.connected_components(evidence.graph):
        produced = [p for axis in component for p in evidence.produced.get(axis, ())]
        if not produced:
            continue
        found = _judge(component, evidence)
        if isinstance(found, Block):
            blocks.append(found)
        else:
            refusals.append(found)
    order = evidence.position
    blocks.sort(key=lambda block: order[block.carriers[0][0]])
    refusals.sort(key=lambda refusal: min(map(evidence.first_use, refusal.producers)))
    return Analysis(_with_unique_names(blocks), tuple(refusals), captured)


def _judge(component: set[Axis], evidence: Evidence) -> Block | Refusal:
    """A component that weights produce: a block, or a refusal."""
    produced = sorted({p for axis in component for p in evidence.produced.get(axis, ())}, key=evidence.first_use)
    consumers = [c for axis in component for c in evidence.contracted.get(axis, ())]
    consumers.sort(key=lambda consumer: evidence.position[consumer.node])
    parameters = sorted(
        (ParameterAxis(axis.owner, axis.dim) for axis in component if axis.is_parameter),
        key=lambda entry: (evidence.first_use(entry.name), entry.name, entry.axis),
    )
    values = [axis for axis in component if not axis.is_parameter]
    widths = {evidence.sizes[axis] for axis in values}
    name = _enclosing(produced)
    width = min(widths)
    node, reason = _obstacle(component, consumers, parameters, widths, evidence)
    if reason:
        return Refusal(name, width, tuple(produced), node, reason)
    return Block(
        name=_enclosing([*produced, *(consumer.weight for consumer in consumers)]),
        width=width,
        producers=tuple(produced),
        consumers=tuple(consumers),
        parameters=tuple(parameters),
        literals=tuple(sorted((entry for axis in component for entry in evidence.literals.get(axis, ())), key=str)),
        carriers=tuple(sorted(((axis.owner, axis.dim) for axis in values), key=lambda c: evidence.position[c[0]])),
    )


def _obstacle(
    component: set[Axis],
    consumers: list[Consumer],
    parameters: list[ParameterAxis],
    widths: set[int],
    evidence: Evidence,
) -> tuple[str, str]:
    """The node and the reason that a component is no block; empty strings where it is one."""
    opaque = [axis for axis in component if axis in evidence.opaque]
    if opaque:
        producers = [axis for axis in component if axis in evidence.produced]
        near = nx.multi_source_dijkstra_path_length(evidence.graph, set(producers), weight=None)
        first = min(opaque, key=lambda axis: (near[axis], evidence.position.get(axis.owner, -1)))
        return evidence.opaque[first][0]
    if not consumers:
        return "", "no layer reads it"
    if len(widths) > 1:
        return "", f"it has several widths: {sorted(widths)}"
    if (stream := _residual_sum(component, evidence)) is not None:
        return stream, "it is a residual stream: layers that read it are added to it"
    sliced = [entry.name for entry in parameters]
    for name in sliced:
        if sliced.count(name) > 1:
            return "", f"{name} both makes and reads it"
    weights = {name for axis in component for name in evidence.produced.get(axis, ())}
    weights |= {consumer.weight for consumer in consumers}
    biases = {consumer.bias for consumer in consumers if not consumer.creates_bias}
    for name in (*sliced, *sorted(biases)):
        if name in evidence.tied:
            return "", f"{name} is tied to {', '.join(evidence.tied[name][1:])}"
        if name in weights | biases and len(evidence.uses[name]) > 1:
            return "", f"{name} is shared by {len(evidence.uses[name])} calls"
    return "", ""


def _residual_sum(component: set[Axis], evidence: Evidence) -> str | None:
    """The node where the axis takes in, by a sum, what a layer behind it made of it; None without one.

    Such an axis could be narrowed exactly, but it is the width of the network, no block's hidden width.
    A product with what was made of it is no such thing: squeeze-and-excite is a gate.
    """
    carriers = {evidence.nodes[axis.owner] for axis in component if not axis.is_parameter}
    makers = [evidence.nodes[name] for axis in component for name in evidence.producing.get(axis, ())]
    if len(makers) < 2:
        return None
    start = min(evidence.position[n.name] for n in carriers)
    late = [maker for maker in makers if _depends(maker, carriers, start, evidence.position)]
    seen: set[fx.Node] = set()
    while late:
        node = late.pop()
        if is_sum(node) and sum(a in carriers for a in node.all_input_nodes) > 1:
            return node.name
        seen.add(node)
        late += [user for user in node.users if user in carriers and user not in seen]
    return None


def _depends(node: fx.Node, on: set[fx.Node], start: int, position: dict[str, int]) -> bool:
    """Whether a node's inputs come, at whatever remove, from any of the given nodes (none before ``start``)."""
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        ancestor = stack.pop()
        if ancestor in on:
            return True
        if ancestor not in seen and position[ancestor.name] > start:
            seen.add(ancestor)
            stack += ancestor.all_input_nodes
    return False


def _enclosing(weights: list[str]) -> str:
    """The module path that encloses the layers of these weights."""
    paths = [weight.split(".")[:-1] for weight in weights]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _with_unique_names(blocks: list[Block]) -> tuple[Block, ...]:
    """A block alone in its module goes by the module; others add their layers, then their weights."""
    choices = [
        (
            block.name,
            f"{_layer(block.producers[0])}->{_layer(block.consumers[-1].weight)}",
            "+".join(block.producers) + "->" + "+".join(consumer.weight for consumer in block.consumers),
        )
        for block in blocks
    ]
    common = [Counter(names) for names in zip(*choices, strict=True)]
    named = []
    for block, names in zip(blocks, choices, strict=True):
        free = (name for name, count in zip(names, common, strict=True) if name and count[name] == 1)
        named.append(replace(block, name=next(free, names[-1])))
    return tuple(named)


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0] or weight
