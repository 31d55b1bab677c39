"""The dependency analysis: which hidden axes can be narrowed, and why the others cannot.

Every axis of every tensor is a vertex; :mod:`vbpfx.ops` says which axes run channel by channel into
which. A connected component is then everything that must be narrowed together. It is a block if weights
produce it, weights contract it, and nothing opaque touches it: names, sizes and architectures decide
nothing. One pass over the nodes and one over the components: linear in the size of the graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from vbpfx.axes import (
    Axis,
    ComputedArgumentError,
    Contracts,
    Names,
    Opaque,
    Produces,
    Relation,
    Same,
    Site,
    SizeRead,
    SizeStated,
    operand_of,
)
from vbpfx.capture import Captured, named_tensors
from vbpfx.mutation import read_after_mutation
from vbpfx.ops import describe, is_sum, rule_for, takes_sizes
from vbpfx.records import Block, Consumer, ParameterAxis, Refusal, SizeLiteral
from vbpfx.sizes import read_sizes
from vbpfx.tables import table


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
            f"{len(blocks)} blocks, {self.neurons} hidden neurons", ("block", "width", "layers"), blocks
        ) + table(f"{len(refusals)} axes refused", ("axis of", "width", "layers", "at node", "because"), refusals)


def find_blocks(captured: Captured) -> Analysis:
    """Find every hidden channel axis that can be narrowed exactly, and every one that cannot, with its reason.

    Read-only. A *hidden axis* begins at the rows of weights, passes through operators that treat channels
    one by one, and ends at weights that sum over it.
    """
    evidence = _gather(captured)
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


@dataclass
class _Evidence:
    """What the rules said, gathered over the whole graph."""

    names: Names
    nodes: dict[str, fx.Node]
    position: dict[str, int]
    graph: nx.Graph[Axis] = field(default_factory=nx.Graph)
    opaque: dict[Axis, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    produced: dict[Axis, list[str]] = field(default_factory=lambda: defaultdict(list))
    producing: dict[Axis, list[str]] = field(default_factory=lambda: defaultdict(list))
    contracted: dict[Axis, list[Consumer]] = field(default_factory=lambda: defaultdict(list))
    literals: dict[Axis, list[SizeLiteral]] = field(default_factory=lambda: defaultdict(list))
    uses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[Axis, int] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)

    def first_use(self, name: str) -> int:
        """Position of the first call that uses a parameter."""
        return self.uses[name][0] if self.uses[name] else -1


def _gather(captured: Captured) -> _Evidence:
    graph_module, reference = captured.graph_module, captured.reference
    names, tied = _parameter_names(graph_module, reference)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    evidence = _Evidence(names, nodes, {name: i for i, name in enumerate(nodes)}, tied=tied)
    for name, tensor in named_tensors(reference).items():
        evidence.sizes.update({Axis(name, dim, True): size for dim, size in enumerate(tensor.shape)})
    sizes = read_sizes(graph_module.graph, names)
    mutated = read_after_mutation(graph_module)
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = operand_of(node, names)
        if own is not None and not own.is_parameter:
            evidence.graph.add_nodes_from(own.axes)
            evidence.sizes.update(zip(own.axes, own.shape, strict=True))
        if node not in sizes:  # asking a parameter for its dtype is no use of it
            _count_uses(node, module, names, evidence)
        for axis in own.axes if own is not None and node in mutated else ():
            evidence.opaque[axis].append((mutated[node], "it is changed in place and read both before and after"))
        for relation in _relations(node, module, names, sizes):
            _note(relation, node, evidence)
    return evidence


def _relations(
    node: fx.Node, module: nn.Module | None, names: Names, sizes: dict[fx.Node, SizeRead]
) -> Iterable[Relation]:
    """What one node says of its axes."""
    site = Site(node, module, names, sizes)
    if node.op == "placeholder":
        return list(site.all_opaque("it is an input of the model"))
    if node.op == "output":
        return [*site.all_opaque("it reaches the output of the model"), *_sizes_used(node, sizes)]
    if node.op == "get_attr":
        own = operand_of(node, names)
        return [] if own is None or own.is_parameter else list(site.all_opaque("it is a constant of the trace"))
    if node in sizes:
        return []
    rule = rule_for(node, module)
    used = _sizes_used(node, sizes)
    source = node.args[0] if node.args else None
    name = describe(node, module)
    if isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor) and source not in sizes:
        return [*used, *site.all_opaque(f"it is one of several values of {source.name}")]
    if operand_of(node, names) is None:
        return [*used, *site.all_opaque(f"operator {name} makes several values of it")]
    hooked: list[Relation] = []
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        hooked += site.all_opaque(f"layer {node.target} has forward hooks, which may read or change it")
    if rule is None:
        why = "is parametrized" if module and parametrize.is_parametrized(module) else "is not in the operator table"
        return [*used, *site.all_opaque(f"operator {name} {why}")]
    try:
        found = list(rule(site))
        if takes_sizes(rule):
            followed = {axis for relation in found if isinstance(relation, Same) for axis in (relation.a, relation.b)}
            used = [relation for relation in used if relation.axis not in followed]
        return [*used, *hooked, *found]
    except ComputedArgumentError as argument:
        return [*used, *site.all_opaque(f"operator {name} computes its argument {argument}")]


def _sizes_used(node: fx.Node, sizes: dict[fx.Node, SizeRead]) -> list[Opaque]:
    return [
        Opaque(axis, "its size enters a computation")
        for argument in node.all_input_nodes
        if argument in sizes
        for axis in sizes[argument].axes
    ]


def _note(relation: Relation, node: fx.Node, evidence: _Evidence) -> None:
    match relation:
        case Same(a, b) | Produces(a, b) | Contracts(a, b, _) if evidence.sizes.get(a) != evidence.sizes.get(b):
            # broadcasting or a tensor without axes where the rule expects one: nothing is known of either
            for axis in (a, b):
                if axis in evidence.sizes:
                    evidence.opaque[axis].append((node.name, "it is paired with an axis of another size"))
                    evidence.graph.add_node(axis)
        case Same(a, b):
            evidence.graph.add_edge(a, b)
        case Opaque(axis, reason):
            evidence.graph.add_node(axis)
            evidence.opaque[axis].append((node.name, reason))
        case Produces(out, weight):
            evidence.graph.add_edge(out, weight)
            _own_weight(weight, node, evidence)
            evidence.produced[weight].append(weight.owner)
            evidence.producing[out].append(node.name)
        case Contracts(source, weight, bias):
            evidence.graph.add_edge(source, weight)
            _own_weight(weight, node, evidence)
            if bias is not None and (not bias.is_parameter or bias.shape != _outputs(weight, evidence)):
                evidence.opaque[source].append((node.name, "the bias of the layer that reads it is not one of its own"))
            evidence.contracted[source].append(
                Consumer(
                    node=node.name,
                    source=source.owner,
                    axis=source.dim - evidence.nodes[source.owner].meta["val"].ndim,
                    weight=weight.owner,
                    weight_axis=weight.dim,
                    bias=_bias_name(weight.owner, evidence) if bias is None else bias.owner,
                    creates_bias=bias is None,
                    is_layer=_is_layer(node, weight.owner),
                )
            )
        case SizeStated(axis, path):
            evidence.graph.add_node(axis)
            evidence.literals[axis].append(SizeLiteral(node.name, path))


def _own_weight(weight: Axis, node: fx.Node, evidence: _Evidence) -> None:
    if not weight.is_parameter:
        evidence.opaque[weight].append((node.name, "the weight of the layer is a computed value"))


def _outputs(weight: Axis, evidence: _Evidence) -> tuple[int, ...]:
    """Shape of the bias that goes with a weight: one entry per output."""
    return (evidence.sizes[weight._replace(dim=1 - weight.dim)],)


def _bias_name(weight: str, evidence: _Evidence) -> str:
    """Name of the bias that a layer without one gets: beside its weight, and nobody else's."""
    owner, _, attribute = weight.rpartition(".")
    name = f"{owner}.bias".lstrip(".") if attribute == "weight" else f"{weight}_bias"
    while Axis(name, 0, True) in evidence.sizes:
        name += "_"
    return name


