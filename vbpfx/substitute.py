"""The substitution reference: the dense graph that computes what a plan says, with nothing narrowed.

At every consumer's input the removed channels h_P are replaced by a + B h_K; behind every layer that the plan corrects,
dW x + db is added to what it computes. No weight is sliced and no bias folded, so nothing is shared with the rewrite that
is held against it. The shapes are those of the dense network: a plan can be carried out on it piece by piece.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from vbpfx.capture import Captured, share_parameters
from vbpfx.edit import insert_at_sources, insert_behind
from vbpfx.records import Block, BlockPlan, Consumer, Correction, Plan, Source


class Substitute(nn.Module):
    """h_P replaced by a + B h_K at a source, out of place; the identity until :meth:`set` says what goes."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.entry: BlockPlan | None = None

    def set(self, entry: BlockPlan) -> None:
        """Replace what a plan removes of the block."""
        self.entry = entry
        self.pruned = torch.tensor(entry.pruned) + self.source.start
        self.kept = torch.tensor(entry.kept) + self.source.start
        index = entry.block.sources.index(self.source)
        self.constants, self.prediction = entry.constants[index], entry.predictions[index]

    def forward(self, h: Tensor) -> Tensor:
        """A copy of h with the channels P replaced."""
        if self.entry is None:
            return h
        axis, pruned = self.source.axis, self.pruned.to(h.device)
        rows = self.constants.to(h)
        if self.prediction is not None:
            kept = h.index_select(axis, self.kept.to(h.device)).movedim(axis, -1)
            rows = nn.functional.linear(kept, self.prediction.to(h), rows)
            return h.index_copy(axis, pruned, rows.movedim(-1, axis))
        shape = [1] * h.ndim
        shape[axis] = -1
        sizes = [len(pruned) if dim == axis % h.ndim else size for dim, size in enumerate(h.shape)]
        return h.index_copy(axis, pruned, rows.reshape(shape).expand(sizes))


class Correct(nn.Module):
    """dW x + db added to what a layer computes of x; the identity until :meth:`set` says what is added."""

    def __init__(self, layer: Consumer) -> None:
        super().__init__()
        self.axis, self.weight_axis = layer.source.axis, layer.weight_axis
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Add dW (out, in) and db (out,), both in the shapes of the dense layer."""
        self.weight, self.bias = weight, bias

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + dW x + db."""
        if self.weight is None or self.bias is None:
            return y
        added = nn.functional.linear(x.movedim(self.axis, -1), self.weight.to(y), self.bias.to(y))
        return y + added.movedim(-1, self.axis)


def reference_graph(captured: Captured, plan: Plan) -> fx.GraphModule:
    """The dense graph that computes what the plan says; it shares all parameters."""
    layers = [correction.layer for correction in plan.corrections]
    reference, substitutes, corrects = prepared_reference(captured, [e.block for e in plan.blocks], layers)
    for entry in plan.blocks:
        for substitute in substitutes[entry.block.name]:
            substitute.set(entry)
    for correction, correct in zip(plan.corrections, corrects, strict=True):
        correct.set(*in_dense_shape(correction, plan))
    return reference


def prepared_reference(
    captured: Captured, blocks: list[Block], layers: list[Consumer]
) -> tuple[fx.GraphModule, dict[str, list[Substitute]], list[Correct]]:
    """The dense graph with a place for everything that a plan may do to the blocks and layers; nothing is set yet."""
    reference = share_parameters(captured.graph_module)
    inserted = insert_behind(reference, layers, Correct, "correct")
    substitutes: dict[str, list[Substitute]] = {block.name: [] for block in blocks}

    def make(block: Block, index: int) -> nn.Module:
        substitutes[block.name].append(Substitute(block.sources[index]))
        return substitutes[block.name][-1]

    insert_at_sources(reference, blocks, make, "substitute")
    return reference, substitutes, [module for module in inserted if isinstance(module, Correct)]


def in_dense_shape(correction: Correction, plan: Plan) -> tuple[Tensor, Tensor]:
    """dW (out, in) and db (out,) of a layer, zero at what is removed, in the shapes of the dense layer."""
    layer = correction.layer
    narrow = correction.weight.flatten(2).squeeze(-1) if correction.weight.ndim > 2 else correction.weight
    narrow = narrow.T if layer.weight_axis == 0 else narrow
    rows, columns = (_removed(plan, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis))
    weight = narrow.new_zeros(narrow.shape[0] + len(rows), narrow.shape[1] + len(columns))
    bias = correction.bias.new_zeros(len(weight))
    kept_rows, kept_columns = _others(rows, weight.shape[0]), _others(columns, weight.shape[1])
    weight[kept_rows[:, None], kept_columns] = narrow
    bias[kept_rows] = correction.bias
    return weight, bias


def in_narrow_shape(layer: Consumer, weight: Tensor, bias: Tensor, like: Tensor, plan: Plan) -> Correction:
    """The correction of a layer, from dW (out, in) and db (out,) in the shapes of the dense layer.

    Args:
        like: the dense weight, for its layout.
    """
    rows, columns = (_removed(plan, layer.weight, axis) for axis in (1 - layer.weight_axis, layer.weight_axis))
    kept = _others(rows, weight.shape[0])
    narrow = weight[kept][:, _others(columns, weight.shape[1])].float()
    narrow = narrow.T if layer.weight_axis == 0 else narrow
    return Correction(layer, narrow.reshape(*narrow.shape, *like.shape[2:]).contiguous(), bias[kept].float())


def _removed(plan: Plan, name: str, axis: int) -> list[int]:
    return sorted(
        {
            parameter.start + p
            for entry in plan.blocks
            for parameter in entry.block.parameters
            if (parameter.name, parameter.axis) == (name, axis)
            for p in entry.pruned
        }
    )


def _others(positions: list[int], size: int) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[positions] = False
    return kept.nonzero().flatten()
