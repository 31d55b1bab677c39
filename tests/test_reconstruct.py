"""Reconstruction makes exact plans for every kind of block, and its regressions agree with NumPy's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_unchanged, double, randomize, state
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FOUND, Case, Net

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.planning.compensate import PENALTIES
from vbpfx.plans.files import load_plan, plan_digest
from vbpfx.reconstruction.influence import Gradients
from vbpfx.reconstruction.regression import Sums, fit
from vbpfx.reconstruction.residual import find_residual_sum
from vbpfx.reconstruction.rows import Rows, in_larger_parts
from vbpfx.reconstruction.schedule import schedule
from vbpfx.reconstruction.steps import layers_beside, layers_to_fit
from vbpfx.reconstruction.stream import Stream


def _batches(case: Case, count: int = 6) -> list[object]:
    torch.manual_seed(7)
    made = [case.batch() for _ in range(count)]
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, made)


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.name)
def test_the_oracle_holds_on_every_kind_of_block(case: Case) -> None:
    torch.manual_seed(0)
    model = double(randomize(case.make()))
    before = state(model)
    pruned = vbpfx.prune(model, _batches(case), ratio=0.5, frontend=case.frontends[0], verify=False, progress=False)
    found = vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, tolerance=1e-9)
    assert found.effect > 100 * found.error
    if not case.own:
        vbpfx.verify(pruned.captured, pruned.apply_to(model), pruned.plan, tolerance=1e-9)
    assert_unchanged(model, before)


class Residual(nn.Module):
    """Two attention-like layers and two blocks on one stream of tokens (B, T, 8), with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            mixed = self.mix[i](torch.tanh(self.norms[2 * i](x)).mean(1, keepdim=True) + x)
            x = x + mixed
            x = x + self.gamma * self.down[i](nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x[:, 0])


def _residual() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(3)
    return randomize(Residual()).eval(), [torch.randn(50, 6, 8) for _ in range(8)]


def test_layers_beside_the_blocks_are_found_by_what_they_are_added_to() -> None:
    model, data = _residual()
    captured = vbpfx.capture(model, data[0][:4])
    analysis = vbpfx.find_blocks(captured)
    beside = layers_beside(analysis, analysis.blocks)
    assert [layer.weight for layer in beside] == ["mix.0.weight", "down.0.weight", "mix.1.weight", "down.1.weight"]
    first, _ = analysis.blocks
    fitted = layers_to_fit(schedule(analysis), analysis, [first], layers_beside(analysis, [first]))
    assert [layer.weight for layer in fitted] == ["down.0.weight", "mix.1.weight"]  # no block is in front of mix.0
    for layer in analysis.layers:
        found = find_residual_sum(captured, layer.node)
        assert (found is not None) == layer.weight.startswith(("mix", "down")), layer.weight
        if layer.weight.startswith("down"):
            assert found is not None
            assert len(found.way) == 1


def test_refits_are_named_switched_off_and_kept_out_by_patterns() -> None:
    model, data = _residual()
    both = vbpfx.prune(model, data, ratio=0.5, progress=False)
    assert both.plan.refitted == ("mix.1.weight",)
    assert both.plan.settings["reconstruction"]["refitted"] == ["mix.1.weight"]
    assert "refitted beside the blocks: 1 layer (mix.1.weight)" in str(both)
    assert vbpfx.prune(model, data, ratio=0.5, refit=False, progress=False).plan.refitted == ()
    kept_out = vbpfx.prune(model, data, ratio=0.5, exclude="mix.1", progress=False)
    assert kept_out.plan.refitted == ()
    assert torch.equal(kept_out.graph_module.get_parameter("mix.1.weight"), model.mix[1].weight)


def test_everything_else_stays_bit_for_bit() -> None:
    model, data = _residual()
    pruned = vbpfx.prune(model, data, ratio=0.5, refit=False, progress=False)
    changed = {axis.name for e in pruned.plan.blocks for axis in e.block.parameters}
    changed |= {c.layer.bias for c in pruned.plan.corrections}
    same = [n for n, p in model.named_parameters() if n not in changed]
    assert len(same) > 10
    assert all(torch.equal(pruned.graph_module.get_parameter(n), model.get_parameter(n)) for n in same)


