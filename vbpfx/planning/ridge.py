"""The linear-algebra step that all ridge regressions share: factor C + lambda s I."""

from __future__ import annotations

import torch
from torch import Tensor

from vbpfx.errors import CalibrationError


def ridge_factor(covariance: Tensor, penalty: float) -> Tensor:
    """Return the Cholesky factor of C + lambda s I, (d, d) float64, with s the mean of the diagonal of C.

    If s is not positive (nothing varies, and C holds only rounding errors), the factor is the identity. If rounding
    makes the matrix indefinite, lambda is multiplied by ten until it is positive definite.

    Args:
        covariance: C, (d, d).
        penalty: lambda, positive; it is relative to s, so it has no unit.

    Raises:
        CalibrationError: C holds NaN or infinity.
    """
    c = covariance.double()
    if not bool(c.isfinite().all()):
        raise CalibrationError(
            "covariances are not finite: activations or their squares overflow the model's dtype; run the model in a wider dtype"
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
