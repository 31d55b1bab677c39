"""Evidence: apply the operator rules to every node of a graph, and collect what they say by axis."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from vbpfx.analysis.mutation import changed_by, read_after_mutation
from vbpfx.analysis.names import enclosing_module, is_layer, parameter_names
from vbpfx.analysis.sizes import read_sizes
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.plans.records import Consumer, Factor, Reduction, SizeLiteral, ValueAxis
from vbpfx.rules.axes import (
    Axis,
    ComputedArgumentError,
    Contracts,
    Grouped,
    Merged,
    Names,
    Opaque,
    Operand,
    Paired,
    Part,
    Produces,
    Reduces,
    Relation,
    Repeated,
    Same,
    Site,
    SizeRead,
    SizeStated,
    Stacked,
    operand_of,
)
from vbpfx.rules.calls import called_module, describe, operands_read
from vbpfx.rules.experts import stack_read
from vbpfx.rules.pointwise import elementwise
from vbpfx.rules.routing import Routing
from vbpfx.rules.table import Argument, operator_of

_PARAMETRIZED = "is parametrized (torch.nn.utils.parametrize.remove_parametrizations makes it plain)"
# Package of a hook that computes a weight before every call -> what it does, and how to remove it.
_REMOVED_BY = {
    "torch.nn.utils.weight_norm": "has its {name} made by weight_norm before every call (torch.nn.utils.remove_weight_norm makes it plain)",
    "torch.nn.utils.spectral_norm": "has its {name} made by spectral_norm before every call (torch.nn.utils.remove_spectral_norm makes it plain)",
    "torch.nn.utils.prune": "has its {name} masked before every call (torch.nn.utils.prune.remove(layer, '{name}') makes it plain)",
}
# The argument of attention that states the scale of the products of queries and keys.
_SCALE = Argument(6, "scale")
_UNLISTED = "is not in the operator table (see docs/adding_an_operator.md)"


class Unread(NamedTuple):
    """A weight that no rule explains: the layer that owns it, its number of rows, the node that reads it, and why."""

    owner: str
    width: int
    node: str
    reason: str


@dataclass
class Evidence:
    """What the rules said about the whole graph.

    ``names`` are the names of the graph's parameters in the model.
    ``computed`` are the nodes whose values or sizes come from the model's inputs, and not from parameters alone.
    ``fed`` are those whose values do, so that they depend on the data. ``divided`` are the axes that consist of equal parts, each
    with the numbers of parts and the nodes that need them equal. ``out_of_order`` are the axes whose
    entries a call mixes, moves, or uses in a way that is not known. If a layer's weight is itself computed (a part
    of a packed weight, or a normalised weight), ``origins`` names the parameter that it is computed from.
    ``routed`` are the calls and values whose rows belong to experts, each with the division of its rows; ``lookups`` are those of them
    that hold entries of parameters. ``experts_read`` are the parameters that have an entry for every expert, each with the positions
    of the calls that read these entries.
    """

    nodes: dict[str, fx.Node]
    position: dict[str, int]
    names: Names
    graph: nx.Graph[Axis] = field(default_factory=nx.Graph)
    parts: list[Part] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    stacked: list[Stacked] = field(default_factory=list)
    repeated: list[Repeated] = field(default_factory=list)
    pairs: list[Paired] = field(default_factory=list)
    paired: dict[Axis, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    out_of_order: set[Axis] = field(default_factory=set)
    unread: dict[str, Unread] = field(default_factory=dict)
    calls: Counter[tuple[str, Any]] = field(default_factory=Counter)
    computed: set[fx.Node] = field(default_factory=set)
    fed: set[fx.Node] = field(default_factory=set)
    biases: dict[str, Axis] = field(default_factory=dict)
    opaque: dict[Axis, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    produced: dict[Axis, list[str]] = field(default_factory=lambda: defaultdict(list))
    producing: dict[Axis, list[str]] = field(default_factory=lambda: defaultdict(list))
    contracted: dict[Axis, list[Consumer]] = field(default_factory=lambda: defaultdict(list))
    divided: dict[Axis, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    reduced: dict[Axis, list[Reduction]] = field(default_factory=lambda: defaultdict(list))
    literals: dict[Axis, list[SizeLiteral]] = field(default_factory=lambda: defaultdict(list))
    read: dict[fx.Node, SizeRead] = field(default_factory=dict)
    computed_sizes: dict[SizeLiteral, tuple[fx.Node, ...]] = field(default_factory=dict)
    uses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[Axis, int] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    routed: dict[str, Routing] = field(default_factory=dict)
    lookups: set[str] = field(default_factory=set)
    experts_read: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def makers(self, values: Iterable[ValueAxis]) -> set[str]:
        """Return the nodes whose weights produce an axis, given its places on values (with axes counted from the front)."""
        return {name for value in values for name in self.producing.get(Axis(value.node, value.axis), ())}

    def first_use(self, name: str) -> int:
        """Return the position of the first call that uses a parameter; -1 if there is none."""
        return self.uses[name][0] if self.uses[name] else -1


def find_evidence(captured: Captured) -> Evidence:
    """Apply the rule of every node, and collect what the rules say."""
    graph_module, reference = captured.graph_module, captured.reference
    names, tied = parameter_names(graph_module, reference)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    evidence = Evidence(nodes, {name: i for i, name in enumerate(nodes)}, names, tied=tied)
    evidence.calls.update((enclosing_module(node)[0], node.target) for node in nodes.values())
    for name, tensor in named_tensors(reference).items():
        evidence.sizes.update({Axis(name, dim, True): size for dim, size in enumerate(tensor.shape)})
    evidence.read = sizes = read_sizes(graph_module.graph, names)
    mutated = read_after_mutation(graph_module)
    values = {node: operand_of(node, names) for node in graph_module.graph.nodes}
    for own in values.values():
        if own is not None and not own.is_parameter:
            evidence.graph.add_nodes_from(own.axes)
            evidence.sizes.update(zip(own.axes, own.shape, strict=True))
    for node, own in values.items():
        module = called_module(graph_module, node)
        if node.op == "placeholder" or not evidence.computed.isdisjoint(node.all_input_nodes):
            evidence.computed.add(node)
        if node.op == "placeholder" or (node not in sizes and not evidence.fed.isdisjoint(operands_read(node))):
            evidence.fed.update((node, *changed_by(node, graph_module)))
        if node not in sizes:  # reading a parameter's dtype or size does not count as a use
            _count_uses(node, module, names, evidence)
        for axis in own.axes if own is not None and node in mutated else ():
            evidence.opaque[axis].append((mutated[node], "it is changed in place and read both before and after"))
        value = node.meta.get("val")
        for axis in own.axes if own is not None and isinstance(value, Tensor) and value.is_complex() else ():
            evidence.opaque[axis].append(
                (node.name, "its values are complex numbers, of which no statistics are taken")
            )
        said = list(_relations(node, module, names, sizes))
        for relation in said:
            _note(relation, node, evidence)
        if node not in sizes:
            _note_experts(node, said, names, evidence)
            _note_unread(node, module, names, said, evidence)
    for axis in evidence.produced:
        behind = None if axis.is_parameter else _parameter_behind(nodes[axis.owner], names, evidence)
        if behind is not None:
            evidence.origins[axis.owner] = behind.owner
    _mark_alone(evidence)
    _settle_computed_sizes(evidence)
    return evidence


def depends(node: fx.Node, on: set[fx.Node], start: int, position: dict[str, int]) -> bool:
    """Return whether a node depends, directly or indirectly, on any of the given nodes.

    Args:
        start: a position in the graph before which none of the given nodes stands.
    """
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        ancestor = stack.pop()
        if ancestor in on:
            return True
        if ancestor not in seen and position[ancestor.name] > start:
            seen.add(ancestor)
            stack += ancestor.all_input_nodes
    return False


def _settle_computed_sizes(evidence: Evidence) -> None:
    """Handle numbers that are computed from sizes and that tell where an axis is cut.

    The narrowed graph holds such a number as a constant. This is right if the sizes are the same in every run, as those
    of axes that correspond to an axis of a weight are. When such an axis is narrowed, the number must change, too. So
    it is noted for all axes that it is computed from. If a size can change from run to run, the axes become opaque.
    """
    if not evidence.computed_sizes:
        return
    linked = evidence.graph.copy()
    linked.add_edges_from((link.whole, link.part) for link in evidence.parts)
    known = {axis for group in nx.connected_components(linked) if any(a.is_parameter for a in group) for axis in group}
    for literal, computed in evidence.computed_sizes.items():
        stated = Axis(literal.owner, literal.axis, literal.of_parameter)
        read = dict.fromkeys(axis for number in computed for axis in evidence.read[number].axes)
        if not known.issuperset(read):
            if evidence.sizes[stated] == 1:
                continue  # the graph computes the number in every run
            for axis in (stated, *read):
                evidence.opaque[axis].append(
                    (literal.node, "a part of it is cut out whose size depends on the size of an input")
                )
            continue
        for axis in read:
            if axis != stated:
                evidence.literals[axis].append(literal)


def _mark_alone(evidence: Evidence) -> None:
    """Set for every layer whether nothing but its own calls uses its weight."""
    readings = Counter(
        (consumer.weight, consumer.weight_axis) for found in evidence.contracted.values() for consumer in found
    )
    for axis, found in evidence.contracted.items():
        evidence.contracted[axis] = [
            replace(
                c,
                alone=readings[c.weight, c.weight_axis] == len(evidence.uses[c.weight])
                and c.weight not in evidence.tied,
            )
            for c in found
        ]


def _relations(
    node: fx.Node, module: nn.Module | None, names: Names, sizes: dict[fx.Node, SizeRead]
) -> Iterable[Relation]:
    """Return what the rule of one node says about its axes."""
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
    if node.kwargs.get("out") is not None:
        return list(site.all_opaque("it is used by a call with an out= argument, which writes into existing memory"))
    operator = operator_of(node, module)
    rule = operator.rule
    used = _sizes_used(node, sizes)
    source = node.args[0] if node.args else None
    name = describe(node, module)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return [*used, *site.all_opaque(f"operator {name} passes it to a nested graph, which vbpfx does not analyse")]
    if isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor) and source not in sizes:
        if operator_of(source).takes_apart:  # the rule of the call that took it apart has described the parts
            return used
        return [*used, *site.all_opaque(f"it is one of several values of {source.name}")]
    why = _obstacle_of(node, module) if module is not None else getattr(node.target, "refusal", "")
    if operand_of(node, names) is None and not operator.takes_apart:
        return [*used, *site.all_opaque(why or f"operator {name} makes several values of it")]
    if rule is None:
        return [*used, *site.all_opaque(why or f"operator {name} {_UNLISTED}")]
    hooked = list(site.all_opaque(why)) if why else []
    if rule is not elementwise and site.operands and not site.x.ndim:
        return [*used, *site.all_opaque(f"operator {name} takes a single number")]
    try:
        found = list(rule(site))
        stated = {node for relation in found if isinstance(relation, SizeStated) for node in relation.computed}
        used = _sizes_used(node, {argument: read for argument, read in sizes.items() if argument not in stated})
        if operator.reads_sizes:
            followed = {axis for relation in found if isinstance(relation, Same) for axis in (relation.a, relation.b)}
            refused = {relation.axis for relation in found if isinstance(relation, Opaque)}
            used = [relation for relation in used if relation.axis not in followed | refused]
        return [*used, *hooked, *found]
    except ComputedArgumentError as argument:
        return [*used, *site.all_opaque(f"operator {name} computes its argument {argument}")]


def _sizes_used(node: fx.Node, sizes: dict[fx.Node, SizeRead]) -> list[Opaque]:
    return [
        Opaque(axis, "its size enters a computation", True)
        for argument in node.all_input_nodes
        if argument in sizes
        for axis in sizes[argument].axes
    ]


def _note(relation: Relation, node: fx.Node, evidence: Evidence) -> None:
    match relation:
        case Opaque(axis) | Reduces(axis, _) | SizeStated(axis) if axis not in evidence.sizes:
            return  # this is about a single number, which has no axes
        case Same(a, b) | Produces(a, b) | Paired(a, b) if evidence.sizes.get(a) != evidence.sizes.get(b):
            # broadcasting, or a tensor without axes where the rule expects one: nothing is known about either axis
            _note_other_size((a, b), node, evidence)
        case Contracts(source, weight, groups=groups) if evidence.sizes.get(source, 0) != groups * evidence.sizes.get(
            weight, 0
        ):
            _note_other_size((source, weight), node, evidence)
        case Contracts(source, weight, _) if source.is_parameter:
            evidence.graph.add_edge(source, weight)
            evidence.opaque[source].append((node.name, "a layer reads a parameter directly"))
        case Same(a, b):
            evidence.graph.add_edge(a, b)
        case Paired(first, second) if first.is_parameter or second.is_parameter:
            for axis in (first, second):
                evidence.graph.add_node(axis)
                evidence.opaque[axis].append((node.name, "a product with a parameter sums over it"))
        case Paired(first, second):
            evidence.graph.add_nodes_from((first, second))
            evidence.pairs.append(relation)
            own_scale = operator_of(node).scales_by_width and _SCALE.given(node) is None
            evidence.paired[first].append(Factor(node.name, _source(first, evidence), "query", own_scale))
            evidence.paired[second].append(Factor(node.name, _source(second, evidence), "key", own_scale))
        case Part(whole, part, _):
            evidence.graph.add_nodes_from((whole, part))
            evidence.parts.append(relation)
        case Grouped(whole, part):
            evidence.graph.add_nodes_from((whole, part))
            evidence.grouped.append(relation)
        case Merged():
            evidence.merged.append(relation)
        case Stacked(whole, inner):
            evidence.graph.add_nodes_from((whole, inner))
            evidence.stacked.append(relation)
        case Repeated():
            evidence.repeated.append(relation)
        case Reduces(source, _) if source.is_parameter:
            evidence.opaque[source].append((node.name, "a statistic is taken over a parameter"))
        case Reduces(source, kind):
            evidence.graph.add_node(source)
            path = enclosing_module(node)[0]
            calls = evidence.calls[path, node.target]
            evidence.reduced[source].append(
                Reduction(node.name, _source(source, evidence), kind, evidence.sizes[source], path, calls)
            )
        case Opaque(axis, reason, in_order):
            evidence.graph.add_node(axis)
            if not in_order:
                evidence.out_of_order.add(axis)
            evidence.opaque[axis].append((node.name, reason))
        case Produces(out, weight, groups, routing):
            evidence.graph.add_edge(out, weight)
            if routing is not None:
                evidence.routed[node.name] = routing
            if groups > 1:
                evidence.divided[out].append((groups, node.name))
            _own_weight(weight, node, evidence)
            evidence.produced[weight].append(weight.owner)
            evidence.producing[out].append(node.name)
        case Contracts(source, weight, bias, routing=Routing()):
            evidence.graph.add_edge(source, weight)
            _note_consumer(relation, "" if bias is None else bias.owner, node, evidence)
        case Contracts(source, weight, bias, padded, groups):
            if groups == 1:
                evidence.graph.add_edge(source, weight)
            else:  # each row of the weight reads its own part of the axis
                evidence.graph.add_node(source)
                evidence.divided[source].append((groups, node.name))
            _own_weight(weight, node, evidence)
            own_bias = bias is None or (bias.is_parameter and bias.shape == _outputs(weight, evidence))
            if not padded and not own_bias:
                evidence.opaque[source].append((node.name, "the bias of the layer that reads it is not one of its own"))
            name = _new_bias(weight, evidence) if bias is None else bias.owner
            if not padded and evidence.biases.setdefault(name, weight) != weight:
                evidence.opaque[source].append((node.name, f"{name} is the bias of another layer, too"))
            _note_consumer(relation, name, node, evidence)
        case SizeStated(axis, path, start, stop, by_code, computed):
            evidence.graph.add_node(axis)
            end = evidence.sizes[axis] if stop is None else stop
            place = ("module", enclosing_module(node)[0], *path[1:]) if path[0] == "module" else path
            literal = SizeLiteral(node.name, place, axis.owner, axis.dim, start, end, by_code, axis.is_parameter)
            evidence.literals[axis].append(literal)
            if computed:
                evidence.computed_sizes[literal] = computed


def _note_consumer(relation: Contracts, bias: str, node: fx.Node, evidence: Evidence) -> None:
    of_experts = relation.routing is not None
    evidence.contracted[relation.source].append(
        Consumer(
            node=node.name,
            source=_source(relation.source, evidence),
            weight=relation.weight.owner,
            weight_axis=relation.weight.dim,
            bias=bias,
            creates_bias=relation.bias is None and not of_experts,
            is_layer=not of_experts and is_layer(node, relation.weight.owner),
            padded=relation.padded,
            groups=relation.groups,
            routing=relation.routing,
            total=relation.total,
        )
    )


def _note_experts(node: fx.Node, said: list[Relation], names: Names, evidence: Evidence) -> None:
    """Note which entries of stacks a call reads, and which calls read the stacks themselves."""
    own = stack_read(node, names)
    reads = [own] if own is not None and own.routing is not None else []
    for read in reads:
        assert read.routing is not None
        evidence.routed[node.name] = read.routing
        evidence.lookups.add(node.name)
    if any(isinstance(relation, (Produces, Contracts)) and relation.routing is not None for relation in said):
        given = (stack_read(argument, names) for argument in node.all_input_nodes)
        reads += [read for read in given if read is not None]
    for read in reads:
        evidence.experts_read[read.parameter.owner].add(evidence.position[(read.use or node).name])


def _note_other_size(axes: Iterable[Axis], node: fx.Node, evidence: Evidence) -> None:
    for axis in axes:
        if axis in evidence.sizes:
            evidence.opaque[axis].append((node.name, "it is combined with an axis of another size"))
            evidence.graph.add_node(axis)


def _note_unread(
    node: fx.Node, module: nn.Module | None, names: Names, said: list[Relation], evidence: Evidence
) -> None:
    """Note the weight matrices that an operator reads together with a computed value, if no rule explains them."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return
    values = [n.meta.get("val") for n in node.all_input_nodes if n in evidence.computed]
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return
    opaque = {relation.axis.owner: relation.reason for relation in said if isinstance(relation, Opaque)}
    weights: list[tuple[str, str]] = []
    for argument in node.all_input_nodes:
        own, weight = operand_of(argument, names), _parameter_behind(argument, names, evidence)
        if own is not None and weight is not None and weight.ndim > 1 and own.owner in opaque:
            weights.append((weight.owner, opaque[own.owner]))
    for name, reason in weights:
        evidence.unread.setdefault(name, Unread(_owner(name), evidence.sizes[Axis(name, 0, True)], node.name, reason))
    if module is not None and (reason := _obstacle_of(node, module)):
        _note_leaf(node, module, reason, evidence)


