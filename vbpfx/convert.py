"""Convert: carry a plan out, on the captured graph or on the model's own class.

Both are one rewrite. The narrowed tensors are made first; then the module is deep-copied with them in
place of the old ones. So nothing is ever copied twice, and the original is never touched.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.capture import Captured, fingerprint, named_tensors, plain_tensors, require_module
from vbpfx.carry import Carried, carry
from vbpfx.compensate import fold
from vbpfx.edit import finish
from vbpfx.errors import ArtifactError
from vbpfx.ops import is_matrix_product, takes_apart
from vbpfx.records import Consumer, Plan, SizeLiteral


def convert(captured: Captured, plan: Plan, *, share: bool = False) -> fx.GraphModule:
    """A new, smaller GraphModule: rows and columns of the removed neurons gone, their constants folded.

    For every consumer, W' = W[:, K] and b' = b + W[:, P] a (created where the layer had no bias).

    Args:
        share: share the parameters that are not narrowed with the model instead of copying them; for
            inference, or for models that hardly fit. Buffers are never shared.

    Raises:
        ArtifactError: the plan was made for another model, or on the graph of another front end.
    """
    if plan.fingerprint != captured.fingerprint:
        raise ArtifactError(_MISMATCH.format(model=type(captured.reference).__name__))
    if plan.frontend != captured.frontend:
        raise ArtifactError(
            f"the plan was made on a graph of frontend={plan.frontend!r}, this one is of {captured.frontend!r}: capture "
            f"the model with the same front end, or use apply_plan"
        )
    small = _narrowed(captured.graph_module, plan, share)
    assert isinstance(small, fx.GraphModule)
    nodes = {node.name: node for node in small.graph.nodes}
    removed = _removed_from_values(plan)
    _state_sizes(nodes, plan, removed)
    _narrow_meta(small, removed)
    _pass_biases(small, nodes, plan)
    for name, (kind, carried) in _statistics(captured, plan).items():
        carry(small, nodes[name], kind, carried)
    finish(small)
    return small


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """A narrowed copy of the model in its own class; the model itself stays as it was.

    This is the one to train: unlike a graph captured in eval mode it has its dropout, stochastic depth
    and BatchNorm behaviour. Code that computes with a width it remembers (``self.hidden ** -0.5``) is
    beyond any rewrite of tensors: check the result with :func:`vbpfx.verify`, as ``Pruned.apply_to`` does.

    Raises:
        ArtifactError: the plan was made for another model (names, shapes and module classes are
            compared), a layer of the model has no place for the bias that the fold makes, or the model's
            code states the hidden width (which only symbolic tracing can tell).
    """
    require_module(model)
    if fingerprint(model) != plan.fingerprint:
        raise ArtifactError(_MISMATCH.format(model=type(model).__name__))
    removed = _removed_from_values(plan)
    for entry in plan.blocks:
        if entry.block.reductions:
            raise ArtifactError(
                f"block {entry.block.name}: a statistic over the hidden axis (node {entry.block.reductions[0].node}) must go on "
                f"counting the removed channels, for which the class has no place; use the GraphModule"
            )
        for literal in entry.block.literals:
            # torch.export writes every size as a number, wherever it came from: there a literal says nothing of the code
            if literal.by_code and plan.frontend == "symbolic" and _gone(literal, removed):
                raise ArtifactError(
                    f"block {entry.block.name}: the model's code states the hidden width {entry.block.width} as a number "
                    f"(node {literal.node}), which no rewrite of tensors can change; use the GraphModule"
                )
        if (node := _unequal_chunks(entry.block.literals, removed)) is not None:
            raise ArtifactError(
                f"block {entry.block.name}: the model's code takes parts of equal size (node {node}), and narrowed they are "
                f"unequal; use the GraphModule"
            )
        for consumer in entry.block.consumers:
            if consumer.creates_bias and not _has_place_for_bias(model, consumer):
                raise ArtifactError(
                    f"block {entry.block.name}: the code around {consumer.weight} adds no bias, so the class cannot "
                    f"hold the fold; use the GraphModule, or give the layer a zero bias"
                )
    return _narrowed(model, plan, share=False)


_MISMATCH = (
    "the plan was made for a model of another structure than this {model}: parameter names, shapes or module "
    "classes differ; build the model as it was when it was pruned"
)


def _narrowed(root: nn.Module, plan: Plan, share: bool) -> nn.Module:
    tensors = named_tensors(root)
    replaced, created = _replacements(tensors, plan)
    memo: dict[int, Any] = {id(tensors[name]): new for name, new in replaced.items()} | plain_tensors(root)
    if share:
        memo |= {id(p): p for p in root.parameters() if id(p) not in memo}
    small: nn.Module = copy.deepcopy(root, memo)
    for name, bias in created.items():
        owner, _, attribute = name.rpartition(".")
        small.get_submodule(owner).register_parameter(attribute, bias)
    for owner in {name.rpartition(".")[0] for name in replaced}:
        _state_widths(small.get_submodule(owner))
    return small


def _replacements(tensors: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """Every tensor that changes, and the biases that come into being, by name."""
    removed: dict[tuple[str, int], list[int]] = defaultdict(list)
    for entry in plan.blocks:
        for parameter in entry.block.parameters:
            removed[parameter.name, parameter.axis] += [parameter.start + p for p in entry.pruned]
    shifts: dict[str, Tensor] = {}
    made: dict[str, str] = {}
    for entry in plan.blocks:
        # several calls of one layer fold the same constants into the same bias: once
        folds = {(c.bias, c.weight, c.weight_axis, c.source.start): c for c in entry.block.consumers}
        for consumer in folds.values():
            pruned = torch.tensor(entry.pruned) + consumer.source.start
            constants = entry.constants[entry.block.sources.index(consumer.source)]
            shift = fold(tensors[consumer.weight], consumer.weight_axis, pruned, constants)
            shifts[consumer.bias] = shifts[consumer.bias] + shift if consumer.bias in shifts else shift
            if consumer.creates_bias:
                made[consumer.bias] = consumer.weight
                removed[consumer.bias, 0] = removed.get((consumer.weight, 1 - consumer.weight_axis), [])
    cuts: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for (name, axis), positions in removed.items():
        if positions:
            cuts[name].append((axis, positions))
    replaced: dict[str, Tensor] = {}
    created: dict[str, nn.Parameter] = {}
    for name in {**cuts, **shifts}:
        like = tensors[made.get(name, name)]
        if name in made:
            new = shifts[name].to(like.dtype)
        elif name in shifts:
            new = (like.detach().double() + shifts[name]).to(like.dtype)
        else:
            new = like.detach()
        for axis, positions in cuts[name]:
            new = new.index_select(axis, _others(positions, new.shape[axis]).to(new.device))
        if name in made:
            created[name] = nn.Parameter(new, requires_grad=like.requires_grad)
        else:
            replaced[name] = nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new
    return replaced, created


def _others(positions: list[int], size: int) -> Tensor:
    """The indices 0 .. size - 1 without the given ones."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[positions] = False
    return kept.nonzero().flatten()


