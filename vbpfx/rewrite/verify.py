"""Verify a pruned network against the substitution oracle.

The *reference* (:mod:`vbpfx.rewrite.substitute`) is the dense graph in which the removed channels h_P are replaced by
the plan's a + B h_K at every consumer's input. The pruned network must equal it up to rounding. This needs no trained
weights, holds for every architecture, and shares no code with the rewrite, since the reference slices no weight and
folds no bias. Layers that the plan corrects compute W x + b + (dW x + db) in the reference. A second check compares
every corrected weight of the pruned network with the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.data.inputs import Inputs, as_inputs, model_device
from vbpfx.errors import VerificationError
from vbpfx.graph.capture import Captured, explain, named_tensors, share_parameters
from vbpfx.graph.frontends import unfused_attention
from vbpfx.graph.precision import full_float32
from vbpfx.graph.run import outputs_of
from vbpfx.outputs.differences import TOLERANCES, relative_error, require_close, tolerance_of
from vbpfx.plans.records import Consumer, Plan
from vbpfx.rewrite.basis import Coordinates
from vbpfx.rewrite.in_float64 import measure_loss, require_exact
from vbpfx.rewrite.side_by_side import Comparison, Seen, can_compare, look
from vbpfx.rewrite.substitute import in_dense_shape, outputs_first, reference_graph

# How much a rewrite that is right in float64 may differ from the reference, in multiples of the dense network's own
# rounding error. The pruned network and the reference each have such an error, with sums over fewer and larger terms.
LOSSES = 4.0


@dataclass(frozen=True)
class Verification:
    """The result of comparing a pruned network with the substitution reference.

    Attributes:
        error: the largest |pruned - reference| over the outputs, relative to the largest |reference|.
        effect: the same between the dense network and the reference, that is, how much the substitution changes at all.
            If it is not above ``error``, as with zero-initialised branches, the comparison of the outputs proves
            nothing.
        capture: the same between the captured dense graph and the model itself in eval mode.
        tolerance: the bound that ``error`` and ``capture`` had to meet.
        dtype: the precision in which both networks ran.
        refits: the largest relative difference between a corrected weight and the one that follows from the plan.
        behind: the largest |pruned - reference| behind the layers that read a block, relative to the largest
            |reference| there. None if that was not compared, because the network is not a graph with the dense
            graph's nodes.
        unproven: names of the blocks for which the comparison proves nothing: setting them to zero would change neither
            the values behind their layers nor, if these were not compared, the output.
        exact: the larger of ``error`` and ``behind`` with all values and weights in float64. None if this was not
            needed, because rounding alone explained the difference.
    """

    error: float
    effect: float
    capture: float
    tolerance: float
    dtype: str
    refits: float = 0.0
    behind: float | None = None
    unproven: tuple[str, ...] = ()
    exact: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unproven", tuple(self.unproven))  # JSON holds a list

    @property
    def hidden(self) -> bool:
        """Whether the output proves nothing, because the substitution changes it by no more than the error."""
        return self.effect <= self.error

    @property
    def proven(self) -> bool:
        """Whether the comparison proves something for every narrowed block."""
        return not self.unproven

    def in_words(self) -> str:
        """Return a line about what was not proven, or not proven at the output; "" if the output proves everything."""
        parts = []
        if self.hidden and self.behind is not None and not self.unproven:
            parts.append(
                f"not proven at the output, which the substitution does not change; proven behind the layers that read the blocks: error {self.behind:.1e}"
            )
        if self.unproven:
            names = ", ".join(self.unproven[:4]) + (", ..." if len(self.unproven) > 4 else "")
            parts.append(
                f"NOT PROVEN for {names}: setting the block to zero would not change anything that was compared"
            )
        if self.exact is not None:
            parts.append(f"the same in float64, where nothing is rounded: error {self.exact:.1e}")
        return "; ".join(parts)


def verify(
    captured: Captured,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
) -> Verification:
    """Compare a pruned network with the substitution reference, both in eval mode on the same inputs.

    Args:
        captured: the dense graph.
        small: the pruned GraphModule, or the pruned model in its own class.
        plan: the plan by which ``small`` was narrowed.
        example_inputs: one batch. By default the batch that the model was captured with, with one more sample if the
            graph accepts any number of samples.
        tolerance: the largest relative error. By default it depends on the model's precision: 1e-4 in float32, 1e-9 in
            float64.

    Raises:
        VerificationError: a network does not run on the inputs, or the outputs differ in structure, are not
            finite, or differ by more than the tolerance.
    """
    device = model_device(captured.reference)
    inputs = captured.inputs
    if example_inputs is None and captured.batch is not None and inputs.batch_size:
        inputs = inputs.resized(inputs.batch_size + 1)  # another number of samples than was traced
    if example_inputs is not None:
        inputs = as_inputs(example_inputs, captured.reference).to(device).along(captured.inputs)
    if inputs.is_empty:
        raise VerificationError("the example inputs hold no sample: nothing can be compared")
    try:
        model = _run(captured.reference, inputs)
    except Exception as failure:  # the model may raise any exception
        raise VerificationError(
            f"the dense network does not run on these inputs ({inputs.describe()}): {failure}"
        ) from failure
    try:
        dense = _run(captured.graph_module, inputs)
    except Exception as failure:  # the graph may raise any exception
        raise VerificationError(
            f"the captured graph does not run on inputs ({inputs.describe()}) that the model takes: {failure}. {_OTHER_SIZE}"
        ) from failure
    if (shapes := _shapes(dense)) != _shapes(model):
        raise VerificationError(
            f"on inputs ({inputs.describe()}) the captured graph returns shapes {shapes}, the model {_shapes(model)}. {_OTHER_SIZE}"
        )
    try:
        seen = _compared(captured, small, plan, inputs)
    except Exception as failure:  # the pruned network may raise any exception
        why = explain(failure, small)
        if not isinstance(small, fx.GraphModule):
            why += "\n  its code states a hidden width there: use the GraphModule (pruned.graph_module)"
        raise VerificationError(f"the pruned network does not run: {why}") from failure
    precision = _precision(captured.reference, dense)
    allowed = tolerance_of([precision])
    bound = allowed if tolerance is None else tolerance
    outputs = Outputs(dense, model, seen.expected, seen.found)
    exact: Seen | None = None
    try:
        found = judge(outputs, plan, tolerance=bound)
        doubtful = (seen.behind or 0.0) > max(bound, allowed) or precision in (torch.bfloat16, torch.float16)
        # The second case is a model in its own class: only its outputs were compared, and these prove nothing.
        if doubtful or (found.unproven and seen.errors is None):
            exact = require_exact(captured, small, plan, inputs)
    except (_ImpreciseError, _UnlikeModelError) as large:
        lost = measure_loss(captured, inputs, dense, precision) if tolerance is None else None
        rounding = LOSSES * (lost or 0.0)
        unlike = isinstance(large, _UnlikeModelError)
        if unlike and (
            not large.difference <= rounding or relative_error(_run(captured.reference, inputs), model) != 0.0
        ):
            raise _UnlikeModelError(large.difference, _why_unlike(captured, inputs, dense, model)) from large
        exact = require_exact(captured, small, plan, inputs)
        if exact is None or lost is None:
            raise
        if not large.difference <= rounding:
            raise VerificationError(
                f"the rewrite is right (in float64 it differs from the reference by {exact.largest:.1e}), but in {_name(precision)} the "
                f"pruned network differs by {large.difference:.1e} of the output's size, where the dense network's own rounding is "
                f"{lost:.1e}: values are too large for that precision; scale the inputs (standardise columns), or prune in float64"
            ) from large
        found = judge(outputs, plan, tolerance=rounding)
    looked = seen if seen.errors is not None or exact is None else exact
    found = replace(
        found,
        behind=looked.behind,
        unproven=found.unproven if looked.errors is None else looked.unproven,
        exact=None if exact is None else exact.largest,
        dtype=_name(precision),
    )
    refits = _refit_error(captured, small, plan)
    if not refits <= found.tolerance:
        raise VerificationError(
            f"a corrected weight of the pruned network differs by {refits:.2e} from the weight that follows from the plan; the rewrite is "
            f"wrong: please report the model"
        )
    return replace(found, refits=refits)


def _compared(captured: Captured, small: nn.Module, plan: Plan, inputs: Inputs) -> Seen:
    """Compare the outputs and, if the pruned network is a graph of the same nodes, the values behind the consumers."""
    if can_compare(small, plan):
        with torch.no_grad(), full_float32():
            return look(Comparison(captured, small, plan, inputs))
    return Seen(_run(reference_graph(captured, plan), inputs), _run(share_parameters(small), inputs))


@dataclass(frozen=True)
class Outputs:
    """The outputs of four networks for the same inputs.

    Attributes:
        dense: outputs of the captured graph.
        model: outputs of the model itself.
        substituted: outputs of the reference.
        pruned: outputs of the pruned network.
    """

    dense: list[Tensor]
    model: list[Tensor]
    substituted: list[Tensor]
    pruned: list[Tensor]


def judge(outputs: Outputs, plan: Plan, *, tolerance: float | None = None) -> Verification:
    """Check that the outputs agree within the tolerance.

    Raises:
        VerificationError: as for :func:`verify`.
    """
    dense, pruned, substituted = outputs.dense, outputs.pruned, outputs.substituted
    dtype = next((t.dtype for t in dense if t.is_floating_point()), torch.float32)
    bound = tolerance_of([dtype]) if tolerance is None else tolerance
    if not dense:
        raise VerificationError(
            "the output holds no tensor in a tuple, list, dict or dataclass, so nothing can be compared; return tensors in one of "
            "these, or pass verify=False"
        )
    if len(outputs.model) != len(dense):
        raise VerificationError(
            f"the captured graph returns {len(dense)} tensors, the model {len(outputs.model)}: please report the model"
        )
    if _shapes(pruned) != _shapes(substituted):
        raise VerificationError(
            f"the pruned network returns shapes {_shapes(pruned)}, the dense one {_shapes(substituted)}"
        )
    if any(bool(t.isnan().any()) for t in outputs.model):
        raise VerificationError(
            "the model itself returns NaN on these inputs, so nothing can be compared: a weight or an input is not finite, or a "
            "value overflows; correct the weight or the input, or run the model in a wider dtype"
        )
    names = [entry.block.name for entry in plan.blocks]
    fidelity = require_close(dense, outputs.model, bound, lambda error: _UnlikeModelError(error, _DECIDES))
    error = require_close(pruned, substituted, bound, lambda error: _ImpreciseError(error, bound, names))
    effect = relative_error(substituted, dense)
    unseen = tuple(names) if effect <= error else ()
    return Verification(error, effect, fidelity, bound, _name(dtype), unproven=unseen)


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


_OTHER_SIZE = (
    "The graph is for the number of samples and the sizes that it was captured with: sizes that the model's code computes, or a loop "
    "over an axis of its input, are fixed in it. Capture and verify at one size, or let the code compute with tensors alone"
)

_DECIDES = (
    "the model decides something in Python that tracing fixed; try frontend='export' (--frontend export), or make the decision "
    "part of the input"
)


class _ImpreciseError(VerificationError):
    """The pruned network differs from the reference, by ``difference`` relative to the output's size."""

    def __init__(self, difference: float, bound: float, blocks: list[str]) -> None:
        super().__init__(
            f"the pruned network differs from the substitution reference by {difference:.2e} of the output's size, above "
            f"{bound:.0e}; the rewrite is wrong for one of the blocks {blocks[:8]}: please "
            f"report the model, and leave blocks out with exclude= to find which"
        )
        self.difference = difference


