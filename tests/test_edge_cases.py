"""Extreme numbers and data either give right results or raise an error that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize
from safetensors.torch import save_file
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.planning.ridge import ridge_factor
from vbpfx.plans.files import plan_digest
from vbpfx.reconstruction.influence import Gradients
from vbpfx.reconstruction.regression import Sums, fit


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
    """Activations of 1e25 are finite, but their squares overflow float32; the sums must scale accordingly."""
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


def test_small_gradients_in_half_precision_weigh_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares are computed in float32: they would be zero in float16, and their sums would have 8 bits in bfloat16."""
    torch.manual_seed(0)
    model = mlp()
    captured = vbpfx.capture(model, data(4)[0], frontend="symbolic")
    layer = vbpfx.find_blocks(captured).layers[0]
    for dtype in (torch.float16, torch.bfloat16):
        gradient = (1e-4 * torch.randn(200, layer_width := captured.nodes[layer.node].meta["val"].shape[1])).to(dtype)
        monkeypatch.setattr(Gradients, "_gradients", lambda self, batch, g=gradient: [(layer.node, g)])
        gradients = Gradients(captured, [layer])
        gradients.add(captured.inputs)
        exact = gradient.double()
        (squares,) = gradients.squares[layer.node]
        assert layer_width == len(gradients.products[layer.node])
        np.testing.assert_allclose(squares, exact.square().sum(1, keepdim=True), rtol=1e-6)
        products = exact.T @ exact
        np.testing.assert_allclose(gradients.products[layer.node], products, rtol=0, atol=1e-6 * float(products.max()))


OPTIONS: dict[str, dict[str, Any]] = {
    "samples": {"samples": [0, -1, 1.5, True]},
    "memory": {"memory": [0, -1.0, float("nan"), float("inf"), "8"]},
    "runtime_batch": {"runtime_batch": [0, -1, 2.0]},
    "runtime_threads": {"runtime_threads": [0, -2]},
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for o in OPTIONS.values() for n, values in o.items() for v in values]
)
def test_numbers_that_are_out_of_range(name: str, value: Any) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("no data is read before the arguments are checked")

    with pytest.raises(vbpfx.BudgetError, match=rf"{name}={value!r}".replace("-", r"\-")):
        prune(mlp(), data(8), inputs=never, **{name: value})


@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_batches_without_samples_change_nothing(method: str) -> None:
    torch.manual_seed(0)
    model, batches, empty = mlp(), data(16, 7, 12), torch.zeros(0, 8)
    expected = prune(model, batches, method=method, compensation="ridge" if method == "vbp" else None)
    found = prune(
        model,
        [batches[0], empty, *batches[1:], empty],
        method=method,
        compensation="ridge" if method == "vbp" else None,
    )
    assert plan_digest(found.plan) == plan_digest(expected.plan)


def test_batches_without_samples_change_nothing_in_files(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 4))

    torch.manual_seed(0)
    batches, empty = data(16, 7), torch.zeros(0, 8)
    save_file(randomize(network()).state_dict(), tmp_path / "dense.safetensors")
    plans = []
    for number, given in enumerate((batches, [empty, batches[0], empty, batches[1]], [empty])):
        with vbpfx.without_weights():
            hollow = network()
        options: dict[str, Any] = {"ratio": 0.4, "compensation": "ridge", "progress": False}
        if number == 2:
            with pytest.raises(vbpfx.CalibrationError, match="data is empty"):
                vbpfx.prune_files(hollow, given, tmp_path / "2", weights=tmp_path / "dense.safetensors", **options)
            assert not (tmp_path / "2").exists()
            continue
        out = tmp_path / str(number)
        plans.append(vbpfx.prune_files(hollow, given, out, weights=tmp_path / "dense.safetensors", **options).plan)
    assert plan_digest(plans[0]) == plan_digest(plans[1])


def test_data_that_begins_without_a_sample() -> None:
    with pytest.raises(vbpfx.CalibrationError, match="holds no sample; pass example_inputs="):
        prune(mlp(), [torch.zeros(0, 8), *data(8)])


def test_data_without_any_sample() -> None:
    with pytest.raises(vbpfx.CalibrationError, match="data is empty: pass at least one batch with a sample"):
        prune(mlp(), [torch.zeros(0, 8)], example_inputs=data(4)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[4].bias[2] = value
    with pytest.raises(
        vbpfx.CalibrationError, match=r"batch 1 .*block 4->6; parameter 4\.bias of the model holds NaN or inf"
    ):
        prune(model, data(8, 8))


def test_a_model_that_returns_nan_is_not_said_to_be_traced_wrong() -> None:
    model = mlp()
    with torch.no_grad():
        model[6].bias[1] = torch.nan
    with pytest.raises(vbpfx.VerificationError, match="the model itself returns NaN"):
        prune(model, data(8, 8), method="vbp")


class Complex(nn.Module):
    """A block of complex numbers followed by a block of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12, dtype=torch.complex64)
        self.second = nn.Linear(12, 8, dtype=torch.complex64)
        self.rest = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.second(self.first(x.to(torch.complex64)).tanh()).real)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_complex_numbers_are_left_alone(frontend: Any) -> None:
    torch.manual_seed(0)
    pruned = prune(Complex().eval(), data(16, 7), frontend=frontend)
    assert set(pruned.plan.widths) <= {"rest", "rest.0->rest.2", "rest.2->rest.4", "rest.4->rest.6"}
    (refusal,) = (r for r in pruned.analysis.refusals if r.name == "first")
    assert "complex numbers" in refusal.reason


def test_a_model_without_values_is_for_files() -> None:
    hollow, batch = mlp().to("meta"), data(8)
    with pytest.raises(vbpfx.CaptureError, match=r"meta device.*vbpfx\.prune_files"):
        prune(hollow, batch)
    captured = vbpfx.capture(hollow, batch[0])
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with pytest.raises(vbpfx.CalibrationError, match=r"meta device.*vbpfx\.prune_files"):
        vbpfx.calibrate(observed, batch)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_targets_that_are_not_finite_fit_nothing(value: float) -> None:
    x, t = torch.randn(50, 5), torch.randn(50, 3)
    t[3, 1] = value
    sums = Sums()
    sums.add(x, t, torch.ones(50))
    with pytest.raises(vbpfx.CalibrationError, match=r"not finite.*wider dtype"):
        fit(sums.all, torch.zeros(3, 5, dtype=torch.float64), 1e-3)


def test_gradients_whose_squares_leave_float32_weigh_nothing() -> None:
    """If a model multiplies by 1e25, all rows get equal weights and none is NaN."""
    model = mlp()[:3]
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(1e-25)
    batch = torch.randn(20, 8)

    class Times(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e25 * x

    captured = vbpfx.capture(nn.Sequential(*model, Times(), nn.Tanh()), batch[:4])
    layer = next(la for la in vbpfx.find_blocks(captured).layers if la.weight == "2.weight")
    gradients = Gradients(captured, [layer])
    gradients.add(Inputs((batch,), {}))
    found = gradients.influences()[layer.node]
    assert found.metric is None
    assert all(bool((weights == 1).all()) for weights in found.weights)