def _has_place_for_bias(model: nn.Module, consumer: Consumer) -> bool:
    owner, _, attribute = consumer.bias.rpartition(".")
    layer = model.get_submodule(owner)
    # a subclass may compute without the bias it inherits
    own = type(layer).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return consumer.is_layer and own and attribute == "bias" and layer.bias is None


def _state_widths(layer: nn.Module) -> None:
    """Make the numbers that a layer keeps about itself true again."""
    match layer:
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case nn.modules.conv._ConvNd():
            depthwise = layer.groups == layer.in_channels > 1
            layer.out_channels = layer.weight.shape[0]
            layer.groups = layer.weight.shape[0] if depthwise else layer.groups
            layer.in_channels = layer.weight.shape[1] * layer.groups
        case nn.modules.batchnorm._NormBase():
            kept = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = len(kept) if kept is not None else layer.num_features
        case nn.PReLU():
            layer.num_parameters = layer.weight.numel()
        case nn.LayerNorm() | nn.RMSNorm():
            layer.normalized_shape = tuple(layer.weight.shape)
        case _ if type(layer).__module__ == "transformers.pytorch_utils":  # Conv1D, GPT-2's linear layer
            sizes: Any = layer.weight
            layer.nx, layer.nf = sizes.shape


Removed = Mapping[tuple[str, int], frozenset[int]]


def _removed_from_values(plan: Plan) -> Removed:
    """(node, axis) -> the channels of its value that are gone."""
    removed: dict[tuple[str, int], set[int]] = defaultdict(set)
    for entry in plan.blocks:
        for node, axis, start in entry.block.carriers:
            removed[node, axis].update(start + p for p in entry.pruned)
    return {key: frozenset(positions) for key, positions in removed.items()}


def _gone(literal: SizeLiteral, removed: Removed) -> int:
    """How many of the channels that a number counts are gone."""
    return sum(literal.start <= p < literal.stop for p in removed.get((literal.owner, literal.axis), ()))


def _unequal_chunks(literals: tuple[SizeLiteral, ...], removed: Removed) -> str | None:
    """A call that cuts an axis into parts by itself and would now cut it elsewhere; None without one."""
    sizes: dict[str, dict[Any, int]] = defaultdict(dict)
    for literal in literals:
        if not literal.by_code:
            sizes[literal.node][literal.path[-1]] = literal.stop - literal.start - _gone(literal, removed)
    for node, parts in sizes.items():
        wanted = [parts[index] for index in sorted(parts)]
        if wanted != [len(part) for part in torch.empty(sum(wanted)).chunk(len(wanted))]:
            return node
    return None