def test_a_plan_with_corrections_comes_back_from_a_folder(tmp_path: Path) -> None:
    model, data = _residual()
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    pruned.save(tmp_path)
    loaded, own = vbpfx.load(tmp_path), vbpfx.load(tmp_path, into=Residual())
    expected = pruned.graph_module(data[0])
    assert torch.equal(loaded(data[0]), expected)
    torch.testing.assert_close(own.eval()(data[0]), expected, rtol=1e-5, atol=1e-6)


def test_a_wrong_correction_is_noticed() -> None:
    model, data = _residual()
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    first = pruned.plan.corrections[0]
    other = dataclasses.replace(first, weight=first.weight + 0.1 * torch.randn_like(first.weight))
    plan = dataclasses.replace(pruned.plan, corrections=(other, *pruned.plan.corrections[1:]))
    with pytest.raises(vbpfx.VerificationError, match="differs from the substitution reference"):
        vbpfx.verify(pruned.captured, pruned.graph_module, plan)


def test_sums_of_wide_inputs_are_numpys() -> None:
    """The inputs are wider than the panels in which symmetric products are computed."""
    torch.manual_seed(0)
    x, t, weights = torch.randn(50, 600).double(), torch.randn(50, 3).double(), torch.rand(50).double()
    sums = Sums()
    sums.add(x[:20], t[:20], weights[:20])
    sums.add(x[20:], t[20:], weights[20:], held_out=True)
    expected = np.cov(torch.cat([x, t], 1).numpy(), rowvar=False, ddof=0, aweights=weights.numpy())
    np.testing.assert_allclose(sums.all.xx, expected[:600, :600], rtol=0, atol=1e-13)
    np.testing.assert_allclose(sums.all.xt, expected[:600, 600:], rtol=0, atol=1e-13)


def test_the_regression_is_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(300, n, generator=generator, dtype=torch.float64) + 3 for n in (7, 4))
    t = t + x[:, :4]
    weights = torch.rand(300, generator=generator, dtype=torch.float64) + 0.1
    toward = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    columns, penalty = torch.tensor([0, 1, 3, 4, 6]), 0.2
    sums = Sums()
    for part in torch.arange(300).split(41):
        sums.add(x[part], t[part], weights[part], held_out=bool(part[0] % 2))
    found, bias = fit(sums.all, toward, penalty, columns)
    w = weights.numpy() / float(weights.sum())
    xc, tc = x.numpy() - w @ x.numpy(), t.numpy() - w @ t.numpy()
    xk, start = xc[:, columns], toward.numpy()[:, columns]
    scale = np.trace(xk.T @ (w[:, None] * xk)) / len(columns)
    root = np.sqrt(w)[:, None]
    rows = np.vstack([root * xk, np.sqrt(penalty * scale) * np.eye(len(columns))])
    wanted = np.vstack([root * (tc - xk @ start.T), np.zeros((len(columns), 4))])
    expected = start + np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found[:, columns], expected, rtol=1e-8, atol=1e-10)
    assert not found[:, [2, 5]].any()
    np.testing.assert_allclose(bias, w @ t.numpy() - found.numpy() @ (w @ x.numpy()), rtol=1e-9)


def test_a_stream_computes_what_the_graph_computes() -> None:
    model, data = _residual()
    captured = vbpfx.capture(model, data[0][:4])
    stream = Stream(captured.graph_module, [Inputs((batch,), {}) for batch in data])
    for name in list(stream.nodes)[:-1]:
        stream.run_before(name)
        stream.run_through(name)
    last = next(node for node in captured.graph_module.graph.nodes if node.op == "output").args[0].name
    for number, batch in enumerate(data):
        assert torch.equal(stream.value(number, last), captured.graph_module(batch))
    # No value is kept that is not read any more.
    assert all(len(run.env) == 1 for run in stream.runs)


def test_reconstruction_errs_less_than_the_mean_fold_on_other_data() -> None:
    model, data = _residual()
    torch.manual_seed(11)
    fresh = torch.randn(400, 6, 8)
    with torch.no_grad():
        dense = model(fresh)
        errors = {
            method: float(
                (vbpfx.prune(model, data, ratio=0.5, method=method, progress=False).graph_module(fresh) - dense)
                .square()
                .mean()
            )
            for method in ("vbp", "auto")
        }
    assert errors["auto"] < 0.5 * errors["vbp"]


