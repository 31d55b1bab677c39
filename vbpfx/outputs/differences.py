"""The difference between the outputs of two networks, and how much of it rounding alone may cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# The largest relative error of the output that rounding alone may cause, by the precision in which the model computes.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# The largest relative error between two programs that compute the same network in float32, such as two runtimes or graphs.
PARITY = TOLERANCES[torch.float32]


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """Return the tolerance of the coarsest of the precisions.

    It is that of float32 if there are none, and for types that are not in the table.
    """
    return max((TOLERANCES.get(dtype, PARITY) for dtype in dtypes), default=PARITY)


def relative_error(found: list[Tensor], expected: list[Tensor], *, both_nan: bool = False) -> float:
    """Return the maximum over the tensors of max|found - expected| / max|expected|, in float64 or complex128.

    Equal entries have a difference of 0, even if they are infinite (masked logits). Any other NaN or infinity makes the
    result infinite. With ``both_nan``, entries that are NaN in both also have a difference of 0 (rows of padding, which
    nothing reads).
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        exact = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.to(exact), b.to(exact)
        difference = torch.where((a == b) | (a.isnan() & b.isnan() & both_nan), 0.0, (a - b).abs()).max()
        scale = torch.where(b.isfinite(), b.abs(), 0.0).max().clamp_min(1e-300)
        worst = max(worst, (difference / scale).nan_to_num(torch.inf, torch.inf).item())
    return worst


def require_close(
    found: list[Tensor], expected: list[Tensor], allowed: float, problem: Callable[[float], Exception]
) -> float:
    """Return the relative error. If it is above ``allowed`` or NaN, raise the exception that ``problem`` makes from it."""
    error = relative_error(found, expected)
    if not error <= allowed:
        raise problem(error)
    return error


def squared_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return (found - expected)^2, entry by entry. Equal entries, even infinite ones, give 0 with a gradient of 0."""
    equal = found == expected
    return (found.masked_fill(equal, 0.0) - expected.masked_fill(equal, 0.0)).square()
