"""The oracle when the output hides a block or rounding is large: what it proves, what it does not, and what it rejects."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomize, stages
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import VerificationError
from vbpfx.report.page import html_report
from vbpfx.rewrite import verify as oracle
from vbpfx.rewrite.side_by_side import Comparison, look


def _hidden(**options: Any) -> vbpfx.Pruned:
    """Prune a network with a head of zeros behind a block."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 4))
    nn.init.zeros_(model[3].weight)
    return vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, method="vbp", progress=False, **options)


def test_behind_a_head_of_zeros_a_block_is_proven_at_its_own_layer_and_the_report_says_so() -> None:
    pruned = _hidden(include="0->2")
    found = pruned.verification
    assert found.effect == found.error == 0.0, "the output shows nothing"
    assert found.hidden
    assert found.proven
    assert 0.0 < found.behind < 1e-6
    for text in (str(pruned), html_report(pruned.report)):
        assert "not proven at the output" in text.lower()
        assert f"error {found.behind:.1e}" in text


def test_a_block_that_nothing_shows_is_called_not_proven(tmp_path: Path) -> None:
    pruned = _hidden()
    assert set(pruned.plan.widths) == {"0->2", "2->3"}
    assert pruned.verification.unproven == ("2->3",), "what reads it is the head of zeros"
    assert not pruned.verification.proven
    assert "NOT PROVEN for 2->3" in str(pruned)
    assert vbpfx.Report.load(pruned.save(tmp_path / "net")).verification == pruned.verification


class _Dead(nn.Module):
    """A live block and a dead block, whose last layer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
        nn.init.zeros_(self.dead[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.live(x + self.dead(x))


def test_a_dead_block_in_a_live_network_is_called_not_proven() -> None:
    result = stages(_Dead(), torch.randn(16, 8), ratio=0.5, allocation="equal")
    found = vbpfx.verify(result.captured, result.small, result.plan)
    assert found.effect > 1e-3
    assert found.unproven == ("dead",)


def test_of_a_class_whose_output_hides_all_the_layers_are_heard() -> None:
    pruned = _hidden(include="0->2")
    small = vbpfx.apply_plan(pruned.captured.reference, pruned.plan)
    found = vbpfx.verify(pruned.captured, small, pruned.plan)
    assert found.hidden
    assert found.proven
    assert 0.0 < found.behind < 1e-12, "in float64"
    assert not any(module._forward_hooks for module in small.modules())
    small[1] = nn.ReLU()
    with pytest.raises(
        VerificationError,
        match=r"the narrowed Sequential differs .* although every tensor is the one that follows from the plan",
    ):
        vbpfx.verify(pruned.captured, small, pruned.plan)


def test_of_a_block_that_a_class_does_not_show_nothing_is_proven() -> None:
    class Bare(nn.Module):
        """A functional layer with a head of zeros behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(8, 12), nn.Linear(8, 4)
            self.w, self.b = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(8))
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(self.a(x).relu(), self.w, self.b))

    model = Bare()
    pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, method="vbp", include="a", progress=False)
    assert pruned.verification.proven, "the graph shows it"
    (name,) = pruned.plan.widths
    found = vbpfx.verify(pruned.captured, vbpfx.apply_plan(model, pruned.plan), pruned.plan)
    assert found.unproven == (name,)


def test_what_stands_behind_a_layer_is_compared_as_plain_torch_computes_it() -> None:
    pruned = _hidden(include="0->2")
    wrong, inputs = copy.deepcopy(pruned.graph_module), pruned.captured.inputs
    wrong.set_submodule("1", nn.ReLU())
    seen = look(Comparison(pruned.captured, wrong, pruned.plan, inputs, torch.float64))
    (entry,) = pruned.plan.blocks
    with torch.no_grad():
        model = copy.deepcopy(pruned.captured.reference).double()
        hidden = model[1](model[0](inputs.args[0].double()))
        hidden[:, list(entry.pruned)] = entry.constants[0]
        expected = model[2](hidden)
        kept = list(entry.kept)
        h = (inputs.args[0].double() @ model[0].weight[kept].T + model[0].bias[kept]).relu()
        bias = model[2].bias + model[2].weight[:, list(entry.pruned)] @ entry.constants[0]
        found = h @ model[2].weight[:, kept].T + bias
        share = (expected - model[2].bias).abs().max() / expected.abs().max()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert seen.errors == {"0->2": pytest.approx(difference, rel=1e-9)}
    assert seen.shares == {"0->2": pytest.approx(share.item(), rel=1e-9)}