def test_a_layer_without_a_bias_stays_without_one() -> None:
    torch.manual_seed(5)
    net = Net(
        lambda s, x: (y := x + s.down(nn.functional.relu(s.up(x)))) + s.mix(torch.tanh(y)),
        mix=nn.Linear(8, 8, bias=False), up=nn.Linear(8, 16), down=nn.Linear(16, 8),
    )  # fmt: skip
    model = randomize(net)
    pruned = vbpfx.prune(model, [torch.randn(40, 8) for _ in range(5)], ratio=0.5, progress=False)
    assert pruned.plan.refitted == ("mix.weight",)
    assert "mix.bias" not in dict(pruned.graph_module.named_parameters())
    assert pruned.apply_to(model).mix.bias is None


class Undifferentiable(nn.Module):
    """A block, a layer beside it, and a square root, whose derivative at zero is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.relu(self.up(x)))
        return torch.sqrt(nn.functional.relu(x + self.inner(x)))


def test_a_model_without_finite_derivatives_is_fitted_all_the_same() -> None:
    model = randomize(Undifferentiable())
    model.requires_grad_(False)
    pruned = vbpfx.prune(model, [torch.randn(30, 8) for _ in range(5)], ratio=0.5, progress=False)
    assert all(bool(p.isfinite().all()) for p in pruned.graph_module.parameters())
    assert pruned.plan.refitted == ("inner.weight",)


def test_influence_is_the_gradient() -> None:
    """The influence of rows and the metric follow the gradient of the output, computed by hand."""
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1)))
    batch = torch.randn(300, 5)
    captured = vbpfx.capture(model, batch[:4])
    layer = next(la for la in vbpfx.find_blocks(captured).layers if la.weight == "2.weight")
    gradients = Gradients(captured, [layer])
    gradients.add(Inputs((batch,), {}))
    found = gradients.influences(temper=1.0, power=1.0)[layer.node]
    with torch.no_grad():
        h = model[:3](batch).double()
        gradient = model[4].weight.double() * (1 - torch.tanh(h) ** 2)
    # Each row has a random factor, the square of a normal number with mean one; the mean ratio averages these factors.
    squares = gradient.square().sum(1)
    ratio = (found.weights[0].flatten().double() - 1e-3) / squares
    assert 0.8 < float(ratio.mean() * squares.mean()) < 1.6
    # Only the directions of the metric are compared, because its rows are weighted by those factors.
    expected = gradient.T @ gradient
    assert found.metric is not None
    cosine = float((found.metric * expected).sum() / found.metric.norm() / expected.norm())
    assert cosine > 0.97


@pytest.mark.parametrize("samples", [None, 25, 1000])
def test_statistics_are_gathered_on_the_way_of_the_gradients(samples: int | None) -> None:
    """One pass gathers both, and nothing is missed or counted twice, even if only a few samples are kept."""
    torch.manual_seed(0)
    model = double(randomize(Residual()))
    batches = [torch.randn(10, 6, 8, dtype=torch.float64) for _ in range(8)]
    pruned = vbpfx.prune(model, batches, ratio=0.5, samples=samples, progress=False)
    assert pruned.plan.settings["reconstruction"]["samples"] == min(80, samples or 80)
    observed = vbpfx.prepare(pruned.captured, pruned.analysis)
    vbpfx.calibrate(observed, batches)
    plain = vbpfx.statistics(observed)
    for name, moments in plain.moments.items():
        for own, expected in zip(pruned.statistics.moments[name], moments, strict=True):
            assert own.count == expected.count == 480
            torch.testing.assert_close(own.mean, expected.mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(own.m2, expected.m2, rtol=1e-12, atol=1e-14)


def test_gradients_do_not_depend_on_who_else_looks() -> None:
    """A prepared graph computes the same values and therefore has the same gradients as the captured one."""
    torch.manual_seed(0)
    model = double(randomize(Residual()))
    batches = [Inputs((torch.randn(20, 6, 8, dtype=torch.float64),), {}) for _ in range(2)]
    analysis = vbpfx.find_blocks(vbpfx.capture(model, batches[0].args[0][:4]))
    found = []
    for graph_module in (None, vbpfx.prepare(analysis.captured, analysis)):
        gradients = Gradients(analysis.captured, analysis.layers, graph_module)
        for batch in batches:
            gradients.add(batch)
        found.append(gradients.influences())
    assert list(found[0]) == list(found[1]) != []
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(torch.cat(one.weights), torch.cat(other.weights))
        assert one.metric is not None
        assert other.metric is not None
        assert torch.equal(one.metric, other.metric)


def test_an_output_of_one_number_has_gradients() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.mlp(x)
            return y, y.square().sum()

    captured = vbpfx.capture(randomize(Summed()).double(), torch.randn(4, 6, dtype=torch.float64))
    gradients = Gradients(captured, vbpfx.find_blocks(captured).layers)
    gradients.add(captured.inputs)  # the standard deviation of one number is NaN, of which torch would warn
    assert all(bool(square.isfinite().all()) for found in gradients.squares.values() for square in found)
    assert any(bool((square > 0).any()) for found in gradients.squares.values() for square in found)


class FromOneVector(nn.Module):
    """A gate that is computed from one vector: a parameter, or the mean of all samples."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.rest = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4))
        self.query, self.of_data = nn.Parameter(torch.randn(8)), of_data

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x * self.gate(x.mean(0) if self.of_data else self.query))


