"""Pruning as a pass of torch.fx's own pass manager."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_unchanged, randomize, state
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import vbpfx
from vbpfx.errors import AnalysisError, BudgetError, CalibrationError, CaptureError, VerificationError
from vbpfx.outputs.differences import relative_error


def network() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 5))).double().eval()


def data(batches: int = 3) -> list[torch.Tensor]:
    return [torch.randn(20, 6, dtype=torch.float64) for _ in range(batches)]


def exported(model: nn.Module) -> fx.GraphModule:
    x = torch.randn(3, 6, dtype=torch.float64)
    module = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("n", min=2, max=40)},)).module()
    assert isinstance(module, fx.GraphModule)
    return module


def described(graph_module: fx.GraphModule) -> list[Any]:
    """Return everything of a graph that a pass could change."""
    nodes = graph_module.graph.nodes
    return [graph_module.code, dict(graph_module.meta), [(n.name, n.format_node(), dict(n.meta)) for n in nodes]]


class Recorded(PassBase):
    """A pass that records the graph it is given and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.seen.append(graph_module)
        return PassResult(graph_module, False)


@pytest.mark.parametrize("make", [fx.symbolic_trace, exported])
def test_between_other_passes(make: Any) -> None:
    model, batches = network(), data()
    graph_module = make(model)
    before, text = state(graph_module), described(graph_module)
    first, last = Recorded(), Recorded()
    step = vbpfx.VarianceBasedPruning(batches, ratio=0.5)
    result = PassManager([first, step, last], run_checks_after_each_pass=True)(graph_module)
    assert result.modified is True
    assert first.seen == [graph_module]
    assert last.seen == [result.graph_module]
    assert_unchanged(graph_module, before)
    assert described(graph_module) == text
    reference = vbpfx.prune(model, batches, ratio=0.5, progress=False)
    fresh = torch.randn(7, 6, dtype=torch.float64)
    assert relative_error([result.graph_module(fresh)], [reference.graph_module(fresh)]) < 1e-9
    assert step.plan is not None
    assert list(step.plan.widths.values()) == [12]
    assert step.pruned is not None
    assert step.pruned.graph_module.get_parameter("0.weight") is result.graph_module.get_parameter("0.weight")


def test_the_budget_is_spent_once() -> None:
    step = vbpfx.VarianceBasedPruning(data(), ratio=0.5)
    result = PassManager([step], steps=4)(fx.symbolic_trace(network()))
    assert result.graph_module.get_parameter("0.weight").shape == (12, 6)
    again = step(fx.GraphModule(result.graph_module, result.graph_module.graph))  # another pass may rebuild the module
    assert again.modified is False
    other = step(fx.symbolic_trace(network()))
    assert other.modified is True


def test_a_budget_that_changes_nothing_is_an_error() -> None:
    step = vbpfx.VarianceBasedPruning(data(), ratio=0.1, round_to=8, method="vbp")
    with pytest.raises(BudgetError, match="multiples of 8, and the nearest total with such widths keeps all"):
        step(fx.symbolic_trace(network()))


def test_no_block() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 5)).double())
    with pytest.raises(AnalysisError):
        vbpfx.VarianceBasedPruning(data(), ratio=0.5)(graph_module)
    step = vbpfx.VarianceBasedPruning(data(), ratio=0.5, allow_no_blocks=True)
    result = step(graph_module)
    assert result.graph_module is graph_module
    assert result.modified is False
    assert step.plan is None
    with pytest.raises(AnalysisError, match="nowhere"):
        vbpfx.VarianceBasedPruning(data(), ratio=0.5, allow_no_blocks=True, include="nowhere")(
            fx.symbolic_trace(network())
        )


def test_names_metadata_and_guards_stay() -> None:
    graph_module = exported(network())
    for node in graph_module.graph.nodes:
        node.meta["tag"] = node.name
    small = vbpfx.VarianceBasedPruning(data(), ratio=0.5)(graph_module).graph_module
    assert [n.name for n in small.graph.nodes if n.op != "get_attr"] == [
        n.name for n in graph_module.graph.nodes if n.op != "get_attr"
    ]
    assert all(node.meta["tag"] == node.name for node in small.graph.nodes)
    assert small.meta == graph_module.meta
    with pytest.raises(AssertionError, match="<= 40"):
        small(torch.randn(41, 6, dtype=torch.float64))


def test_the_result_is_saved_and_pruned_again(tmp_path: Path) -> None:
    step = vbpfx.VarianceBasedPruning(data(), ratio=0.5)
    small = step(exported(network())).graph_module
    assert step.pruned is not None
    step.pruned.save(tmp_path)
    fresh = torch.randn(7, 6, dtype=torch.float64)
    assert torch.equal(vbpfx.load(tmp_path)(fresh), small(fresh))
    again = vbpfx.VarianceBasedPruning(data(), ratio=0.5)(small).graph_module
    assert again.get_parameter("0.weight").shape == (6, 6)


