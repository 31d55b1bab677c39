"""Decide whether a difference is due to rounding.

The comparison is repeated in float64, and the rounding error of the dense network itself is measured.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs
from vbpfx.errors import VerificationError
from vbpfx.graph.capture import Captured, named_tensors, share_parameters
from vbpfx.graph.precision import full_float32
from vbpfx.outputs.differences import relative_error, require_close
from vbpfx.plans.records import Plan
from vbpfx.rewrite.class_code import where_widths_are_used
from vbpfx.rewrite.side_by_side import Comparison, Seen, Steps, can_compare, exact_tensors, look

# The relative difference that is allowed in float64. Some roundings to float32 remain there: those that the graph
# states itself, and those in the code of a model's own class.
_LEFT_IN_A_GRAPH, _LEFT_IN_A_CLASS = 1e-6, 1e-4


@full_float32()
@torch.no_grad()
def require_exact(captured: Captured, small: nn.Module, plan: Plan, inputs: Inputs) -> Seen | None:
    """Compare the pruned network with its reference in float64; return None if they do not run in float64.

    Every changed tensor must equal the one that follows from the plan, rounded once. With these tensors unrounded, the
    pruned network must compute what the reference computes.

    Raises:
        VerificationError: one of them does not hold, so the rewrite is wrong. The message names the tensor, or the
            block behind whose layers the difference is first seen.
    """
    exact, narrow = exact_tensors(captured, small, plan), named_tensors(small)
    for name, tensor in narrow.items():
        if id(tensor) in exact:
            how = f"its tensor {name} differs from the one that follows from the plan"
            once = torch.finfo(tensor.dtype).eps
            require_close([tensor], [exact[id(tensor)]()], once, partial(_wrong, how=how, plan=plan))
    allowed = _LEFT_IN_A_GRAPH if can_compare(small, plan) else _LEFT_IN_A_CLASS
    try:
        seen = _seen(captured, small, plan, inputs)
    except Exception:  # an operator does not support float64, or the code states a dtype
        return None
    wrong = next((name for name, error in (seen.errors or {}).items() if not error <= allowed), None)
    error = seen.largest
    if not error <= allowed:
        if not can_compare(small, plan):
            raise _by_its_code(error, small, plan, inputs)
        where = f"first behind the layers of block {wrong}" if wrong else "at its output"
        raise _wrong(error, f"in float64, too, {where}", plan)
    return seen


def _seen(captured: Captured, small: nn.Module, plan: Plan, inputs: Inputs) -> Seen:
    if can_compare(small, plan):
        return look(Comparison(captured, small, plan, inputs, torch.float64))
    wide = copy.deepcopy(share_parameters(small)).double()
    of_small, of_wide = named_tensors(small), named_tensors(wide)
    for identity, exact in exact_tensors(captured, small, plan).items():
        for name, tensor in of_small.items():
            if id(tensor) == identity:
                of_wide[name].data = exact()
    return look(Comparison(captured, wide, plan, inputs.map(_wide), torch.float64))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _wrong(error: float, how: str, plan: Plan) -> VerificationError:
    names = [entry.block.name for entry in plan.blocks][:8]
    return VerificationError(
        f"the pruned network differs from the substitution reference by {error:.2e}, {how}; the rewrite is wrong for one of the "
        f"blocks {names}: please report the model, and leave blocks out with exclude= to find which"
    )


def _by_its_code(error: float, small: nn.Module, plan: Plan, inputs: Inputs) -> VerificationError:
    """Return the error for a class whose tensors are right, but whose code computes something else with them."""
    names = [entry.block.name for entry in plan.blocks]
    used = where_widths_are_used(small, plan, inputs)
    return VerificationError(
        f"the narrowed {type(small).__name__} differs from the substitution reference by {error:.2e}, although every tensor is the one that "
        f"follows from the plan: its code computes with a hidden width of one of the blocks {names[:8]}, which no rewrite of tensors "
        f"can change ({used or 'the line was not found'}). Use the GraphModule (pruned.graph_module), or leave the block out: exclude={names[:8]}"
    )


@full_float32()
@torch.no_grad()
def measure_loss(captured: Captured, inputs: Inputs, dense: list[Tensor], precision: torch.dtype) -> float | None:
    """Return the rounding error of the dense network's output relative to float64; None if it does not run in float64.

    For a network in float64 it is estimated: it is the rounding error of float32 times the ratio of the two machine
    epsilons.
    """
    try:
        wide = Steps(share_parameters(captured.graph_module), inputs, torch.float64).finish()
        if precision == torch.float64:
            narrow = Steps(share_parameters(captured.graph_module), inputs, torch.float32).finish()
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            return relative_error(narrow, wide) * ratio
        return relative_error(dense, wide)
    except Exception:  # an operator does not support float64, or the code states a dtype
        return None
