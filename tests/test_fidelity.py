"""The captured graph is compared with the model on other batches, sizes and calls than the traced one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import double
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import CalibrationError, CaptureError, VerificationError


def mlp(inputs: int = 8, hidden: int = 24, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def prune(model: nn.Module, data: Any, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(double(model), data, ratio=0.5, method="vbp", progress=False, **options)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class EachSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mlp(x[i : i + 1]) for i in range(x.shape[0])])  # a loop over samples


class Unbound(EachSample):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.stack([sample.tanh() for sample in x]))  # a loop over samples


class Summed(EachSample):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.mlp(x[i : i + 1].sum(0, keepdim=True)) for i in range(x.shape[0])]
        )  # a loop over samples


class Halves(EachSample):
    """The two halves of a sequence, with Python code that branches on its length."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if half < 1:
            return self.mlp(x[:, 0])
        return self.mlp(x[:, :half].mean(1)) + self.mlp(x[:, half:].mean(1))


class Steps(EachSample):
    """A loop over time."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):  # a loop over time
            h = (h + self.mlp(x[:, step])).tanh()
        return h


class Rounded(EachSample):
    """Python code turns the length into a number, although the exported graph claims to accept any length."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x[:, : int(x.shape[1] * 0.5)].mean(1))


class Remembers(EachSample):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x + self.memory)
        self.memory = y.detach().mean(0)
        return y


def test_a_loop_over_samples_names_its_line() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        CaptureError,
        match=r"only right for batches of 4 samples: with 5 .*test_fidelity.py:\d+: return torch.cat.*any batch",
    ):
        prune(EachSample(), [randn(8, 8)] * 3)


def test_a_loop_over_a_single_sample_is_no_other_error() -> None:
    """torch.export traces two samples instead of one, so that the graph would fail on the captured batch itself."""
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=r"does not run on a single sample .* pass at least two samples"):
        prune(Unbound(), [randn(1, 8), randn(5, 8)])
    with pytest.raises(CaptureError, match=r"on the batch it was captured with \(outputs of shape.*without a loop"):
        prune(Summed(), [randn(1, 8), randn(5, 8)])
    with pytest.raises(
        CaptureError, match=r"only right for batches of 2 samples: with 3 .*test_fidelity.py:\d+.*without a loop"
    ):
        prune(Unbound(), [randn(2, 8), randn(5, 8)])


@pytest.mark.parametrize("samples", [2, 5])
def test_the_oracle_names_a_graph_of_another_number_of_samples(samples: int) -> None:
    torch.manual_seed(0)
    captured = vbpfx.capture(double(Unbound()), randn(3, 8))
    observed = vbpfx.prepare(captured, analysis := vbpfx.find_blocks(captured))
    observed(randn(3, 8))
    plan = vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=0.5, method="vbp")
    small = vbpfx.convert(captured, plan)
    with pytest.raises(VerificationError, match=r"captured graph (does not run|returns shapes).*loop"):
        vbpfx.verify(captured, small, plan, randn(samples, 8))