class _UnlikeModelError(VerificationError):
    """The captured graph differs from the model, by ``difference`` relative to the output's size."""

    def __init__(self, difference: float, why: str) -> None:
        super().__init__(f"the captured graph differs from the model by {difference:.2e} of the output's size: {why}")
        self.difference = difference


def _why_unlike(captured: Captured, inputs: Inputs, dense: list[Tensor], model: list[Tensor]) -> str:
    """Return why the captured graph differs from the model, and what to do about it."""
    again = _run(captured.reference, inputs)
    if relative_error(again, model) != 0.0:
        return (
            "two runs of the model differ, too: it is random in eval mode (dropout with training=True, noise); make "
            "that depend on self.training"
        )
    with unfused_attention():
        plain = _run(captured.reference, inputs)
    if relative_error(dense, plain) < relative_error(dense, model):
        return (
            "nn.TransformerEncoder's fast path gives zeros at padded positions, which this model uses; make it with "
            "enable_nested_tensor=False, and leave padding out of means over tokens"
        )
    return _DECIDES


def _refit_error(captured: Captured, small: nn.Module, plan: Plan) -> float:
    """Return the largest relative error of corrected weights, which must be W + dW plus folds, on the channels that are there."""
    dense, narrow = named_tensors(captured.reference), named_tensors(small)
    worst, coordinates = 0.0, Coordinates(plan)
    for correction in plan.corrections:
        layer = correction.layer
        original = _wide(coordinates.of(layer.weight, dense[layer.weight]), layer)
        found = _wide(narrow[layer.weight], layer)
        change, _ = in_dense_shape(correction, plan)
        expected = _expected(original, change.double().cpu(), layer, plan)
        rows = torch.ones(len(expected), dtype=torch.bool)
        columns, present = torch.ones(expected.shape[1] * layer.groups, dtype=torch.bool), rows.clone()
        for entry in plan.blocks:
            for parameter in entry.block.parameters:
                if parameter.name == layer.weight and parameter.axis == layer.weight_axis:
                    columns[parameter.at(entry.gone)] = False
                elif parameter.name == layer.weight:
                    rows[parameter.at(entry.pruned)] = False
                    present[parameter.at(entry.gone)] = False
        parts = zip(expected.chunk(layer.groups), rows.chunk(layer.groups), columns.chunk(layer.groups), strict=True)
        wanted = torch.cat([part[own_rows][:, own_columns] for part, own_rows, own_columns in parts])
        worst = max(worst, relative_error([found[rows[present]]], [wanted]))  # without rows of constant channels
    return worst


