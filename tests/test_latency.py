"""Latency as a budget, on a fake runtime with a computed clock."""

from __future__ import annotations

import math
import time

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import BudgetError, ExportError
from vbpfx.graph.capture import Frontend
from vbpfx.graph.fake import run_fake
from vbpfx.measurement.latency import block_network
from vbpfx.planning.latency_table import Latencies
from vbpfx.runtimes.interface import About, Compiled, Runtime

# Constant cost of every call of the runtime, in multiply-accumulates.
OVERHEAD = 2000


class _Clock:
    """A clock that advances only when a network runs."""

    def __init__(self) -> None:
        self.now = 0.0


class _Counted(Compiled):
    def __init__(self, clock: _Clock, network: nn.Module, inputs: Inputs) -> None:
        self.clock, self.network = clock, network
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            inputs.run(network)
        self.macs = counter.get_total_flops() // 2

    def run(self, inputs: Inputs) -> list[Tensor]:
        self.clock.now += self.macs + OVERHEAD
        return []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every runtime take one second per multiply-accumulate, plus a constant for the call."""
    clock = _Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    engine = Runtime("counted", About("none"), lambda network, inputs, threads: _Counted(clock, network, inputs))
    monkeypatch.setattr("vbpfx.measurement.latency.find_runtime", lambda name: engine)


class _Residual(nn.Module):
    """Two blocks of different widths on a residual stream of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(32, d), nn.GELU(), nn.Linear(d, 32)) for d in (256, 192))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return _Residual()


@pytest.mark.parametrize("target", [0.5, 0.8])
@pytest.mark.parametrize("allocation", ["equal", "global"])
@pytest.mark.usefixtures("counted")
def test_the_budget_is_met_to_the_neuron(target: float, allocation: str) -> None:
    """If latency is a constant plus the cost of the products, the tables and the correction are exact."""
    data = [torch.randn(64, 32)]
    options = {"method": "vbp", "allocation": allocation, "round_to": 1}
    pruned = vbpfx.prune(_network(), data, latency=target, progress=False, **options)
    found = pruned.report.latency
    assert found is not None
    a_neuron = 64 / (64 * (256 + 192) + OVERHEAD)
    assert target - a_neuron <= found["measured"] <= target
    assert found["predicted"] == pytest.approx(found["measured"], abs=1e-9)
    assert f"{found['measured']:.1%} of the dense network's" in str(pruned)


@pytest.mark.usefixtures("counted")
def test_a_budget_out_of_reach_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"latency=0\.01 cannot be met.*use latency=0\.1"):
        vbpfx.prune(_network(), [torch.randn(64, 32)], latency=0.01, method="vbp", min_width=16, progress=False)


