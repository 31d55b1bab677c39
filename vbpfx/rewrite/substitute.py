"""The substitution reference: a dense graph that computes what the narrowed network should compute.

At every consumer's input the removed channels h_P are replaced by a + B h_K. Behind every layer that the plan corrects,
dW x + db is added to its output, where x has the constant channels that the narrowed layer reads. No weight is sliced and no
bias is folded, so the reference shares no code with the rewrite that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import divided_by, insert_at_sources, insert_behind
from vbpfx.plans.records import Block, BlockPlan, Consumer, Correction, Plan, ValueAxis
from vbpfx.rules.calls import called_module
from vbpfx.rules.routing import Routing, rows_by_expert
from vbpfx.rules.windows import Window, applied, window_of


class Substitute(nn.Module):
    """Replaces h_P by a + B h_K at one of a block's sources, out of place."""

    def __init__(self, entry: BlockPlan, index: int) -> None:
        super().__init__()
        source = entry.block.sources[index]
        self.axis = source.axis
        self.pruned, self.kept = source.at(entry.pruned), source.at(entry.kept)
        self.constants, self.prediction = entry.constants[index], entry.predictions[index]
        self.source, self.width, self.goes = source, entry.block.width, entry.pruned
        keys = {factor.source for factor in entry.block.factors if factor.role == "key"}
        self.basis = entry.basis if entry.basis is None or source not in keys else entry.basis.dual

    def forward(self, h: Tensor) -> Tensor:
        """Return a copy of h with the channels P replaced."""
        if self.basis is not None:
            turned = in_other_coordinates(h, self.source, self.basis.to, self.width)
            return in_other_coordinates(self._replaced(turned), self.source, self.basis.back, self.width)
        return self._replaced(h)

    def _replaced(self, h: Tensor) -> Tensor:
        if self.source.of_one_group:  # factors, which are replaced by 0
            return h.masked_fill(self.source.marked(self.goes, h.shape, self.width).to(h.device), 0.0)
        pruned, values = self.pruned.to(h.device), self.constants.to(h)
        if self.prediction is not None:
            kept = h.index_select(self.axis, self.kept.to(h.device)).movedim(self.axis, -1)
            values = nn.functional.linear(kept, self.prediction.to(h), values).movedim(-1, self.axis)
            return h.index_copy(self.axis, pruned, values)
        shape = [1] * h.ndim
        shape[self.axis] = -1
        sizes = [len(pruned) if dim == self.axis % h.ndim else size for dim, size in enumerate(h.shape)]
        return h.index_copy(self.axis, pruned, values.reshape(shape).expand(sizes))


class SubstituteExperts(nn.Module):
    """Replaces h_P by a + B h_K in the rows of every expert, with this expert's own P, K, a and B, out of place."""

    def __init__(self, entry: BlockPlan, axis: int, routing: Routing) -> None:
        super().__init__()
        self.entry, self.axis, self.routing = entry, axis, routing

    def forward(self, h: Tensor, by: Tensor | None = None) -> Tensor:
        """Return a copy of h with the removed channels replaced; ``by`` is the value of the node ``routing.by``."""
        changed = h.clone()
        for expert, index in rows_by_expert(h, self.routing, by):
            kept, pruned = (channels.to(h.device) for channels in self.entry.of_expert(expert))
            rows = h[index].movedim(self.axis, -1).clone()
            constants, prediction = self.entry.constants[expert].to(h), self.entry.predictions[expert]
            predicted = 0.0 if prediction is None else rows[..., kept] @ prediction.to(h).T
            rows[..., pruned] = constants + predicted
            changed[index] = rows.movedim(-1, self.axis)
        return changed


def in_other_coordinates(h: Tensor, place: ValueAxis, matrices: Tensor, width: int) -> Tensor:
    """Return a value with the channels of every group of a block multiplied by the group's matrix.

    Args:
        h: the value.
        place: the block's channels in it.
        matrices: (groups, d, d).
        width: the block's width.
    """
    axis, matrices = place.axis % h.ndim, matrices.to(h)
    if place.of_one_group:
        counting = place.counting % h.ndim
        entries = torch.arange(h.shape[counting], device=h.device) // place.divisor % len(matrices)
        own = h.movedim((counting, axis), (-2, -1))
        return torch.einsum("...nc,nkc->...nk", own, matrices[entries]).movedim((-2, -1), (counting, axis))
    positions = place.at(range(width)).to(h.device)
    own = h.index_select(axis, positions).movedim(axis, -1)
    parts = own.reshape(*own.shape[:-1], len(matrices), -1)
    turned = torch.einsum("...gc,gkc->...gk", parts, matrices).flatten(-2)
    return h.index_copy(axis, positions, turned.movedim(-1, axis))