def _state_sizes(nodes: dict[str, fx.Node], plan: Plan, removed: Removed) -> None:
    """Make every number that counts channels true again."""
    literals = {(literal.node, literal.path): literal for entry in plan.blocks for literal in entry.block.literals}
    for name in {node for node, _ in literals}:
        if takes_apart(nodes[name]):
            _state_parts(nodes[name])
    for literal in literals.values():
        node, (field, *path) = nodes[literal.node], literal.path
        count = literal.stop - literal.start - _gone(literal, removed)
        setattr(node, str(field), _replaced(getattr(node, str(field)), path, count))


def _state_parts(node: fx.Node) -> None:
    """chunk, or split by one size, as a split by the sizes of its parts."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    if isinstance(node.target, torch._ops.OpOverload):
        node.target = torch.ops.aten.split_with_sizes.default
    else:
        node.target = "split" if node.op == "call_method" else torch.split
    node.args, node.kwargs = (node.args[0], [part.shape[dim] for part in node.meta["val"]], dim), {}


def _replaced(value: Any, path: list[str | int], count: int) -> Any:
    if not path:
        return -count if value < 0 else count  # a slice may count from the end
    head, *rest = path
    if isinstance(value, dict):
        return {k: _replaced(v, rest, count) if k == head else v for k, v in value.items()}
    if isinstance(value, slice):
        ends = {"start": value.start, "stop": value.stop}
        ends[str(head)] = _replaced(ends[str(head)], rest, count)
        return slice(ends["start"], ends["stop"], value.step)
    return type(value)([_replaced(v, rest, count) if i == head else v for i, v in enumerate(value)])


def _narrow_meta(small: fx.GraphModule, removed: Removed) -> None:
    nodes = {node.name: node for node in small.graph.nodes}
    for (name, axis), positions in removed.items():
        value = nodes[name].meta["val"]
        shape = list(value.shape)
        shape[axis] -= len(positions)
        with value.fake_mode:
            nodes[name].meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    tensors = named_tensors(small)
    for node in nodes.values():
        if node.op == "get_attr" and str(node.target) in tensors:
            node.meta["val"] = node.meta["val"].fake_mode.from_tensor(tensors[str(node.target)], static_shapes=True)
        if isinstance(node.meta.get("val"), (tuple, list)):
            parts = {user.args[1]: user.meta["val"] for user in node.users if user.target is operator.getitem}
            node.meta["val"] = type(node.meta["val"])(parts.get(i, v) for i, v in enumerate(node.meta["val"]))


def _pass_biases(small: fx.GraphModule, nodes: dict[str, fx.Node], plan: Plan) -> None:
    """Functional layers take a new bias as an argument, matrix products as a sum; a module finds its own."""
    consumers = {c.node: c for entry in plan.blocks for c in entry.block.consumers if c.creates_bias}
    for name, consumer in consumers.items():
        node = nodes[name]
        if node.op == "call_module":
            continue
        with small.graph.inserting_before(node):
            bias = small.graph.get_attr(consumer.bias)
        mode = node.meta["val"].fake_mode
        bias.meta["val"] = mode.from_tensor(small.get_parameter(consumer.bias), static_shapes=True)
        if is_matrix_product(node):
            _add_behind(small, node, bias, nodes[consumer.source.node])
        elif len(node.args) > 2:
            node.update_arg(2, bias)
        else:
            node.update_kwarg("bias", bias)


def _add_behind(small: fx.GraphModule, node: fx.Node, bias: fx.Node, source: fx.Node) -> None:
    """x @ W + b, or W @ x + b[:, None] where the weight stands in front."""
    with small.graph.inserting_after(bias):
        if node.args[0] is not source:
            column = small.graph.call_function(torch.unsqueeze, (bias, -1))
            column.meta["val"] = bias.meta["val"].unsqueeze(-1)
            bias = column
    with small.graph.inserting_after(node):
        total = small.graph.call_function(torch.add, (node, bias))
    total.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _statistics(captured: Captured, plan: Plan) -> dict[str, tuple[str, Carried]]:
    """Node -> the statistic it takes, and what the removed channels add to it."""
    kinds: dict[str, str] = {}
    sizes: dict[str, int] = {}
    constants: dict[str, list[Tensor]] = defaultdict(list)
    values = {node.name: node.meta["val"] for node in captured.graph_module.graph.nodes}
    for entry in plan.blocks:
        for reduction in entry.block.reductions:
            kinds[reduction.node] = reduction.kind
            sizes[reduction.node] = values[reduction.source.node].shape[reduction.source.axis]
            constants[reduction.node].append(entry.constants[entry.block.sources.index(reduction.source)])
    return {name: (kind, Carried(sizes[name], torch.cat(constants[name]))) for name, kind in kinds.items()}