def _expected(original: Tensor, change: Tensor, layer: Consumer, plan: Plan) -> Tensor:
    """Return W + dW plus folds (out, in / groups, ...) of a corrected layer, with the columns of constant channels."""
    expected = original + change
    size = original.shape[1]
    for entry in plan.blocks:
        once = {(c.weight, c.source.start): c for c in entry.block.consumers}  # a layer's calls share one fold
        for consumer in once.values():
            if consumer.weight != layer.weight:
                continue
            source, prediction = consumer.source, entry.prediction_at(consumer.source)
            pruned, kept, held = (source.at(channels) for channels in (entry.pruned, entry.kept, entry.constants_in))
            constants = entry.constants_at(source).double()
            groups = (tensor.chunk(layer.groups) for tensor in (original, change, expected))
            for group, (old, added, new) in enumerate(zip(*groups, strict=True)):
                goes, stays, here = (positions // size == group for positions in (pruned, kept, held))
                removed = old[:, pruned[goes] % size]
                if prediction is not None:
                    new[:, kept[stays] % size] += torch.einsum(
                        "op...,pk->ok...", removed, prediction.double()[goes][:, stays]
                    )
                column = torch.einsum("op...,p->o...", removed, constants[goes])
                for number, place in enumerate((held[here] % size).tolist()):
                    takes = consumer.padded and number == 0  # the first constant channel holds the constants
                    new[:, place] = added[:, place] + (column / entry.value_at(source) if takes else 0.0)
    return expected


def _wide(weight: Tensor, layer: Consumer) -> Tensor:
    """Return a layer's weight (out, in, ...) in float64, on the CPU."""
    return outputs_first(weight.detach().double().cpu(), layer)


def _precision(reference: nn.Module, dense: list[Tensor]) -> torch.dtype:
    """Return the coarsest dtype in which the dense network computes, of those that have a tolerance."""
    found = {tensor.dtype for tensor in (*reference.parameters(), *dense)} & set(TOLERANCES)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        return outputs_of(network, inputs)
    finally:
        for module, training in modes.items():
            module.training = training
