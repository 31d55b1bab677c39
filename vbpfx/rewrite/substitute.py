"""The substitution reference: the dense graph that computes what a plan says, with nothing narrowed.

At every consumer's input the removed channels h_P are replaced by a + B h_K; behind every layer that the plan corrects,
dW x + db is added to what it computes. No weight is sliced and no bias folded, so nothing is shared with the rewrite that
is held against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import insert_at_sources, insert_behind
from vbpfx.plans.records import BlockPlan, Consumer, Correction, Plan


class Substitute(nn.Module):
    """h_P replaced by a + B h_K at one of a block's sources, out of place."""

    def __init__(self, entry: BlockPlan, index: int) -> None:
        super().__init__()
        source = entry.block.sources[index]
        self.axis = source.axis
        self.pruned, self.kept = source.at(entry.pruned), source.at(entry.kept)
        self.constants, self.prediction = entry.constants[index], entry.predictions[index]

    def forward(self, h: Tensor) -> Tensor:
        """A copy of h with the channels P replaced."""
        pruned, values = self.pruned.to(h.device), self.constants.to(h)
        if self.prediction is not None:
            kept = h.index_select(self.axis, self.kept.to(h.device)).movedim(self.axis, -1)
            values = nn.functional.linear(kept, self.prediction.to(h), values).movedim(-1, self.axis)
            return h.index_copy(self.axis, pruned, values)
        shape = [1] * h.ndim
        shape[self.axis] = -1
        sizes = [len(pruned) if dim == self.axis % h.ndim else size for dim, size in enumerate(h.shape)]
        return h.index_copy(self.axis, pruned, values.reshape(shape).expand(sizes))


class Correct(nn.Module):
    """dW x + db added to what a layer computes of x; dW (out, in) and db (out,) in the shapes of the dense layer."""

    def __init__(self, layer: Consumer, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.axis, self.weight, self.bias = layer.source.axis, weight, bias

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + dW x + db."""
        added = nn.functional.linear(x.movedim(self.axis, -1), self.weight.to(y), self.bias.to(y))
        return y + added.movedim(-1, self.axis)


def reference_graph(captured: Captured, plan: Plan) -> fx.GraphModule:
    """The dense graph that computes what the plan says; it shares all parameters."""
    reference = share_parameters(captured.graph_module)
    corrections = {call: correction for correction in plan.corrections for call in correction.calls}
    substitute(reference, plan.blocks)
    insert_behind(
        reference,
        corrections,
        lambda call: Correct(call, *in_dense_shape(corrections[call], plan)),
        "correct",
    )
    return reference


def substitute(graph_module: fx.GraphModule, entries: Sequence[BlockPlan]) -> None:
    """Carry out substitutions on a dense graph, in place."""
    by_name = {entry.block.name: entry for entry in entries}
    insert_at_sources(
        graph_module,
        [entry.block for entry in entries],
        lambda block, index: Substitute(by_name[block.name], index),
        "substitute",
    )


def in_dense_shape(correction: Correction, plan: Plan) -> tuple[Tensor, Tensor]:
    """dW (out, in) and db (out,) of a layer, zero at what is removed, in the shapes of the dense layer."""
    layer = correction.layer
    narrow = correction.weight.reshape(correction.weight.shape[:2])
    narrow = narrow.T if layer.weight_axis == 0 else narrow
    rows, columns = (
        removed_along(plan.blocks, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis)
    )
    weight = narrow.new_zeros(narrow.shape[0] + len(rows), narrow.shape[1] + len(columns))
    bias = correction.bias.new_zeros(len(weight))
    kept_rows, kept_columns = _others(rows, weight.shape[0]), _others(columns, weight.shape[1])
    weight[kept_rows[:, None], kept_columns] = narrow
    bias[kept_rows] = correction.bias
    return weight, bias


def in_narrow_shape(calls: Sequence[Consumer], weight: Tensor, bias: Tensor, like: Tensor, plan: Plan) -> Correction:
    """The correction of a layer, from dW (out, in) and db (out,) in the shapes of the dense layer.

    Args:
        calls: all calls of the layer.
        like: the dense weight, for its layout.
    """
    layer, *further = calls
    rows, columns = (
        removed_along(plan.blocks, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis)
    )
    kept = _others(rows, weight.shape[0])
    narrow = weight[kept][:, _others(columns, weight.shape[1])].float()
    narrow = narrow.T if layer.weight_axis == 0 else narrow
    own = narrow.reshape(*narrow.shape, *like.shape[2:]).contiguous()
    return Correction(layer, own, bias[kept].float(), tuple(further))


def as_matrix(weight: Tensor, layer: Consumer) -> Tensor:
    """A layer's weight as (out, in), float64, on the CPU."""
    matrix = weight.detach().double().cpu().reshape(weight.shape[:2])
    return matrix.T if layer.weight_axis == 0 else matrix


def removed_along(entries: Iterable[BlockPlan], name: str, axis: int) -> list[int]:
    """The indices of one axis of a parameter that are gone, ascending."""
    return sorted(
        {
            int(position)
            for entry in entries
            for parameter in entry.block.parameters
            if (parameter.name, parameter.axis) == (name, axis)
            for position in parameter.at(entry.pruned)
        }
    )


def _others(positions: list[int], size: int) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[positions] = False
    return kept.nonzero().flatten()