def test_shapes_are_renewed() -> None:
    graph_module = exported(network())
    small = vbpfx.VarianceBasedPruning(data(), ratio=0.5)(graph_module).graph_module
    before, after = ({n.name: n.meta for n in g.graph.nodes} for g in (graph_module, small))
    assert [str(size) for size in before["gelu"]["val"].shape][1] == "24"
    assert after["gelu"]["val"].shape == (before["gelu"]["val"].shape[0], 12)  # the symbolic batch size is kept
    assert after["gelu"]["tensor_meta"].shape[1] == 12
    assert after["linear_1"]["val"].shape[1] == 5
    assert after["gelu"]["val"].fake_mode is before["gelu"]["val"].fake_mode


def test_no_shapes_where_there_were_none() -> None:
    batches = data()
    plain = fx.symbolic_trace(network())
    small = vbpfx.VarianceBasedPruning(batches, ratio=0.5)(plain).graph_module
    assert not any("val" in node.meta for node in small.graph.nodes)
    ShapeProp(plain).propagate(batches[0])
    small = vbpfx.VarianceBasedPruning(batches, ratio=0.5)(plain).graph_module
    assert not any({"val", "tensor_meta"} & node.meta.keys() for node in small.graph.nodes)
    FakeTensorProp(plain, FakeTensorMode(allow_non_fake_inputs=True)).propagate(batches[0])
    small = vbpfx.VarianceBasedPruning(batches, ratio=0.5)(plain).graph_module
    assert {n.name: n.meta["val"].shape for n in small.graph.nodes if n.op == "call_module"} == {
        "_0": (20, 12),
        "_1": (20, 12),
        "_2": (20, 5),
    }


def test_what_it_requires() -> None:
    graph_module = fx.symbolic_trace(network())
    with pytest.raises(CaptureError, match=r"expected a torch.fx.GraphModule, got Sequential"):
        vbpfx.VarianceBasedPruning(data(), ratio=0.5)(network())  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"whose arguments are \['input'\]"):
        vbpfx.VarianceBasedPruning([{"image": torch.randn(2, 6)}, 1], ratio=0.5, inputs=lambda b: ((), b))(graph_module)
    with pytest.raises(CalibrationError, match="empty"):
        vbpfx.VarianceBasedPruning([], ratio=0.5)(graph_module)
    with pytest.raises(CalibrationError, match="one Tensor"):
        vbpfx.VarianceBasedPruning(data()[0], ratio=0.5)(graph_module)
    next(iter(graph_module.graph.find_nodes(op="call_module"))).target = "gone"
    with pytest.raises(CaptureError, match="the graph is invalid"):
        vbpfx.VarianceBasedPruning(data(), ratio=0.5)(graph_module)


def test_options_are_checked_before_anything_runs() -> None:
    with pytest.raises(BudgetError, match="ratio=5"):
        vbpfx.VarianceBasedPruning([], ratio=5)
    with pytest.raises(BudgetError, match="nonsense"):
        vbpfx.VarianceBasedPruning([], ratio=0.5, method="nonsense")


def test_batches_that_can_be_had_once() -> None:
    step = vbpfx.VarianceBasedPruning(iter(data(3)), ratio=0.5, allow_no_blocks=True)
    step(fx.symbolic_trace(network()))
    assert step.pruned is not None
    assert step.pruned.statistics.moments["0->2"][0].count == 60
    with pytest.raises(CalibrationError, match="used up"):
        step(fx.symbolic_trace(network()))
    endless = itertools.repeat(data(1)[0], 2)
    assert vbpfx.VarianceBasedPruning(endless, ratio=0.5)(fx.symbolic_trace(network())).modified


@pytest.mark.parametrize("damage", ["width", "value"])
def test_what_it_ensures_is_checked_on_the_result(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(vbpfx.VarianceBasedPruning):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            result = super().call(graph_module)
            layer = result.graph_module.get_submodule("2")
            if damage == "width":
                layer.weight = nn.Parameter(torch.randn(5, 13, dtype=torch.float64))
            else:
                with torch.no_grad():
                    layer.weight[0, 0] += 0.1
            return result

    match = "does not have the widths" if damage == "width" else "substitution reference|corrected weight"
    with pytest.raises(VerificationError, match=match):
        Damaged(data(), ratio=0.5)(fx.symbolic_trace(network()))
    with pytest.raises(Exception, match="'Damaged' pass") as raised:  # the manager wraps the error
        PassManager([Damaged(data(), ratio=0.5)])(fx.symbolic_trace(network()))
    assert isinstance(raised.value.__cause__, VerificationError)