class Correct(nn.Module):
    """Adds dW x + db to a layer's output for x; dW (out, in, ...) and db (out,) have the shapes of the dense layer.

    Args:
        axis: the axis of x that the layer sums over.
        window: the windows of a convolution.
        constants: (positions on the axis, value) of constant channels. The narrowed layer reads the value there, inside of its
            padding like any channel, where x has the substitutes of removed neurons.
        turned: (place, matrices, width) of blocks that the narrowed layer reads in other coordinates.
    """

    def __init__(
        self,
        axis: int,
        window: Window | None,
        weight: Tensor,
        bias: Tensor,
        constants: Sequence[tuple[Tensor, float]],
        turned: Sequence[tuple[ValueAxis, Tensor, int]] = (),
    ) -> None:
        super().__init__()
        self.turned = turned
        self.axis, self.window, self.weight, self.bias, self.constants = axis, window, weight, bias, constants

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + dW x + db."""
        for place, matrices, width in self.turned:
            x = in_other_coordinates(x, place, matrices, width)
        for positions, value in self.constants:
            x = x.index_fill(self.axis, positions.to(x.device), value)
        return y + applied(x, self.weight.to(y), self.bias.to(y), self.axis, self.window)


def reference_graph(captured: Captured, plan: Plan) -> fx.GraphModule:
    """Return the substitution reference of a plan; it shares all parameters with the dense graph."""
    reference = share_parameters(captured.graph_module)
    corrections = {call: correction for correction in plan.corrections for call in correction.calls}

    def correct(call: Consumer) -> Correct:
        window = window_at(captured, call)
        constants = [
            (source.at(entry.constants_in), entry.value_at(source))
            for entry, source in constants_read(plan.blocks, call)
        ]
        turned = [
            (consumer.source, entry.basis.to, entry.block.width)
            for entry in plan.blocks
            for consumer in entry.block.consumers
            if entry.basis is not None and consumer.node == call.node
        ]
        return Correct(call.source.axis, window, *in_dense_shape(corrections[call], plan), constants, turned)

    substitute(reference, plan.blocks)
    insert_behind(reference, corrections, correct, "correct")
    return reference


def constants_read(entries: Sequence[BlockPlan], call: Consumer) -> list[tuple[BlockPlan, ValueAxis]]:
    """Return the blocks whose constant channels a call reads and pads, each with the value that it reads them from."""
    return [
        (entry, consumer.source)
        for entry in entries
        for consumer in entry.block.consumers
        if consumer.node == call.node and consumer.padded and entry.constants_in
    ]


def window_at(captured: Captured, layer: Consumer) -> Window | None:
    """Return the windows of a layer's call; None for a layer that reads only the position that it computes."""
    node = captured.nodes[layer.node]
    return window_of(node, called_module(captured.graph_module, node))


def substitute(graph_module: fx.GraphModule, entries: Sequence[BlockPlan]) -> None:
    """Insert the substitutions of these blocks into a dense graph, in place."""
    by_name = {entry.block.name: entry for entry in entries}
    blocks = [entry.block for entry in entries]

    def substitution(block: Block, index: int) -> nn.Module:
        source = block.sources[index]
        routing = block.routing(source)
        if routing is None:
            return Substitute(by_name[block.name], index)
        return SubstituteExperts(by_name[block.name], source.axis, routing)

    insert_at_sources(graph_module, blocks, substitution, "substitute", divided_by(blocks))


def in_dense_shape(correction: Correction, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return dW (out, in, ...) and db (out,) of a correction in the dense layer's shapes, with zeros at removed channels."""
    layer = correction.layer
    narrow = outputs_first(correction.weight, layer)
    rows, columns = (
        removed_along(plan.blocks, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis)
    )
    own = narrow.shape[1] + len(columns) // layer.groups
    weight = narrow.new_zeros(narrow.shape[0] + len(rows), own, *narrow.shape[2:])
    bias = correction.bias.new_zeros(len(weight))
    kept = _others(rows, len(weight))
    bias[kept] = correction.bias
    for group, (part, outputs) in enumerate(zip(narrow.chunk(layer.groups), kept.chunk(layer.groups), strict=True)):
        weight[outputs[:, None], _others_in(group, columns, own)] = part
    return weight, bias


def in_narrow_shape(calls: Sequence[Consumer], weight: Tensor, bias: Tensor, plan: Plan) -> Correction:
    """Return the correction of a narrowed layer, from dW (out, in, ...) and db (out,) in the dense layer's shapes.

    Rows that make a constant channel are not corrected.

    Args:
        calls: all calls of the layer.
        weight, bias: dW and db.
    """
    layer, *further = calls
    rows, columns = (
        removed_along(plan.blocks, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis)
    )
    kept = _others(rows, weight.shape[0])
    weight, bias = weight.clone(), bias.clone()
    constant = pruned_along(plan.blocks, layer.weight, 1 - layer.weight_axis)
    weight[constant], bias[constant] = 0.0, 0.0
    parts = enumerate(weight[kept].chunk(layer.groups))
    narrow = torch.cat([part[:, _others_in(group, columns, weight.shape[1])] for group, part in parts]).float()
    return Correction(layer, outputs_first(narrow, layer).contiguous(), bias[kept].float(), tuple(further))


def outputs_first(weight: Tensor, layer: Consumer) -> Tensor:
    """Return a layer's weight as (out, in, ...); the same function takes it back to the layer's own shape."""
    return weight.transpose(0, 1) if layer.weight_axis == 0 else weight


def removed_along(entries: Iterable[BlockPlan], name: str, axis: int) -> list[int]:
    """Return the indices that the narrowed network lacks on one axis of a parameter, ascending."""
    return _along(entries, name, axis, lambda entry: entry.gone)


def pruned_along(entries: Iterable[BlockPlan], name: str, axis: int) -> list[int]:
    """Return the indices on one axis of a parameter that do not belong to a kept neuron, ascending."""
    return _along(entries, name, axis, lambda entry: entry.pruned)


def _along(
    entries: Iterable[BlockPlan], name: str, axis: int, chosen: Callable[[BlockPlan], Sequence[int]]
) -> list[int]:
    return sorted(
        {
            int(position)
            for entry in entries
            for parameter in entry.block.parameters
            if (parameter.name, parameter.axis) == (name, axis)
            for position in parameter.at(chosen(entry))
        }
    )


def _others_in(group: int, positions: list[int], size: int) -> Tensor:
    """Return the columns that are left of one group of rows, each of which reads ``size`` channels of its own."""
    return _others([p - group * size for p in positions if p // size == group], size)


def _others(positions: list[int], size: int) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[positions] = False
    return kept.nonzero().flatten()