@pytest.mark.parametrize("of_data", [False, True])
def test_hidden_values_of_one_axis(of_data: bool) -> None:
    model = randomize(FromOneVector(of_data)).double()
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(40, 8, generator=generator, dtype=torch.float64) for _ in range(6)]
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False, min_width=8)
    assert ("gate" in pruned.plan.widths) == of_data  # blocks that read no data are left out
    found = vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, data[0], tolerance=1e-9)
    assert found.effect > 1e-6


@pytest.mark.parametrize("time_first", [False, True])
def test_influence_keeps_rows_in_the_order_of_the_value(time_first: bool) -> None:
    """Gradients are computed for a few samples at a time, and their weights keep the samples' order in the batch."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            if time_first:
                x = x.transpose(0, 1)
            return torch.tanh((x * x + self.block(x)).sum(0 if time_first else 1))

    model = randomize(Sequence())
    batch = torch.randn(40, 3, 5)
    captured = vbpfx.capture(model, batch[:4])
    layer = next(la for la in vbpfx.find_blocks(captured).layers if la.weight == "block.2.weight")
    whole, parts = Gradients(captured, [layer]), Gradients(captured, [layer])
    whole.add(Inputs((batch,), {}), 0)
    for start in (0, 16, 32):
        parts.add(Inputs((batch[start : start + 16],), {}), start)
    expected = torch.cat(parts.squares[layer.node], 1 if time_first else 0)
    torch.testing.assert_close(whole.squares[layer.node][0], expected, rtol=0, atol=0)
    assert expected.shape == ((3, 40, 1) if time_first else (40, 3, 1))


class Tower(nn.Module):
    """Two blocks, one of them gated, on a stream of width 6."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
        self.up, self.gate, self.down = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Siamese(nn.Module):
    """Both inputs go through one tower, which is called twice or once on both together."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.tower, self.twice = Tower(), twice

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.twice:
            return self.tower(a), self.tower(b)
        y = self.tower(torch.cat([a, b]))
        return y[: a.shape[0]], y[a.shape[0] :]


class Again(nn.Module):
    """One tower is called three times in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(torch.tanh(self.tower(torch.tanh(self.tower(x)))))


def _pairs(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(40, 6, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(), draw() + 3) for _ in range(count)]