def _note_leaf(node: fx.Node, module: nn.Module, reason: str, evidence: Evidence) -> None:
    """Note all weight matrices of a layer that is one call in the graph, and that no rule explains."""
    path = str(node.target)
    for below, tensor in named_tensors(module).items():
        if tensor.ndim > 1:
            evidence.unread.setdefault(f"{path}.{below}", Unread(path, len(tensor), node.name, reason))
    if not named_tensors(module) and module.state_dict():  # its weights are packed, as quantised weights are
        value = node.meta.get("val")
        width = value.shape[-1] if isinstance(value, Tensor) and value.ndim else 1
        evidence.unread.setdefault(f"{path}.weight", Unread(path, width, node.name, reason))


def _owner(weight: str) -> str:
    return weight.rpartition(".")[0] or weight


def _obstacle_of(node: fx.Node, module: nn.Module) -> str:
    """Return the reason why no rule explains a layer that is one call in the graph; an empty string if a rule does."""
    if parametrize.is_parametrized(module):
        return f"layer {node.target} {_PARAMETRIZED}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"layer {node.target} {_hooked(module)}"
    if type(module).__module__.startswith("torch.ao.nn"):
        return f"layer {node.target} is quantised ({type(module).__name__}): prune the plain model, and quantise the result"
    if isinstance(module, torch.jit.ScriptModule):
        return f"layer {node.target} is TorchScript, which has no Python code to trace: put the module in that the script was made of"
    return "" if operator_of(node, module).rule is not None else f"operator {describe(node, module)} {_UNLISTED}"


