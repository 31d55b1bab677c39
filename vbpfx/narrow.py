"""Narrowed tensors: what a plan makes of parameters and buffers, and what becomes of the rest.

The narrowed tensors are made first; then the module is deep-copied with them in place of the old ones. So nothing is
ever copied twice, and the original is never touched.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.capture import named_tensors, plain_tensors
from vbpfx.carry import Carried
from vbpfx.compensate import fold
from vbpfx.errors import ArtifactError
from vbpfx.records import BlockPlan, Consumer, Plan, Reduction, SizeLiteral

# (node or parameter, axis, whether it is a parameter) -> the channels of it that are gone
Removed = Mapping[tuple[str, int, bool], frozenset[int]]


def require_same_structure(found: str, plan: Plan, model: nn.Module) -> None:
    """Raise an ArtifactError where a model's fingerprint is not the one that the plan was made for."""
    if found != plan.fingerprint:
        raise ArtifactError(
            f"the plan was made for a model of another structure than this {type(model).__name__}: parameter names, "
            f"shapes or module classes differ; build the model as it was when it was pruned"
        )


def narrowed(
    root: nn.Module, plan: Plan, share: bool, instead: Mapping[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """A copy of a module, narrowed: for every consumer W' = W[:, K] and b' = b + W[:, P] a.

    Args:
        root: the model, or its graph.
        share: share the parameters that are not narrowed with it. Buffers are never shared.
        instead: modules of it -> those that take their place, with the same parameters.
    """
    tensors = named_tensors(root)
    replaced, created = _replacements(tensors, plan)
    memo: dict[int, Any] = {id(tensors[name]): new for name, new in replaced.items()} | plain_tensors(root)
    if share:
        memo |= {id(p): p for p in root.parameters() if id(p) not in memo}
    memo |= {id(module): copy.deepcopy(other, memo) for module, other in (instead or {}).items()}
    small: nn.Module = copy.deepcopy(root, memo)
    for name, bias in created.items():
        owner, _, attribute = name.rpartition(".")
        small.get_submodule(owner).register_parameter(attribute, bias)
    for owner in {name.rpartition(".")[0] for name in replaced}:
        _state_widths(small.get_submodule(owner))
    return small


def _replacements(tensors: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """Every tensor that changes, and the biases that come into being, by name."""
    cuts: dict[str, list[tuple[int, frozenset[int]]]] = defaultdict(list)
    for (owner, axis, of_parameter), positions in removed_channels(plan).items():
        if of_parameter:
            cuts[owner].append((axis, positions))
    shifts: dict[str, Tensor] = {}
    made: dict[str, str] = {}
    for entry in plan.blocks:
        # several calls of one layer fold the same constants into the same bias: once
        folds = {(c.bias, c.weight, c.weight_axis, c.source.start): c for c in entry.block.consumers}
        for consumer in folds.values():
            if consumer.creates_bias and not needs_bias(entry, consumer):
                continue
            pruned = torch.tensor(entry.pruned) + consumer.source.start
            constants = entry.constants_at(consumer.source)
            shift = fold(tensors[consumer.weight], consumer.weight_axis, pruned, constants)
            shifts[consumer.bias] = shifts[consumer.bias] + shift if consumer.bias in shifts else shift
            if consumer.creates_bias:
                made[consumer.bias] = consumer.weight
                out = 1 - consumer.weight_axis
                cuts[consumer.bias] = [(0, gone) for axis, gone in cuts.get(consumer.weight, ()) if axis == out]
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


def needs_bias(entry: BlockPlan, consumer: Consumer) -> bool:
    """Whether a layer must get a bias: it has none, and what stands for the removed neurons is not zero."""
    return consumer.creates_bias and bool(entry.constants_at(consumer.source).any())


def _others(positions: frozenset[int], size: int) -> Tensor:
    """The indices 0 .. size - 1 without the given ones."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(positions)] = False
    return kept.nonzero().flatten()


def _state_widths(layer: nn.Module) -> None:
    """Make the numbers that a layer keeps about itself true again."""
    match layer:
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case nn.modules.conv._ConvTransposeNd():
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
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


def removed_channels(plan: Plan) -> Removed:
    """Every channel that is gone, of every axis that a block of the plan stands on."""
    removed: dict[tuple[str, int, bool], set[int]] = defaultdict(set)
    for entry in plan.blocks:
        for node, axis, start in entry.block.carriers:
            removed[node, axis, False].update(start + p for p in entry.pruned)
        for parameter in entry.block.parameters:
            removed[parameter.name, parameter.axis, True].update(parameter.start + p for p in entry.pruned)
    return {key: frozenset(positions) for key, positions in removed.items()}


def gone(literal: SizeLiteral, removed: Removed) -> int:
    """How many of the channels that a number counts are gone."""
    positions = removed.get((literal.owner, literal.axis, literal.of_parameter), ())
    return sum(literal.start <= p < literal.stop for p in positions)


def carried(plan: Plan) -> dict[str, tuple[Reduction, Carried]]:
    """Node -> the statistic it takes, and what all removed channels of its axis add to it."""
    found: dict[str, Reduction] = {}
    constants: dict[str, list[Tensor]] = defaultdict(list)
    for entry in plan.blocks:
        for reduction in entry.block.reductions:
            found[reduction.node] = reduction
            constants[reduction.node].append(entry.constants_at(reduction.source))
    return {name: (r, Carried(r.size, torch.cat(constants[name]))) for name, r in found.items()}