def _is_layer(node: fx.Node, weight: str) -> bool:
    """Whether the call is a layer of torch.nn (as a module, or as the module that export traced through)."""
    if node.op == "call_module":
        return True
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return False
    path, layer = stack[-1]
    name = layer if isinstance(layer, str) else f"{layer.__module__}.{layer.__qualname__}"
    return name.startswith("torch.nn.modules.") and path.removeprefix("L['self'].") == weight.rpartition(".")[0]


def _parameter_names(graph_module: fx.GraphModule, reference: nn.Module) -> tuple[Names, dict[str, list[str]]]:
    """Names of the graph's parameters in the model's state dict, and the tensors that have several."""
    all_names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(reference).items():
        all_names[id(tensor)].append(name)
    of_attribute: dict[str, str] = {}
    of_module: dict[str, dict[str, str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            of_module[str(node.target)] = {key: all_names[id(t)][0] for key, t in own if id(t) in all_names}
        elif node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            value = getattr(graph_module.get_submodule(owner), attribute, None)
            if id(value) in all_names:
                of_attribute[str(node.target)] = all_names[id(value)][0]
    return Names(of_attribute, of_module), {names[0]: names for names in all_names.values() if len(names) > 1}


def _count_uses(node: fx.Node, module: nn.Module | None, names: Names, evidence: _Evidence) -> None:
    position = evidence.position[node.name]
    if module is not None:
        own = names.of_module[str(node.target)].values()
        for name in own:
            evidence.uses[name].append(position)
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and str(argument.target) in names.of_attribute:
            evidence.uses[names.of_attribute[str(argument.target)]].append(position)


def _judge(component: set[Axis], evidence: _Evidence) -> Block | Refusal:
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
    evidence: _Evidence,
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


def _residual_sum(component: set[Axis], evidence: _Evidence) -> str | None:
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
