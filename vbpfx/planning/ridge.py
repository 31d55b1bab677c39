"""The one linear-algebra step that every regression here takes: C + lambda s I, factored."""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError


def ridge_factor(covariance: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of C + lambda s I, (d, d) float64, with s the mean of the diagonal of C.

    Of a covariance that is rounding alone (nothing varies) it is the identity's; where rounding makes C indefinite beyond
    lambda, lambda grows tenfold until it is not.

    Args:
        covariance: C, (d, d).
        penalty: lambda, positive; s makes it free of units.

    Raises:
        CalibrationError: C holds NaN or infinity.
    """
    c = covariance.double()
    if not bool(c.isfinite().all()):
        raise CalibrationError(
            "the covariances of its input are not finite: activations, or their squares, leave the precision that the model "
            "computes in; run it in a wider dtype"
        )
    scale = float(c.diagonal().mean()) if len(c) else 0.0
    if not scale > 0:
        return torch.eye(len(c), dtype=torch.float64, device=c.device)
    while True:
        regular = c.clone()
        regular.diagonal().add_(penalty * scale)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not int(failed):
            return factor
        penalty *= 10
