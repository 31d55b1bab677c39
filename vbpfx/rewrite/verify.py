"""Verify: the substitution oracle.

The *reference* (:mod:`vbpfx.rewrite.substitute`) is the dense graph in which, at every consumer's input, the removed channels h_P
are replaced by the plan's a + B h_K. The pruned network must equal it to rounding. This needs no trained
weights, holds for every architecture, and shares no code with the rewrite: no weight is sliced and no
bias is folded in the reference. Layers that the plan corrects compute W x + b + (dW x + db) there; a second check holds
every such weight of the pruned network against what the plan says of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, as_inputs, model_device, tensors_in
from vbpfx.errors import VerificationError, first_line
from vbpfx.graph.capture import Captured, named_tensors, share_parameters
from vbpfx.graph.frontends import unfused_attention
from vbpfx.graph.precision import full_float32
from vbpfx.records import Plan
from vbpfx.rewrite.substitute import as_matrix, in_dense_shape, reference_graph

# Largest relative error of the output that rounding alone makes, by the precision the model computes in.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verification:
    """What the substitution oracle measured.

    Attributes:
        error: largest |pruned - reference| over the outputs, relative to the largest |reference|.
        effect: the same between the dense network and the reference: how much the substitution does at
            all. Where it is below ``error`` the comparison says nothing (zero-initialised branches).
        capture: the same between the captured dense graph and the model itself in eval mode.
        tolerance: the bound that ``error`` and ``capture`` were held to.
        dtype: the precision that both ran in.
        refits: largest relative difference between a corrected weight or bias and what the plan says of it.
    """

    error: float
    effect: float
    capture: float
    tolerance: float
    dtype: str
    refits: float = 0.0


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
        small: the pruned GraphModule, or the model in its own class.
        plan: what it was narrowed by.
        example_inputs: one batch; by default what the model was captured with.
        tolerance: by default what the model's precision allows: 1e-4 in float32, 1e-9 in float64.

    Raises:
        VerificationError: a network does not run on the inputs, or the outputs differ in structure, are not
            finite, or differ by more than the tolerance.
    """
    device = model_device(captured.reference)
    inputs = captured.inputs
    if example_inputs is not None:
        inputs = as_inputs(example_inputs, captured.reference).to(device).along(captured.inputs)
    if inputs.is_empty:
        raise VerificationError("the example inputs hold no sample: nothing can be compared")
    try:
        dense, model = _run(captured.graph_module, inputs), _run(captured.reference, inputs)
    except Exception as failure:  # the model's own operators raise whatever they raise
        raise VerificationError(
            f"the dense network does not run on these inputs ({inputs.describe()}): {failure}"
        ) from failure
    substituted = _run(reference_graph(captured, plan), inputs)
    try:
        pruned = _run(share_parameters(small), inputs)
    except Exception as failure:  # likewise
        raise VerificationError(
            f"the pruned network does not run: {first_line(failure)}; where it is the model's own class, its code states a hidden "
            f"width: use the GraphModule"
        ) from failure
    try:
        found = judge(Outputs(dense, model, substituted, pruned), plan, tolerance=tolerance)
    except _UnlikeModelError as unlike:
        raise _UnlikeModelError(unlike.difference, _why_unlike(captured, inputs, dense, model)) from unlike
    refits = _refit_error(captured, small, plan)
    if not refits <= found.tolerance:
        raise VerificationError(
            f"a corrected weight of the pruned network differs by {refits:.2e} from what the plan says of it; the rewrite is "
            f"wrong: please report the model"
        )
    return replace(found, refits=refits)


@dataclass(frozen=True)
class Outputs:
    """What four networks compute of the same inputs.

    Attributes:
        dense, model, substituted, pruned: the captured graph, the model itself, the reference, the result.
    """

    dense: list[Tensor]
    model: list[Tensor]
    substituted: list[Tensor]
    pruned: list[Tensor]


