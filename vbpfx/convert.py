"""Convert: carry a plan out, on the captured graph or on the model's own class.

Both are one rewrite. The narrowed tensors are made first; then the module is deep-copied with them in
place of the old ones. So nothing is ever copied twice, and the original is never touched.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.capture import Captured, fingerprint, named_tensors, plain_tensors, require_module
from vbpfx.compensate import fold
from vbpfx.edit import finish
from vbpfx.errors import ArtifactError
from vbpfx.records import BlockPlan, Consumer, Plan, SizeLiteral


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
    for entry in plan.blocks:
        for literal in entry.block.literals:
            _state_size(nodes[literal.node], literal, len(entry.kept))
        for name, axis in entry.block.carriers:
            _narrow_meta(nodes[name], axis, len(entry.kept))
        for consumer in entry.block.consumers:
            if consumer.creates_bias:
                _pass_bias(small, nodes[consumer.node], consumer)
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
    for entry in plan.blocks:
        # torch.export writes every size as a number, wherever it came from: there a literal says nothing of the code
        if entry.block.literals and plan.frontend == "symbolic":
            raise ArtifactError(
                f"block {entry.block.name}: the model's code states the hidden width {entry.block.width} as a number (node "
                f"{entry.block.literals[0].node}), which no rewrite of tensors can change; use the GraphModule"
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
    cuts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    shifts: dict[str, Tensor] = {}
    made: dict[str, str] = {}
    for entry in plan.blocks:
        kept, pruned = torch.tensor(entry.kept), torch.tensor(entry.pruned)
        for parameter in entry.block.parameters:
            cuts[parameter.name].append((parameter.axis, kept))
        for consumer in entry.block.consumers:
            shifts[consumer.bias] = fold(
                tensors[consumer.weight], consumer.weight_axis, pruned, _constants(entry, consumer)
            )
            if consumer.creates_bias:
                made[consumer.bias] = consumer.weight
                cuts[consumer.bias] = [(0, k) for other in plan.blocks for k in _cut_across(other, consumer)]
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
        for axis, kept in cuts.get(name, ()):
            new = new.index_select(axis, kept.to(new.device))
        if name in made:
            created[name] = nn.Parameter(new, requires_grad=like.requires_grad)
        else:
            replaced[name] = nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new
    return replaced, created


def _constants(entry: BlockPlan, consumer: Consumer) -> Tensor:
    return entry.constants[entry.block.sources.index((consumer.source, consumer.axis))]


def _cut_across(entry: BlockPlan, consumer: Consumer) -> list[Tensor]:
    """The kept indices if this block narrows the consumer's output axis."""
    out = 1 - consumer.weight_axis
    return [torch.tensor(entry.kept) for p in entry.block.parameters if (p.name, p.axis) == (consumer.weight, out)]


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
        case nn.modules.batchnorm._BatchNorm():
            kept = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = len(kept) if kept is not None else layer.num_features
        case nn.PReLU():
            layer.num_parameters = layer.weight.numel()


def _state_size(node: fx.Node, literal: SizeLiteral, width: int) -> None:
    field, *path = literal.path
    setattr(node, str(field), _replaced(getattr(node, str(field)), path, width))


def _replaced(value: Any, path: list[str | int], width: int) -> Any:
    if not path:
        return width
    head, *rest = path
    if isinstance(value, dict):
        return {k: _replaced(v, rest, width) if k == head else v for k, v in value.items()}
    return type(value)([_replaced(v, rest, width) if i == head else v for i, v in enumerate(value)])


def _narrow_meta(node: fx.Node, axis: int, width: int) -> None:
    value = node.meta["val"]
    shape = list(value.shape)
    shape[axis] = width
    with value.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)


def _pass_bias(small: fx.GraphModule, node: fx.Node, consumer: Consumer) -> None:
    """Functional layers take their bias as an argument; a module finds its own."""
    if node.op == "call_module":
        return
    with small.graph.inserting_before(node):
        bias = small.graph.get_attr(consumer.bias)
    bias.meta["val"] = node.meta["val"].fake_mode.from_tensor(small.get_parameter(consumer.bias), static_shapes=True)
    if len(node.args) > 2:
        node.update_arg(2, bias)
    else:
        node.update_kwarg("bias", bias)
