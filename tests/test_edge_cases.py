"""Numbers and data at the edge of what is possible: either they are computed right, or an error says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.planning.ridge import ridge_factor
from vbpfx.reconstruction.regression import Sums


def mlp(hidden: int = 24) -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))).eval()  # fmt: skip


def data(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 8, generator=generator) for size in sizes]


def prune(model: nn.Module, batches: Any, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(model, batches, **{"ratio": 0.4, "progress": False} | options)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (0, 1)])
def test_a_covariance_that_is_not_finite_ends(value: float, place: tuple[int, int]) -> None:
    covariance = torch.eye(3)
    covariance[place] = value
    with pytest.raises(vbpfx.CalibrationError, match=r"not finite.*wider dtype"):
        ridge_factor(covariance, 1e-3)


def test_squares_that_leave_float32_are_summed_all_the_same() -> None:
    """Activations of 1e25 are finite, their squares are not; the sums scale as what they are of."""
    x, t = torch.randn(50, 5), torch.randn(50, 3)
    large, small = Sums(), Sums()
    large.add(1e25 * x, 1e25 * t, torch.ones(50))
    small.add(x.double(), t.double(), torch.ones(50))
    np.testing.assert_allclose(large.all.xx, 1e50 * small.all.xx.numpy(), rtol=1e-5, atol=1e44)
    np.testing.assert_allclose(large.all.xt, 1e50 * small.all.xt.numpy(), rtol=1e-5, atol=1e44)


def test_activations_whose_squares_leave_float32_are_reconstructed() -> None:
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter.mul_(1e22)
        model[2].weight.mul_(1e-22)
    pruned = prune(model, data(32, 32))
    assert pruned.plan.settings["compensation"] == "reconstruction"
    assert all(bool(c.weight.isfinite().all()) for c in pruned.plan.corrections)
    assert all(bool(p.isfinite().all()) for p in pruned.graph_module.parameters())
