"""Compute the narrowed parameters and buffers of a plan, and copy a module with them.

Every consumer gets W' = W_K + W_P B and b' = b + W_P a, plus the plan's corrections. The narrowed tensors are computed
first. Then the module is deep-copied with them in place of the old ones. So nothing is copied twice, and the original
is never changed.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.errors import ArtifactError
from vbpfx.graph.capture import named_tensors, plain_tensors
from vbpfx.planning.compensate import fold, fold_columns, fold_taps
from vbpfx.plans.records import Block, BlockPlan, Consumer, ParameterAxis, Plan, Reduction, SizeLiteral, ValueAxis
from vbpfx.rewrite.basis import Coordinates
from vbpfx.rewrite.carry import Carried

# (node or parameter, axis, whether it is a parameter) -> the removed channels of that axis
Removed = Mapping[tuple[str, int, bool], frozenset[int]]


def require_same_structure(found: str, plan: Plan, model: nn.Module) -> None:
    """Raise an ArtifactError if the model's fingerprint is not the one that the plan was made for."""
    if found != plan.fingerprint:
        raise ArtifactError(
            f"the plan was made for a model of another structure than this {type(model).__name__}: parameter names, "
            f"shapes or module classes differ; build the model as it was when it was pruned"
        )


def narrowed(
    root: nn.Module, plan: Plan, share: bool, instead: Mapping[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """Return a narrowed copy of a module, with the plan's folds and corrections applied.

    Args:
        root: the model, or its graph.
        share: do not copy parameters that are not narrowed, but share them with ``root``. Buffers are never shared.
        instead: modules of ``root`` -> modules with the same parameters that replace them.
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
    _state_features(small, plan)
    return small


def _replacements(tensors: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """Return the tensors that change and the biases that are created, each by name."""
    changes = Changes(plan)
    replaced: dict[str, Tensor] = {}
    created: dict[str, nn.Parameter] = {}
    for name in changes.names:
        new = changes.of(name, tensors.__getitem__)
        if name in changes.made:
            created[name] = nn.Parameter(new, requires_grad=tensors[changes.made[name].weight].requires_grad)
        else:
            like = tensors[name]
            replaced[name] = nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new
    return replaced, created


class Changes:
    """Computes what each of a model's tensors becomes under a plan, one tensor at a time.

    Attributes:
        made: name of a bias that is created -> the layer that gets it.
        names: the names of all tensors that change or are created.
    """

    def __init__(self, plan: Plan) -> None:
        self._cuts: dict[str, list[tuple[int, frozenset[int]]]] = defaultdict(list)
        for (owner, axis, of_parameter), positions in removed_channels(plan).items():
            if of_parameter:
                self._cuts[owner].append((axis, positions))
        self._cuts_in_groups: dict[str, list[tuple[int, int, Tensor]]] = defaultdict(list)
        for entry in plan.blocks:
            for p in entry.block.parameters:
                if p.groups > 1:
                    self._cuts_in_groups[p.name].append((p.axis, p.groups, p.at(entry.gone)))
        self.made = {consumer.bias: consumer for consumer in new_biases(plan).values()}
        for name, consumer in self.made.items():
            cuts = self._cuts[consumer.weight]
            self._cuts[name] = [(0, positions) for axis, positions in cuts if axis == 1 - consumer.weight_axis]
        self._coordinates = Coordinates(plan)
        self._gains = self._readers(plan)
        self._set = self._settings(plan)
        corrections = {c.layer.weight: c.weight for c in plan.corrections}
        self._corrections = corrections | {
            c.layer.bias: c.bias for c in plan.corrections if c.layer.bias in self.made or not c.layer.creates_bias
        }
        self.names = tuple(
            {
                **self._cuts,
                **self._cuts_in_groups,
                **self._gains,
                **self._set,
                **self._corrections,
                **dict.fromkeys(self._coordinates.names),
            }
        )

    def of(self, name: str, dense: Callable[[str], Tensor]) -> Tensor:
        """Return what a tensor becomes; ``dense`` maps a name to the dense model's tensor."""

        def turned(name: str) -> Tensor:
            return self._coordinates.of(name, dense(name))

        if name in self.made:
            weight = dense(self.made[name].weight)
            like = new = weight.new_zeros(weight.shape[1 - self.made[name].weight_axis])
        else:
            like, new = dense(name).detach(), turned(name).detach()
        if name in self._gains:
            new = new.double() + sum(_gain(name, *reader, turned) for reader in self._gains[name])
        if name in self._set:
            new = new.clone()
            for axis, position, value in self._set[name]:
                new.select(axis, position).fill_(value)
        if name in self._cuts_in_groups:
            new = _cut_in_groups(new, self._cuts_in_groups[name])
        for axis, positions in self._cuts.get(name, ()):
            new = new.index_select(axis, _others(positions, new.shape[axis]).to(new.device))
        if name in self._corrections:
            new = new.double() + self._corrections[name].to(new.device, torch.float64).view_as(new)
        return new.to(like.dtype)

    def _readers(self, plan: Plan) -> dict[str, list[tuple[BlockPlan, Consumer]]]:
        """Return weight or bias -> the consumers, each with its block, whose fold is added to it."""
        found: dict[str, list[tuple[BlockPlan, Consumer]]] = defaultdict(list)
        for entry in plan.blocks:
            # several calls of one layer would fold the same constants into the same bias; they are folded once
            consumers = {(c.bias, c.weight, c.weight_axis, c.source.start): c for c in entry.block.consumers}
            for consumer in consumers.values():
                if consumer.routing is not None:
                    if consumer.bias:
                        found[consumer.bias].append((entry, consumer))
                    if any(prediction is not None for prediction in entry.predictions):
                        found[consumer.weight].append((entry, consumer))
                    continue
                if not consumer.padded and (not consumer.creates_bias or consumer.bias in self.made):
                    found[consumer.bias].append((entry, consumer))
                if entry.constants_in or entry.prediction_at(consumer.source) is not None:
                    found[consumer.weight].append((entry, consumer))
        return found

    def _settings(self, plan: Plan) -> dict[str, list[tuple[int, int, float]]]:
        """Return parameter -> (axis, position, value) for all constant channels on its axes.

        A bias that folding creates for a producer is 0 there, since the producer had none.
        """
        made_for = {(c.weight, 1 - c.weight_axis): name for name, c in self.made.items()}
        found: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        for entry in plan.blocks:
            for setting in entry.block.constant.settings if entry.block.constant else ():
                parameter, bias = setting.parameter, made_for.get((setting.parameter.name, setting.parameter.axis))
                for position in parameter.at(entry.constants_in).tolist():
                    found[parameter.name].append((parameter.axis, position, setting.value))
                    if bias is not None:
                        found[bias].append((0, position, 0.0))
        return found


def _gain(name: str, entry: BlockPlan, consumer: Consumer, dense: Callable[[str], Tensor]) -> Tensor:
    """Return what the fold of one block's removed neurons adds to a weight or bias, float64, in its dense shape."""
    if consumer.routing is not None:
        return _gain_of_experts(name, entry, consumer, dense(consumer.weight))
    weight, axis, constants = dense(consumer.weight), consumer.weight_axis, entry.constants_at(consumer.source)
    kept, pruned = consumer.source.at(entry.kept), consumer.source.at(entry.pruned)
    if name == consumer.bias:
        return fold(weight, axis, pruned, constants, consumer.groups)
    prediction = entry.prediction_at(consumer.source)
    gain = (
        torch.zeros_like(weight, dtype=torch.float64)
        if prediction is None
        else fold_columns(weight, axis, kept, pruned, prediction, consumer.groups)
    )
    if entry.constants_in:
        _set_constant_columns(gain, weight, entry, consumer)
    return gain


def _gain_of_experts(name: str, entry: BlockPlan, consumer: Consumer, stack: Tensor) -> Tensor:
    """Return what the folds of all experts add to the stack of their weights or biases, float64, in its dense shape."""
    axis = consumer.weight_axis - 1  # of one expert's weight
    gains = []
    for expert, weight in enumerate(stack):
        kept, pruned = entry.of_expert(expert)
        prediction = entry.predictions[expert]
        if name == consumer.bias:
            gains.append(fold(weight, axis, pruned, entry.constants[expert]))
        elif prediction is None:
            gains.append(torch.zeros_like(weight, dtype=torch.float64))
        else:
            gains.append(fold_columns(weight, axis, kept, pruned, prediction))
    return torch.stack(gains)


def _set_constant_columns(gain: Tensor, weight: Tensor, entry: BlockPlan, consumer: Consumer) -> None:
    """Write to a weight's gain what turns its columns at constant channels into W_P a / c, in place.

    A group of the layer's rows may read several constant channels, if other layers have more groups. It needs only the first of
    them, and its columns for the others become 0, as do all these columns of a layer that does not pad.
    """
    axis, pruned = consumer.weight_axis, consumer.source.at(entry.pruned)
    columns = torch.zeros_like(gain).select(axis, 0)
    if consumer.padded:
        taps = fold_taps(weight, axis, pruned, entry.constants_at(consumer.source), consumer.groups)
        columns = taps / entry.value_at(consumer.source)
    gains, dense, wanted = (t.chunk(consumer.groups, 0) for t in (gain, weight.detach().double(), columns))
    for place in consumer.source.at(entry.constants_in).tolist():
        group, column = divmod(place, weight.shape[axis])
        gains[group].select(axis, column).copy_(wanted[group] - dense[group].select(axis, column))
        wanted[group].zero_()


def _cut_in_groups(weight: Tensor, cuts: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Return a grouped convolution's weight, or a stack of experts, without channels.

    Every group loses as many, but not the same ones.

    Args:
        weight: (out, in / groups, ...), or (experts, ...).
        cuts: (axis, groups, positions), with positions among the channels of all groups one behind the other.
    """
    for axis, groups in dict.fromkeys((axis, groups) for axis, groups, _ in cuts):
        size = weight.shape[axis]
        gone: list[set[int]] = [set() for _ in range(groups)]
        for position in torch.cat([found for at, _, found in cuts if at == axis]).tolist():
            gone[position // size].add(position % size)
        parts = [
            part.index_select(axis, _others(frozenset(own), size).to(part.device))
            for own, part in zip(gone, weight.chunk(groups, 0), strict=True)
        ]
        weight = torch.cat(parts)
    return weight


def new_biases(plan: Plan) -> dict[str, Consumer]:
    """Return node -> layer for the layers that need a new bias: they have none, and what is added is not zero."""
    found = {
        consumer.node: consumer
        for entry in plan.blocks
        for consumer in entry.block.consumers
        if consumer.creates_bias and not consumer.padded and bool(entry.constants_at(consumer.source).any())
    }
    corrected = [c for c in plan.corrections if c.layer.creates_bias and bool(c.bias.any())]
    return found | {call.node: call for c in corrected for call in c.calls}


def _others(positions: frozenset[int], size: int) -> Tensor:
    """Return the indices 0 .. size - 1 without the given ones."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(positions)] = False
    return kept.nonzero().flatten()


def _state_widths(layer: nn.Module) -> None:
    """Set a layer's own size attributes, such as ``in_features``, to its narrowed sizes."""
    match layer:
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case nn.modules.conv._ConvTransposeNd():
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        case nn.modules.conv._ConvNd():
            depthwise, channels = layer.groups == layer.in_channels > 1, layer.out_channels // layer.groups
            layer.out_channels = layer.weight.shape[0]
            layer.groups = layer.weight.shape[0] // channels if depthwise else layer.groups
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


def _state_features(small: nn.Module, plan: Plan) -> None:
    """Set ``num_features`` of norms without parameters, from which it cannot be read, to the narrowed number of channels."""
    removed = removed_channels(plan)
    layers = dict(small.named_modules())
    for literal in (literal for entry in plan.blocks for literal in entry.block.literals if literal.of_module):
        layer = layers.get(str(literal.path[1]))  # graphs of torch.export do not have it
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.num_features = literal.stop - literal.start - gone(literal, removed)


def removed_channels(plan: Plan) -> Removed:
    """Return the channels that the narrowed network lacks, for every axis that belongs to a block of the plan.

    On an axis that has the channels of one group of a block (of one head of attention), they are those of the first group. All groups
    lack as many.
    """
    return _channels(plan, lambda entry: entry.gone)


def pruned_channels(plan: Plan) -> Removed:
    """Return the channels of every axis that do not hold a kept neuron: the removed ones, and those that became constant."""
    return _channels(plan, lambda entry: entry.pruned)


def constant_channels(plan: Plan) -> Removed:
    """Return the constant channels of every axis, as positions on the narrowed axis."""
    removed = removed_channels(plan)
    held = _channels(plan, lambda entry: entry.constants_in)
    return {
        key: frozenset(p - sum(r < p for r in removed[key]) for p in positions)
        for key, positions in held.items()
        if positions
    }


def _channels(plan: Plan, chosen: Callable[[BlockPlan], Sequence[int]]) -> Removed:
    found: dict[tuple[str, int, bool], frozenset[int]] = {}
    for entry in plan.blocks:
        channels = _in_values(entry.block, chosen(entry))
        values = [((c.node, c.axis, False), c) for c in entry.block.carriers]
        parameters = [((p.name, p.axis, True), p) for p in entry.block.parameters if p.groups == 1]
        at: dict[tuple[int, ...], frozenset[int]] = {}
        places: list[tuple[tuple[str, int, bool], ValueAxis | ParameterAxis]] = [*values, *parameters]
        for key, place in places:
            own = place.place
            if own not in at:
                here = [c for c in channels if c < place.size] if own[2] and not own[3] else channels
                at[own] = frozenset(place.at(here).tolist())
            found[key] = found[key] | at[own] if key in found else at[own]
    return found


def _in_values(block: Block, channels: Sequence[int]) -> Sequence[int]:
    """Return channels as places in a block's values.

    The values of a stack have as many channels as one expert. Every expert loses as many of them, and the first one stands for all:
    only their number means something.
    """
    return block.in_groups(channels)[0] if block.has_experts else channels


def gone(literal: SizeLiteral, removed: Removed) -> int:
    """Return how many of the channels that a number counts were removed."""
    positions = removed.get((literal.owner, literal.axis, literal.of_parameter), ())
    return sum(literal.start <= p < literal.stop for p in positions)


def carried(plan: Plan) -> dict[str, tuple[Reduction, Carried]]:
    """Return node -> the statistic that it computes, and the removed channels of all blocks on its axis."""
    found: dict[str, Reduction] = {}
    constants: dict[str, list[Tensor]] = defaultdict(list)
    for entry in plan.blocks:
        for reduction in entry.block.reductions:
            found[reduction.node] = reduction
            constants[reduction.node].append(entry.constants_at(reduction.source))
    return {name: (r, Carried(r.size, torch.cat(constants[name]))) for name, r in found.items()}