@pytest.mark.usefixtures("counted")
def test_where_narrow_blocks_are_no_faster_no_budget_can_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock does not depend on the width, as for a very small network."""
    monkeypatch.setattr(
        _Counted, "run", lambda self, inputs: setattr(self.clock, "now", self.clock.now + OVERHEAD) or []
    )
    with pytest.raises(BudgetError, match=r"latency=0\.9 cannot be met"):
        vbpfx.prune(_network(), [torch.randn(64, 32)], latency=0.9, method="vbp", progress=False)


@pytest.mark.usefixtures("counted")
def test_no_multiple_of_the_rounding_below_a_width() -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(_network(), torch.randn(2, 32)))
    with pytest.raises(BudgetError, match="no multiple of round_to=256 is below its width 256"):
        vbpfx.measure_latencies(analysis, 0.5, round_to=256)


def test_predicted_latency_by_hand() -> None:
    # The point at 50 is noise: a narrower block never costs more.
    table = Latencies("x", 1, 1, 10.0, {"a": ((50, 2.5), (100, 2.0), (200, 4.0)), "b": ((10, 1.0), (20, 2.0))}, 0.5)
    assert table.ratio({"a": 150}) == pytest.approx(1 - 0.5 * (4.0 - 3.25) / 10, rel=1e-12)
    assert table.ratio({"a": 200, "b": 12}) == pytest.approx(1 - 0.5 * (2.0 - 1.2) / 10, rel=1e-12)
    assert table.ratio({"a": 3}) == pytest.approx(1 - 0.5 * (4.0 - 2.5) / 10, rel=1e-12)
    assert table.cost({"a": 150}) == 962_500_000


def test_a_plan_by_latency_needs_its_table() -> None:
    captured = vbpfx.capture(_network(), torch.randn(2, 32))
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis)
    vbpfx.calibrate(observed, [torch.randn(64, 32)], progress=False)
    with pytest.raises(BudgetError, match=r"pass latencies=vbpfx\.measure_latencies"):
        vbpfx.make_plan(analysis, vbpfx.statistics(observed), latency=0.5)
    other = Latencies("x", 1, 1, 1.0, {analysis.usual[0].name: ((8, 0.1), (256, 0.2))})
    with pytest.raises(BudgetError, match=r"width 192\) was not measured"):
        vbpfx.make_plan(analysis, vbpfx.statistics(observed), latency=0.5, latencies=other)


def test_an_unknown_runtime_is_an_error_before_calibration() -> None:
    def no_data() -> object:
        yield torch.randn(4, 32)
        raise AssertionError("calibrated before the runtime was looked for")

    with pytest.raises(ExportError, match="runtime 'tpu' is unknown"):
        vbpfx.prune(_network(), no_data(), latency=0.5, runtime="tpu", progress=False)


class _Gated(nn.Module):
    """A packed gate after a reshape with sizes read from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(12, 40), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        gate, value = self.both(x.reshape(b * t, 12)).chunk(2, -1)
        return x + self.out(torch.sigmoid(gate) * value).reshape(b, t, 12)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (_network(), torch.randn(2, 32)),
        (_Gated(), torch.randn(2, 5, 12)),
        (timm.create_model("mobilenetv3_small_050"), torch.randn(2, 3, 64, 64)),
        (timm.create_model("test_convnext"), torch.randn(2, 3, 64, 64)),
    ],
    ids=["residual", "gate", "inverted bottleneck", "convnext"],
)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_block_by_itself_computes_what_it_does_in_the_network(
    model: nn.Module, example: Tensor, frontend: Frontend
) -> None:
    captured = vbpfx.capture(model.eval(), example, frontend=frontend)
    analysis = vbpfx.find_blocks(captured)
    samples = 3
    inputs = captured.inputs.resized(samples)
    real: dict[str, object] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            real[n.name] = value.clone() if isinstance(value, Tensor) else value  # some layers change it in place
            return value

    with torch.no_grad():
        Recorder(captured.graph_module).run(*inputs.tensors)
    values: dict[str, object] = {}

    def keep(node: fx.Node, run) -> object:
        values[node.name] = value = run()
        return value

    run_fake(captured.graph_module, inputs, samples, keep)
    for block in analysis.usual:
        alone, own = block_network(captured.graph_module, block, values)
        names = [str(node.target) for node in alone.graph.nodes if node.op == "placeholder"]
        assert [t.shape for t in own.tensors] == [real[name].shape for name in names]
        with torch.no_grad():
            found = alone(*(real[name].clone() for name in names))
        ends = [n.name for n in captured.graph_module.graph.nodes if n.name in {c.node for c in block.consumers}]
        for name, output in zip(ends, found, strict=True):
            torch.testing.assert_close(output, real[name], rtol=0, atol=0)


def test_a_runtime_brings_the_multiple_that_it_is_fast_at() -> None:
    data = [torch.randn(64, 32)]

    def widths(**options: int | str) -> set[int]:
        return set(
            vbpfx.prune(_network(), data, ratio=0.4, method="vbp", progress=False, **options).plan.widths.values()
        )

    assert all(width % 16 == 0 for width in widths(runtime="openvino"))
    assert all(width % 8 == 0 for width in widths(runtime="onnxruntime"))
    assert widths() == widths(runtime="openvino", round_to=1) != widths(runtime="openvino")


@pytest.mark.parametrize(
    ("dense", "seconds", "correction", "message"),
    [
        (0.0, 1.0, 1.0, "the whole network was measured as"),
        (math.nan, 1.0, 1.0, "the whole network was measured as"),
        (1.0, math.nan, 1.0, "block a was measured as"),
        (1.0, math.inf, 1.0, "block a was measured as"),
        (1.0, 1.0, math.nan, "the correction of a latency table is nan"),
        (1.0, 1.0, -1.0, "the correction of a latency table is -1"),
    ],
)
def test_a_table_that_could_rank_nothing_is_an_error(
    dense: float, seconds: float, correction: float, message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        Latencies("x", 1, 1, dense, {"a": ((50, seconds), (100, 2.0))}, correction)