def _lost(pruned: vbpfx.Pruned, model: nn.Module, batch: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        ours, dense = (torch.cat(pytree.tree_leaves(n(*batch))) for n in (pruned.graph_module, model))
    return float((ours - dense).norm() / (dense - dense.mean(0)).norm())


def test_a_block_that_is_called_twice_is_fitted_as_if_it_were_called_once_on_both(tmp_path: Path) -> None:
    two, one = (randomize(Siamese(twice)).double() for twice in (True, False))
    one.load_state_dict(two.state_dict())
    (test,) = _pairs(1, seed=1)
    auto = {m: vbpfx.prune(m, _pairs(8), ratio=0.5, progress=False, allocation="equal") for m in (two, one)}
    simple = vbpfx.prune(two, _pairs(8), ratio=0.5, progress=False, method="vbp", allocation="equal")
    twice, once, vbp = _lost(auto[two], two, test), _lost(auto[one], one, test), _lost(simple, two, test)
    assert twice == pytest.approx(once, rel=0.1)
    assert twice < 0.6 * vbp
    pruned = auto[two]
    (fitted,) = (c for c in pruned.plan.corrections if c.layer.weight == "tower.one.2.weight")
    assert len(fitted.calls) == 2
    # The oracle checks both calls of every layer in the graph, in the model's own class, and after loading from a file.
    for network in (pruned.graph_module, pruned.apply_to(two)):
        found = vbpfx.verify(pruned.captured, network, pruned.plan, test, tolerance=1e-9)
        assert found.effect > 1e-3
    pruned.save(tmp_path / "saved")
    plan = load_plan(tmp_path / "saved")
    vbpfx.verify(pruned.captured, vbpfx.convert(pruned.captured, plan), plan, test, tolerance=1e-9)
    assert plan_digest(plan) == plan_digest(pruned.plan)


def test_predictions_of_blocks_that_are_called_twice_are_those_of_both_calls_together() -> None:
    """B = C_PK (C_KK + lambda s I)^-1 and a = mu_P - B mu_K, over the rows of both calls."""
    model = randomize(Siamese(True)).double()
    analysis = vbpfx.find_blocks(vbpfx.capture(model, _pairs(1)[0]))
    observed = vbpfx.prepare(analysis.captured, analysis, covariance=1e9)  # uses every row
    vbpfx.calibrate(observed, _pairs(8))
    plan = vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=0.5, allocation="equal")
    entry = next(entry for entry in plan.blocks if entry.block.name == "tower.one")
    with torch.no_grad():
        h = model.tower.one[:2](torch.cat([x for pair in _pairs(8) for x in pair])).numpy()
    c, mu = np.cov(h.T), h.mean(0)
    kept, pruned = list(entry.kept), list(entry.pruned)
    within, across = c[np.ix_(kept, kept)], c[np.ix_(pruned, kept)]
    scale = np.diag(within).mean()
    tried = [across @ np.linalg.inv(within + penalty * scale * np.eye(len(kept))) for penalty in PENALTIES[:-1]]
    for constants, prediction in zip(entry.constants, entry.predictions, strict=True):
        nearest = min(tried, key=lambda b: np.abs(b - prediction.numpy()).max())
        np.testing.assert_allclose(prediction, nearest, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(constants, mu[pruned] - nearest @ mu[kept], rtol=1e-6, atol=1e-9)


def test_a_block_whose_calls_follow_each_other_is_predicted_from_all_of_them() -> None:
    """The inputs of all calls are not known before the first call, so the one-shot plan with its predictions is kept."""
    model = randomize(Again()).double()
    data = [a for a, _ in _pairs(8)]
    pruned, simple = (
        vbpfx.prune(model, data, ratio=0.3, progress=False, method=m, allocation="equal") for m in ("auto", "vbp")
    )
    assert {len(entry.predictions) for entry in pruned.plan.blocks} == {3}
    assert all(b is not None for entry in pruned.plan.blocks for b in entry.predictions)
    found = vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, data[0], tolerance=1e-9)
    assert found.effect > 1e-3
    test = (_pairs(1, seed=1)[0][0],)
    assert _lost(pruned, model, test) < _lost(simple, model, test)