def test_a_wrong_rewrite_behind_a_head_of_zeros_fails() -> None:
    pruned = _hidden(include="0->2")
    wrong = copy.deepcopy(pruned.graph_module)
    wrong.set_submodule("1", nn.ReLU())
    with pytest.raises(VerificationError, match="in float64, too, first behind the layers of block 0->2"):
        vbpfx.verify(pruned.captured, wrong, pruned.plan)
    wrong = copy.deepcopy(pruned.graph_module)
    with torch.no_grad():
        wrong.get_submodule("2").weight[0, 0] += 0.1
    with pytest.raises(
        VerificationError, match=r"its tensor 2\.weight differs from the one that follows from the plan"
    ):
        vbpfx.verify(pruned.captured, wrong, pruned.plan)


class _Mixed(nn.Module):
    """A network in half precision whose output is float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 32), nn.Linear(32, 5)
        self.m = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.o(x + self.m(x)).float()


def _damaged(network: nn.Module, name: str) -> nn.Module:
    """Return a copy with one entry of a tensor changed by a twentieth of the largest entry."""
    wrong = copy.deepcopy(network)
    with torch.no_grad():
        tensor = wrong.get_parameter(name)
        tensor.flatten()[0] += tensor.abs().max() / 20
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_held_to_float64_where_it_is_coarse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _Mixed().to(dtype)
    pruned = vbpfx.prune(model, [torch.randn(32, 8).to(dtype)], ratio=0.5, method="vbp", progress=False)
    found = pruned.verification
    assert found.proven
    if dtype is torch.bfloat16:
        assert found.dtype == "bfloat16"
        assert found.error > 1e-4, "more than float32 would allow: the type is that of the weights, not of the output"
        assert found.exact < 1e-12, "what is computed in float64 differs by rounding in float64"
    for name in ("m.0.weight", "m.2.weight", "m.2.bias"):
        with pytest.raises(VerificationError, match="differs from the substitution reference"):
            vbpfx.verify(pruned.captured, _damaged(pruned.graph_module, name), pruned.plan)


def _cancelling(scale: float) -> tuple[nn.Sequential, Tensor]:
    """Return a model and data with a column of large inputs that cancels in the last layer, which loses float32 digits."""
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))).double()
    data = torch.cat([torch.rand(256, 7), scale + torch.rand(256, 1)], 1)
    with torch.no_grad():
        column = model[0].weight[:, 7].relu()
        model[2].weight -= (model[2].weight @ column / column.square().sum()) * column
    return model.float(), data


def test_inputs_too_large_for_their_precision_are_held_to_what_the_dense_network_loses() -> None:
    model, data = _cancelling(1e5)
    pruned = vbpfx.prune(model, [data], ratio=0.2, method="vbp", progress=False)
    found, few = pruned.verification, pruned.captured.inputs.args[0]
    with torch.no_grad():
        dense, wide = model(few).double(), copy.deepcopy(model).double()(few.double())
    lost = ((dense - wide).abs().max() / wide.abs().max()).item()
    assert lost > 1e-4, "the network itself loses more than is allowed elsewhere"
    assert found.error > 1e-4
    assert found.exact < 1e-9
    assert found.tolerance == pytest.approx(4 * lost, rel=1e-6)
    with pytest.raises(
        VerificationError, match=r"its tensor 0\.weight differs from the one that follows from the plan"
    ):
        vbpfx.verify(pruned.captured, _damaged(pruned.graph_module, "0.weight"), pruned.plan)


def test_a_right_rewrite_that_loses_more_than_the_dense_network_is_not_called_wrong(monkeypatch: Any) -> None:
    model, data = _cancelling(1e5)
    monkeypatch.setattr(oracle, "LOSSES", 1e-6)
    with pytest.raises(VerificationError, match=r"the rewrite is right .* scale the inputs") as raised:
        vbpfx.prune(model, [data], ratio=0.2, method="vbp", progress=False)
    assert "report the model" not in str(raised.value)
