"""Verify: the substitution oracle.

The *reference* is the dense graph in which, at every consumer's input, the removed channels h_P are
replaced by the plan's constants a. The pruned network must equal it to rounding. This needs no trained
weights, holds for every architecture, and shares no code with the rewrite: no weight is sliced and no
bias is folded in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from vbpfx.capture import Captured, share_parameters
from vbpfx.edit import insert_at_sources
from vbpfx.errors import VerificationError, first_line
from vbpfx.inputs import Inputs, as_inputs, model_device
from vbpfx.records import Block, Plan, Source

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
    """

    error: float
    effect: float
    capture: float
    tolerance: float
    dtype: str


class Substitute(nn.Module):
    """h_P replaced by constants at a source, out of place."""

    def __init__(self, source: Source, pruned: tuple[int, ...], constants: Tensor) -> None:
        super().__init__()
        self.axis, self.pruned, self.constants = source.axis, torch.tensor(pruned) + source.start, constants

    def forward(self, h: Tensor) -> Tensor:
        """A copy of h with the channels P replaced."""
        shape = [1] * h.ndim
        shape[self.axis] = -1
        values = self.constants.to(h).reshape(shape)
        index = self.pruned.to(h.device)
        sizes = [len(self.pruned) if dim == self.axis % h.ndim else size for dim, size in enumerate(h.shape)]
        return h.index_copy(self.axis, index, values.expand(sizes))


def reference_graph(captured: Captured, plan: Plan) -> fx.GraphModule:
    """The dense graph with the plan's constants substituted at every consumer's input; shares all parameters."""
    reference = share_parameters(captured.graph_module)
    entries = {entry.block.name: entry for entry in plan.blocks}

    def make(block: Block, index: int) -> nn.Module:
        entry = entries[block.name]
        return Substitute(block.sources[index], entry.pruned, entry.constants[index])

    insert_at_sources(reference, [entry.block for entry in plan.blocks], make, "substitute")
    return reference


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
        small: the pruned GraphModule, or the model in its own class.
        example_inputs: one batch; by default what the model was captured with.
        tolerance: by default what the model's precision allows: 1e-4 in float32, 1e-9 in float64.

    Raises:
        VerificationError: a network does not run on the inputs, or the outputs differ in structure, are not
            finite, or differ by more than the tolerance.
    """
    device = model_device(captured.reference)
    inputs = captured.inputs if example_inputs is None else as_inputs(example_inputs, captured.reference).to(device)
    if not inputs.batch_size:
        raise VerificationError("the example inputs hold no sample: nothing can be compared")
    try:
        dense, model = _run(captured.graph_module, inputs), _run(captured.reference, inputs)
    except Exception as failure:  # the model's own operators raise whatever they raise
        raise VerificationError(
            f"the dense network does not run on these inputs ({inputs.describe()}): {failure}"
        ) from failure
    substituted = _run(reference_graph(captured, plan), inputs)
    try:
        pruned = _run(small, inputs)
    except Exception as failure:  # likewise
        raise VerificationError(
            f"the pruned network does not run: {first_line(failure)}; where it is the model's own class, its code states a hidden "
            f"width: use the GraphModule"
        ) from failure
    dtype = next((t.dtype for t in dense if t.is_floating_point()), torch.float32)
    bound = TOLERANCES.get(dtype, 1e-4) if tolerance is None else tolerance
    if [t.shape for t in pruned] != [t.shape for t in substituted]:
        raise VerificationError(
            f"the pruned network returns shapes {[tuple(t.shape) for t in pruned]}, the dense one "
            f"{[tuple(t.shape) for t in substituted]}"
        )
    fidelity = relative_error(dense, model)
    if not fidelity <= bound:
        raise VerificationError(
            f"the captured graph differs from the model by {fidelity:.2e} of the output's size: the model decides "
            f"something in Python that tracing fixed; try frontend='export', or make the decision part of the input"
        )
    error = relative_error(pruned, substituted)
    if not error <= bound:
        raise VerificationError(
            f"the pruned network differs from the substitution reference by {error:.2e} of the output's size, above "
            f"{bound:.0e}; the rewrite is wrong for one of the blocks {[e.block.name for e in plan.blocks][:8]}: please "
            f"report the model, and leave blocks out with exclude= to find which"
        )
    return Verification(error, relative_error(substituted, dense), fidelity, bound, str(dtype).removeprefix("torch."))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """max over the tensors of max|found - expected| / max|expected|, in float64.

    Equal entries differ by nothing even where they are infinite (masked logits); any other NaN or
    infinity makes the result infinite.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        difference = torch.where(a == b, 0.0, (a - b).abs()).max()
        scale = torch.where(b.isfinite(), b.abs(), 0.0).max().clamp_min(1e-300)
        worst = max(worst, (difference / scale).nan_to_num(torch.inf, torch.inf).item())
    return worst


def _run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        own = inputs.map(torch.clone)  # a model may write into its input
        with torch.no_grad():
            # not network(...): fx's own wrapper prints the generated code when a batch does not fit
            output = nn.Module.__call__(network, *own.args, **own.kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
