"""How far a network's outputs are from another's, and how far rounding alone may move them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Largest relative error of the output that rounding alone makes, by the precision the model computes in.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Largest relative error of the output between two programs that compute the same network in float32: two runtimes, two graphs.
PARITY = TOLERANCES[torch.float32]


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """The tolerance of the coarsest of some precisions; that of float32 without one, and for types that are not in the table."""
    return max((TOLERANCES.get(dtype, PARITY) for dtype in dtypes), default=PARITY)


def relative_error(found: list[Tensor], expected: list[Tensor], *, both_nan: bool = False) -> float:
    """max over the tensors of max|found - expected| / max|expected|, in float64, or complex128.

    Equal entries differ by nothing even where they are infinite (masked logits). Any other NaN or
    infinity makes the result infinite, except, with ``both_nan``, where both are NaN (rows of padding, which nothing reads).
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
    """Return the relative error; raise what ``problem`` makes of it if it is above ``allowed``, or not a number."""
    error = relative_error(found, expected)
    if not error <= allowed:
        raise problem(error)
    return error


def squared_errors(found: Tensor, expected: Tensor) -> Tensor:
    """(found - expected)^2, entry by entry; 0 with a gradient of 0 where the two are equal, which infinite entries may be."""
    equal = found == expected
    return (found.masked_fill(equal, 0.0) - expected.masked_fill(equal, 0.0)).square()