def judge(outputs: Outputs, plan: Plan, *, tolerance: float | None = None) -> Verification:
    """Hold outputs to the tolerance.

    Raises:
        VerificationError: as :func:`verify`.
    """
    dense, pruned, substituted = outputs.dense, outputs.pruned, outputs.substituted
    dtype = next((t.dtype for t in dense if t.is_floating_point()), torch.float32)
    bound = TOLERANCES.get(dtype, 1e-4) if tolerance is None else tolerance
    if not dense:
        raise VerificationError(
            "the output holds no tensor in a tuple, list, dict or dataclass, so nothing can be compared; return tensors in one of "
            "these, or pass verify=False"
        )
    if len(outputs.model) != len(dense):
        raise VerificationError(
            f"the captured graph returns {len(dense)} tensors, the model {len(outputs.model)}: please report the model"
        )
    if [t.shape for t in pruned] != [t.shape for t in substituted]:
        raise VerificationError(
            f"the pruned network returns shapes {[tuple(t.shape) for t in pruned]}, the dense one "
            f"{[tuple(t.shape) for t in substituted]}"
        )
    if any(bool(t.isnan().any()) for t in outputs.model):
        raise VerificationError(
            "the model itself returns NaN on these inputs, so nothing can be compared: a weight or an input is not finite, or a "
            "value overflows; mend that, or run it in a wider dtype"
        )
    fidelity = relative_error(dense, outputs.model)
    if not fidelity <= bound:
        raise _UnlikeModelError(fidelity, _DECIDES)
    error = relative_error(pruned, substituted)
    if not error <= bound:
        raise VerificationError(
            f"the pruned network differs from the substitution reference by {error:.2e} of the output's size, above "
            f"{bound:.0e}; the rewrite is wrong for one of the blocks {[e.block.name for e in plan.blocks][:8]}: please "
            f"report the model, and leave blocks out with exclude= to find which"
        )
    effect = relative_error(substituted, dense)
    return Verification(error, effect, fidelity, bound, str(dtype).removeprefix("torch."))


_DECIDES = (
    "the model decides something in Python that tracing fixed; try frontend='export' (--frontend export), or make the decision "
    "part of the input"
)


class _UnlikeModelError(VerificationError):
    """The captured graph does not compute what the model does, by ``difference`` of the output's size."""

    def __init__(self, difference: float, why: str) -> None:
        super().__init__(f"the captured graph differs from the model by {difference:.2e} of the output's size: {why}")
        self.difference = difference


def _why_unlike(captured: Captured, inputs: Inputs, dense: list[Tensor], model: list[Tensor]) -> str:
    """Why the captured graph does not compute what the model does, and what to do."""
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
    """How far corrected weights are from W + dW over the channels that stay, with what the consumers' folds add to W."""
    dense, narrow = named_tensors(captured.reference), named_tensors(small)
    worst = 0.0
    for correction in plan.corrections:
        layer = correction.layer
        whole, _ = in_dense_shape(correction, plan)
        expected = whole.double() + as_matrix(dense[layer.weight], layer)
        found = as_matrix(narrow[layer.weight], layer)
        rows, columns = torch.ones(len(expected), dtype=torch.bool), torch.ones(expected.shape[1], dtype=torch.bool)
        for entry in plan.blocks:
            once = {(c.weight, c.source.start): c for c in entry.block.consumers}  # a layer's calls share one fold
            for consumer in once.values():
                prediction = entry.prediction_at(consumer.source)
                if consumer.weight == layer.weight and prediction is not None:
                    original = as_matrix(dense[layer.weight], layer)[:, consumer.source.at(entry.pruned)]
                    expected[:, consumer.source.at(entry.kept)] += original @ prediction.double()
            for parameter in entry.block.parameters:
                if parameter.name == layer.weight:
                    (columns if parameter.axis == layer.weight_axis else rows)[parameter.at(entry.pruned)] = False
        worst = max(worst, relative_error([found], [expected[rows][:, columns]]))
    return worst


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """max over the tensors of max|found - expected| / max|expected|, in float64, or complex128.

    Equal entries differ by nothing even where they are infinite (masked logits); any other NaN or
    infinity makes the result infinite.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        exact = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.to(exact), b.to(exact)
        difference = torch.where(a == b, 0.0, (a - b).abs()).max()
        scale = torch.where(b.isfinite(), b.abs(), 0.0).max().clamp_min(1e-300)
        worst = max(worst, (difference / scale).nan_to_num(torch.inf, torch.inf).item())
    return worst


def _run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad(), full_float32():
            output = inputs.run(network)
    finally:
        for module, training in modes.items():
            module.training = training
    return tensors_in(output)