def _hooked(module: nn.Module) -> str:
    """Return what a layer's hooks do, and how to remove them."""
    for hook in module._forward_pre_hooks.values():
        maker = type(hook).__module__
        if maker in _REMOVED_BY:
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
            return _REMOVED_BY[maker].format(name=name)
    return "has forward hooks, which may read or change it"


def _parameter_behind(node: fx.Node, names: Names, evidence: Evidence) -> Operand | None:
    """Return the parameter that a value is, or that it is computed from without the model's inputs; None otherwise."""
    while node.op != "get_attr" and node not in evidence.computed and node.all_input_nodes:
        node = node.all_input_nodes[0]
    operand = operand_of(node, names)
    return operand if operand is not None and operand.is_parameter else None


def _source(axis: Axis, evidence: Evidence) -> ValueAxis:
    return ValueAxis(axis.owner, axis.dim - evidence.nodes[axis.owner].meta["val"].ndim, 0)


def _own_weight(weight: Axis, node: fx.Node, evidence: Evidence) -> None:
    if weight.is_parameter:
        return
    behind = _parameter_behind(evidence.nodes[weight.owner], evidence.names, evidence)
    path, _ = enclosing_module(node)
    reason = "the weight of the layer is a computed value"
    if behind is not None and path and behind.owner == f"{path}.weight":
        reason = (
            f"the layer computes its weight from {behind.owner} before every call: store what it computes in a plain layer first "
            f"(vbpfx.store_weights(model, batch))"
        )
    evidence.opaque[weight].append((node.name, reason))


def _outputs(weight: Axis, evidence: Evidence) -> tuple[int, ...]:
    """Return the shape of the bias that belongs to a weight: one entry per output."""
    return (evidence.sizes[weight._replace(dim=1 - weight.dim)],)


def _new_bias(weight: Axis, evidence: Evidence) -> str:
    """Return the name for the new bias of a layer that has none: beside its weight, and not used by another tensor."""
    owner, _, attribute = weight.owner.rpartition(".")
    name = f"{owner}.bias".lstrip(".") if attribute == "weight" else f"{weight.owner}_bias"
    while Axis(name, 0, True) in evidence.sizes:
        name += "_"
    return name


def _count_uses(node: fx.Node, module: nn.Module | None, names: Names, evidence: Evidence) -> None:
    position = evidence.position[node.name]
    if module is not None:
        own = names.of_module[str(node.target)].values()
        for name in own:
            evidence.uses[name].append(position)
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and str(argument.target) in names.of_attribute:
            evidence.uses[names.of_attribute[str(argument.target)]].append(position)