@pytest.mark.parametrize("make", [Halves, Steps])
def test_a_length_that_differs_stays_open(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = double(make())
    data = [randn(6, length, 8) for length in (5, 12, 9, 7)]
    if make is Steps:  # a loop cannot stay open
        with pytest.raises(
            CaptureError, match=r"batches differ in size.*test_fidelity.py:\d+: for step in range.*one size"
        ):
            prune(model, data)
        return
    pruned = prune(model, data)
    assert pruned.captured.inputs.open == {((0, 0), 1)}
    assert pruned.captured.fixed == ()
    for length in (2, 5, 8, 12, 31):
        x = randn(3, length, 8)
        torch.testing.assert_close(pruned.captured.graph_module(x), model(x), rtol=1e-12, atol=1e-12)
    own = pruned.apply_to(model)
    torch.testing.assert_close(pruned.graph_module(x), own(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Steps, Rounded])
def test_a_size_that_the_graph_has_fixed_is_said_and_required(make: Callable[[], nn.Module], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = double(make())
    pruned = prune(model, [randn(6, 10, 8) for _ in range(2)])
    (fixed,) = pruned.captured.fixed
    assert (fixed.place, fixed.axis, fixed.size) == ((0, 0), 1, 10)
    assert "test_fidelity.py" in fixed.where
    assert "only accepts these input sizes: input 1, axis 1: 10" in str(pruned)
    x = randn(3, 10, 8)
    torch.testing.assert_close(pruned.graph_module(x), pruned.apply_to(model)(x), rtol=1e-12, atol=1e-12)
    pruned.save(tmp_path / "saved")
    assert "only accepts these input sizes: input 1, axis 1: 10" in (tmp_path / "saved" / "report.html").read_text()
    for network in (pruned.graph_module, vbpfx.load(tmp_path / "saved")):
        with pytest.raises(
            AssertionError, match=r"only accepts the size at which it was captured: input 1, axis 1: 10.*test_fidelity"
        ):
            nn.Module.__call__(network, randn(3, 11, 8))
    # The check of the size does not prevent pruning again.
    again = vbpfx.prune(pruned.graph_module, [randn(6, 10, 8)], ratio=0.5, method="vbp", progress=False)
    assert again.plan.widths == {"mlp": 6}
    with pytest.raises(AssertionError, match="only accepts the size at which it was captured"):
        nn.Module.__call__(again.graph_module, randn(3, 11, 8))
    assert pruned.to_exported_program().module()(x).shape == (3, 8)


def test_a_stream_of_other_lengths_is_an_error() -> None:
    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match=r"another size.*axis 1: 10.*\(6, 7, 8\).*open_sizes=True"):
        prune(Rounded(), iter([randn(6, 10, 8), randn(6, 7, 8)]))


def test_sizes_are_left_open_on_request() -> None:
    torch.manual_seed(0)
    model = double(Halves())
    fixed = prune(model, [randn(6, 10, 8)])
    assert [(f.axis, f.size) for f in fixed.captured.fixed] == [(1, 10)]
    pruned = prune(model, [randn(6, 10, 8)], open_sizes=True)
    assert pruned.captured.fixed == ()
    assert pruned.report.arguments["open_sizes"] is True
    for length in (3, 10, 17):
        x = randn(2, length, 8)
        torch.testing.assert_close(pruned.captured.graph_module(x), model(x), rtol=1e-12, atol=1e-12)


def test_images_of_any_size_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pruned = prune(model, [randn(4, 3, 8, 8)])
    assert pruned.captured.fixed == ()
    assert pruned.graph_module(randn(2, 3, 5, 9)).shape == (2, 4)


def test_a_state_kept_between_calls_is_an_error() -> None:
    torch.manual_seed(0)
    model = Remembers()
    before = model.memory.clone()
    with pytest.raises(CaptureError, match="keeps state between calls, in memory: a second call"):
        prune(model, [randn(6, 8)])
    assert torch.equal(model.memory, before)


def test_a_decision_by_values_is_found_on_the_next_batch() -> None:
    class Decides(EachSample):
        def forward(self, x: Tensor, positive: bool = True) -> Tensor:
            return self.mlp(x if positive else -x)

    torch.manual_seed(0)
    model = double(Decides())
    with pytest.raises(CaptureError, match="differs from the model on another batch of the same sizes"):
        prune(model, [{"x": randn(6, 8), "positive": True}, {"x": randn(6, 8), "positive": False}])


def test_the_oracle_runs_another_number_of_samples_than_was_traced() -> None:
    torch.manual_seed(0)
    model = double(mlp())
    pruned = prune(model, [randn(8, 8)])
    seen: list[int] = []
    pruned.captured.reference.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan)
    assert pruned.captured.inputs.batch_size == 4
    assert set(seen) == {5}