@pytest.mark.parametrize("model", [Siamese(True), Siamese(False), Again()], ids=["siamese", "once", "again"])
def test_calls_of_one_layer_stand_side_by_side(model: nn.Module) -> None:
    inputs = _pairs(1)[0]
    analysis = vbpfx.find_blocks(vbpfx.capture(model.double(), inputs if isinstance(model, Siamese) else inputs[0]))
    order = schedule(analysis)
    position = {node.name: n for n, node in enumerate(order.captured.graph_module.graph.nodes)}
    assert position.keys() == analysis.captured.nodes.keys()
    order.captured.graph_module.graph.lint()  # every value is computed before it is read
    for calls in order.layers:
        first = position[calls[0].node]
        assert [position[call.node] for call in calls] == [*range(first, first + len(calls))]
    expected = {"siamese": 2, "once": 1}
    if isinstance(model, Again):
        assert order.layers == ()
    else:
        assert [len(calls) for calls in order.layers] == [expected["siamese" if model.twice else "once"]] * 5
        assert [calls[0].weight for calls in order.layers] == sorted({layer.weight for layer in analysis.layers}, key=lambda w: min(position[la.node] for la in analysis.layers if la.weight == w))  # fmt: skip


def test_what_is_changed_in_place_keeps_its_order() -> None:
    class InPlace(Siamese):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.tower(torch.relu_(2 * a)), self.tower(torch.relu_(2 * b))

    model = randomize(InPlace(True)).double()
    analysis = vbpfx.find_blocks(vbpfx.capture(model, _pairs(1)[0]))
    assert schedule(analysis).layers == ()
    pruned = vbpfx.prune(model, _pairs(4), ratio=0.5, progress=False)
    vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, _pairs(1)[0], tolerance=1e-9)


def test_one_weight_takes_one_prediction() -> None:
    model = randomize(Siamese(True)).double()
    plan = vbpfx.prune(model, _pairs(4), ratio=0.5, progress=False, allocation="equal", reconstruct=False).plan
    entry = plan.blocks[0]
    with pytest.raises(vbpfx.ArtifactError, match="one weight can take only one"):
        dataclasses.replace(entry, predictions=(entry.predictions[0], 2 * entry.predictions[0]))


def test_gradients_of_many_samples_at_once_are_those_of_each_alone() -> None:
    torch.manual_seed(1)
    model = randomize(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 4))).double()
    data = torch.randn(300, 3, dtype=torch.float64)
    captured = vbpfx.capture(model, data[:4])
    (layer,) = (c for block in vbpfx.find_blocks(captured).blocks for c in block.consumers if c.weight == "2.weight")
    gradients = Gradients(captured, [layer], at_once=256, seed=5)
    gradients.add(Inputs((data,), {}))
    product, squares = torch.zeros(2, 2, dtype=torch.float64), []
    for start in (0, 256):  # each part has one random direction
        part = data[start : start + 256]
        with torch.no_grad():
            outputs = model(part)
        drawn = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5 + start))
        for x, direction in zip(part, drawn.double() / outputs.std(), strict=True):
            y = model[:3](x).detach().requires_grad_()
            (g,) = torch.autograd.grad(model[3:](y) @ direction, y)
            product += torch.outer(g, g)
            squares.append(g.square().sum())
    torch.testing.assert_close(gradients.products[layer.node], product, rtol=1e-10, atol=1e-12)
    (found,) = gradients.squares[layer.node]
    torch.testing.assert_close(found[:, 0], torch.stack(squares).float(), rtol=1e-6, atol=1e-9)  # stored in float32


def test_rows_in_larger_parts_are_the_same_rows() -> None:
    generator = torch.Generator().manual_seed(2)

    def part(rows: int, held: bool) -> Rows:
        x, t = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (5, 3))
        return Rows(x, t, torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1, held)

    parts = [part(n, held) for n in (4, 7, 1, 12, 3) for held in (False, True)]
    joined = list(in_larger_parts(iter(parts), 10))
    centres = (torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    one_by_one, together = Sums(centres), Sums(centres)
    for rows in parts:
        one_by_one.add(*rows)
    for rows in joined:
        together.add(*rows)
    for held in (False, True):
        before, after = ([rows for rows in some if rows.held_out == held] for some in (parts, joined))
        assert [len(rows.x) for rows in after] == [11, 13, 3]
        for name in ("x", "t", "weights"):
            assert torch.equal(*(torch.cat([getattr(rows, name) for rows in some]) for some in (before, after)))
    for a, b in ((one_by_one.fitted, together.fitted), (one_by_one.held_out, together.held_out)):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(dataclasses.astuple(a), dataclasses.astuple(b), rtol=1e-12, atol=1e-13)
