"""Sensitivities and the allocation by them, against computations by hand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.measurement.sensitivity import _drawn_together as _drawn
from vbpfx.outputs.divergence import divergence
from vbpfx.planning.allocation import ALLOCATIONS, Standing
from vbpfx.planning.importance import Scoring
from vbpfx.planning.scores import score

SHARE = 0.5
DATA = torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Two(nn.Module):
    """Two residual blocks of widths 20 and 12, the second with a tenth of the effect of the first, and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
        self.second = nn.Sequential(nn.Linear(18, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.head(x + 0.1 * self.second(torch.cat([x, x, x], -1)))


def _two(head: nn.Module) -> nn.Module:
    return randomize(Two(head)).double()


def _stages(model: nn.Module) -> tuple[vbpfx.Analysis, vbpfx.Statistics]:
    analysis = vbpfx.find_blocks(vbpfx.capture(model, DATA[:4]))
    observed = vbpfx.prepare(analysis.captured, analysis)
    vbpfx.calibrate(observed, [DATA])
    return analysis, vbpfx.statistics(observed)


def _masked(model: nn.Module, which: str, pruned: list[int], x: Tensor) -> np.ndarray:
    """Return the output of the model with the pruned neurons of one block at their mean over the data."""

    def block(name: str, value: Tensor) -> Tensor:
        layers = getattr(model, name)
        hidden = layers[1](layers[0](value))
        if name == which:
            hidden[:, pruned] = hidden[:, pruned].mean(0)
        return layers[2](hidden)

    with torch.no_grad():
        x = x + block("first", x)
        return model.head(x + 0.1 * block("second", torch.cat([x, x, x], -1))).numpy()


def _by_hand(dense: np.ndarray, narrowed: np.ndarray, logits: bool) -> np.ndarray:
    """Return the output difference d of every sample."""
    if not logits:
        return ((narrowed - dense) ** 2).sum(1) / 2
    q, r = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (dense, narrowed))
    return (q * np.log(q / r)).sum(1)


def _drawn_together(found: list[np.ndarray]) -> list[float]:
    logs = [np.log(d.mean()) for d in found]
    chance = [d.var(ddof=1) / len(d) / d.mean() ** 2 for d in found]
    beyond = max(0.0, np.var(logs) - np.mean(chance))
    return [
        float(np.exp(np.mean(logs) + beyond / (beyond + e + 0.25) * (v - np.mean(logs))))
        for v, e in zip(logs, chance, strict=True)
    ]


@pytest.mark.parametrize(("head", "logits"), [(nn.Linear(6, 5), True), (nn.Tanh(), False)], ids=["logits", "values"])
def test_each_block_is_measured_alone(head: nn.Module, logits: bool) -> None:
    model = _two(head)
    analysis, statistics = _stages(model)
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
    found = vbpfx.sensitivities(analysis, plan, [Inputs((DATA,), {})])
    dense = _masked(model, "", [], DATA)
    few = len(DATA) // 4  # half of a forward pass for two blocks
    narrowed = [_masked(model, entry.block.name, list(entry.pruned), DATA) for entry in plan.blocks]
    expected = _drawn_together([_by_hand(dense[:few], n[:few], logits) for n in narrowed])
    assert list(found) == [entry.block.name for entry in plan.blocks]
    assert list(found.values()) == pytest.approx(expected, rel=1e-9)
    assert expected[0] > 2 * expected[1]


def test_blocks_that_chance_tells_apart_count_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    loud = [torch.rand(8, generator=generator, dtype=torch.float64) ** 3 for _ in range(6)]
    apart, drawn = np.ptp(np.log([d.mean().item() for d in loud])), np.ptp(np.log(_drawn(loud)))
    assert 0 < drawn < 0.5 * apart
    clear = [100.0**i * (1 + 0.01 * d) for i, d in enumerate(loud)]
    assert np.log(_drawn(clear)) == pytest.approx([np.log(d.mean().item()) for d in clear], rel=1e-2, abs=0.1)


def test_views_of_logits_are_logits() -> None:
    plain = _two(nn.Linear(6, 5))
    flat = copy.deepcopy(plain)
    flat.head = nn.Sequential(flat.head, nn.Flatten())
    found = []
    for model in (flat, plain):
        analysis, statistics = _stages(model)
        plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
        found.append(vbpfx.sensitivities(analysis, plan, [Inputs((DATA,), {})]))
    assert list(found[0].values()) == pytest.approx(list(found[1].values()), rel=1e-12)


def test_masked_logits_do_not_count() -> None:
    class Masking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.tensor([False, True, False, False, False, False]), -torch.inf)

    analysis, statistics = _stages(_two(Masking()))
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
    assert all(np.isfinite(v) and v > 0 for v in vbpfx.sensitivities(analysis, plan, [Inputs((DATA,), {})]).values())


def test_every_output_counts_once() -> None:
    """One number per sample is not a logit, an output without a batch axis counts for all samples, integers do not count."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"number": self.number(x), "mean": x.mean(0), "flat": x.sum(1), "class": x.argmax(1)}

    model = _two(Many())
    analysis, statistics = _stages(model)
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
    batch = Inputs((DATA[:15],), {})
    found = vbpfx.sensitivities(analysis, plan, [batch])
    small = [vbpfx.convert(analysis.captured, dataclasses.replace(plan, blocks=(entry,))) for entry in plan.blocks]
    with torch.no_grad():
        dense = model(DATA[:8])
        moved = []
        for network in small:
            by = {name: (value - dense[name]).numpy() for name, value in network(DATA[:8]).items()}
            moved.append((by["number"][:, 0] ** 2 + (by["mean"] ** 2).mean() + by["flat"] ** 2) / 2)
    assert list(found.values()) == pytest.approx(_drawn_together(moved), rel=1e-9)


@pytest.mark.parametrize("given", [{"first": 30.0, "second": 0.05}, {"first": 1.0, "second": 1.0}])
@pytest.mark.parametrize("budget", [{"ratio": 0.4}, {"macs": 0.5}])
def test_the_allocation_is_its_formula(budget: dict[str, Any], given: dict[str, float]) -> None:
    """Neurons are ranked by s_j / s_k (s_k D / (S c))^(1/4) over all blocks."""
    model = _two(nn.Linear(6, 5))
    analysis, statistics = _stages(model)
    options: dict[str, Any] = {"criterion": "output_variance", "compensation": "mean", "min_width": 1}
    plan = vbpfx.make_plan(analysis, statistics, sensitivity=given, allocation="sensitivity", **options, **budget)
    per_neuron = {"first": 12, "second": 24}  # multiplications per neuron: 6 or 18 in, 6 out
    dense = 20 * 12 + 12 * 24 + 6 * 5
    share = budget.get("ratio") or (1 - budget["macs"]) * dense / (20 * 12 + 12 * 24)
    ranked = []
    with torch.no_grad():
        x, scores = DATA, {}
        for name, scale in (("first", 1.0), ("second", 0.1)):
            layers = getattr(model, name)
            hidden = layers[1](layers[0](x if name == "first" else torch.cat([x, x, x], -1)))
            scores[name] = (hidden.var(0) * layers[2].weight.square().sum(0)).numpy()
            x = x + scale * layers[2](hidden)
    for name, s in scores.items():
        lowest = np.sort(s)[: max(1, round(share * len(s)))]
        cost = 1.0 if "ratio" in budget else per_neuron[name]
        marginal = lowest[-1] * given[name] / (lowest.sum() * cost)
        ranked += [(v / lowest[-1] * marginal**0.25, name) for v in np.sort(s)[:-1]]
    removed = plan.removed
    expected = [name for _, name in sorted(ranked)[:removed]]
    widths = {"first": 20 - expected.count("first"), "second": 12 - expected.count("second")}
    assert plan.widths == widths
    assert (widths["first"] / 20 > widths["second"] / 12) or given["first"] == given["second"]
    if "ratio" in budget:
        assert removed == round(0.4 * 32)


def test_alike_blocks_give_alike_shares() -> None:
    """If removing one more neuron has the same cost in every block, the shares are equal."""
    analysis, statistics = _stages(_two(nn.Linear(6, 5)))
    equal = vbpfx.make_plan(analysis, statistics, ratio=SHARE, allocation="equal")
    given = {}
    for block in analysis.blocks:
        s = score("greedy_obs", Scoring(block, statistics.moments[block.name], analysis.captured.reference, SHARE, 60))
        lowest = s.sort().values[: block.width // 2]
        given[block.name] = float(lowest.sum() / lowest[-1])
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, sensitivity=given)
    assert plan.settings["allocation"] == "sensitivity"
    assert plan.widths == equal.widths == {"first": 10, "second": 6}


@pytest.mark.parametrize(
    ("options", "width"), [({"ratio": 0.3}, 5), ({"ratio": 0.3, "round_to": 4}, 5), ({"ratio": 0.01}, 1)]
)
def test_blocks_are_measured_at_the_share_of_all(options: dict[str, Any], width: int) -> None:
    """Each block is measured with the same share removed, independent of budget and rounding."""
    model = randomize(Parallel()).double()
    for twin in model.equal[1:]:
        twin.load_state_dict(model.equal[0].state_dict())
    analysis, statistics = _stages(model)
    seen: list[vbpfx.Plan] = []

    def measure(plan: vbpfx.Plan) -> dict[str, float]:
        seen.append(plan)
        return vbpfx.sensitivities(analysis, plan, [Inputs((DATA,), {})])

    plan = vbpfx.make_plan(analysis, statistics, sensitivity=measure, method="auto", **options)
    assert [entry.block.width - len(entry.kept) for entry in seen[0].blocks] == [width] * 4
    widths = [plan.widths.get(block.name, 16) for block in analysis.blocks]
    assert max(widths) - min(widths) <= options.get("round_to", 1)


def test_auto_measures_and_says_so() -> None:
    model = _two(nn.Linear(6, 5))
    pruned = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False)
    assert pruned.plan.settings["allocation"] == "sensitivity"
    assert pruned.plan.widths["first"] > 10  # more than half of 20, because the other block has a tenth of the effect
    assert pruned.plan.removed == 16
    one_shot = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False, method="vbp", allocation="sensitivity")
    assert one_shot.plan.widths["first"] > 10
    analysis, statistics = _stages(model)
    assert vbpfx.make_plan(analysis, statistics, ratio=SHARE).settings["allocation"] == "equal"
    with pytest.raises(BudgetError, match="pass sensitivity="):
        vbpfx.make_plan(analysis, statistics, ratio=SHARE, allocation="sensitivity")


class Parallel(nn.Module):
    """Four equal blocks and others read one input, and all outputs are summed."""

    def __init__(self, *others: nn.Module) -> None:
        super().__init__()
        one = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.equal = nn.ModuleList(copy.deepcopy(one) for _ in range(4))
        self.others = nn.ModuleList(others)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + sum(block(x) for block in [*self.equal, *self.others]))


class Gated(nn.Module):
    """A block behind a saturated gate, which has no effect on the output although its weights are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(x) + 1000) - 1


def _zero() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return layers


def _parallel(*others: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    return Parallel(*others).double().eval()


@pytest.mark.parametrize("dead", [_zero, Gated], ids=["weights of zero", "saturated gate"])
@pytest.mark.parametrize("budget", [{"ratio": 0.4}, {"macs": 0.6}])
def test_a_block_that_moves_nothing_decides_for_no_other(dead: Any, budget: dict[str, float]) -> None:
    """It is narrowed as far as allowed, and four equal blocks lose the same number of neurons."""
    plan = vbpfx.prune(_parallel(dead()), [DATA], progress=False, **budget).plan
    alike = [width for name, width in plan.widths.items() if name.startswith("equal")]
    (free,) = (width for name, width in plan.widths.items() if name.startswith("others"))
    assert free == 1  # the floor, a sixteenth of 16
    assert len(alike) == 4
    assert max(alike) - min(alike) <= 1
    if "ratio" in budget:
        assert sum(alike) == 80 - round(0.4 * 80) - free


def test_a_block_that_moves_nothing_costs_nothing_and_leaves_the_others_as_they_are() -> None:
    found = []
    for others in ((), (Gated(),), (_zero(), Gated())):
        analysis, statistics = _stages(_parallel(*others))
        plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
        moved = vbpfx.sensitivities(analysis, plan, [Inputs((DATA[:8],), {})])
        assert [d for name, d in moved.items() if name.startswith("others")] == [0.0] * len(others)
        found.append([d for name, d in moved.items() if name.startswith("equal")])
        assert min(found[-1]) > 0
    for equal in found[1:]:
        assert equal == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("constant", [False, True], ids=["dead blocks", "constant output"])
def test_where_no_block_moves_anything_shares_are_equal(constant: bool) -> None:
    model = _parallel(_zero())
    for block in model.equal:
        block.load_state_dict(model.others[0].state_dict())
    if constant:

        class Constant(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sigmoid(x + 1000)

        model = nn.Sequential(randomize(Parallel(Gated())).double(), Constant())
    plan = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False).plan
    assert list(plan.widths.values()) == [8] * 5


def test_one_block_alone_meets_its_budget() -> None:
    for block in (_zero(), randomize(_zero())):
        plan = vbpfx.prune(nn.Sequential(block, nn.Tanh()).double(), [DATA], ratio=0.25, progress=False).plan
        assert list(plan.widths.values()) == [12]


@pytest.mark.parametrize("criterion", ["greedy_obs", "variance", "obs", "output_variance"])
def test_neurons_that_never_fire_say_nothing_of_the_rest_of_their_block(criterion: str) -> None:
    """Half of a block is constant and free to remove; the other half must not become cheaper because of it."""
    half = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    model = randomize(Parallel(half)).double()
    with torch.no_grad():
        half[0].bias[:8] = -1000.0
        half[2].weight *= 3
        for block in model.equal:
            block.load_state_dict(model.equal[0].state_dict())
    options: dict[str, Any] = {"criterion": criterion, "allocation": "sensitivity", "compensation": "mean"}
    plan = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False, **options).plan
    entry = next(entry for entry in plan.blocks if entry.block.name.startswith("others"))
    assert {*range(8)} <= {*entry.pruned}  # the constant neurons are removed
    alike = [width for name, width in plan.widths.items() if name.startswith("equal")]
    assert len(entry.kept) >= min(alike) - 1  # the rest loses no more than the other blocks


def test_what_is_not_finite_names_the_block() -> None:
    analysis, statistics = _stages(_two(nn.Linear(6, 5)))
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
    first, second = plan.blocks
    broken = dataclasses.replace(second, constants=(torch.full_like(second.constants[0], torch.inf),))
    with pytest.raises(CalibrationError, match=r"block second: with this block alone narrowed.*exclude='second'"):
        vbpfx.sensitivities(analysis, dataclasses.replace(plan, blocks=(first, broken)), [Inputs((DATA,), {})])
    with pytest.raises(CalibrationError, match="there are none"):
        vbpfx.sensitivities(analysis, plan, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_sensitivity_that_is_no_cost_is_an_error(value: float) -> None:
    analysis, statistics = _stages(_two(nn.Linear(6, 5)))
    with pytest.raises(BudgetError, match=f"the sensitivity of block second is {value}"):
        vbpfx.make_plan(analysis, statistics, ratio=SHARE, sensitivity={"first": 1.0, "second": value})
    free = vbpfx.make_plan(analysis, statistics, ratio=0.35, sensitivity={"first": 1.0, "second": 0.0})
    assert free.widths["second"] == 1


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
@pytest.mark.parametrize("rate", [0.0, 1e-300, 1e300])
@pytest.mark.parametrize(
    "scores",
    [[0.0] * 4, [0, 0, 1, 2], [-3, -1, 0, 5], [-5, -4, -3, -2], [1e-320, 2e-320, 1, 2], [1e300, 2e300, 3, 4], [-1e308, 1e308, 0, 1]],
    ids=str,
)  # fmt: skip
def test_what_ranks_is_finite_and_keeps_the_order_of_a_block(allocation: str, rate: float, scores: list[float]) -> None:
    given = torch.tensor(scores, dtype=torch.float64)
    found = ALLOCATIONS[allocation](given, Standing(cost=3.0, share=SHARE, rate=rate))
    assert bool(found.isfinite().all())
    order = given.argsort(stable=True)
    assert bool((found[order].diff() >= 0).all())


def _divergence_by_hand(q: list[float], p: list[float]) -> float:
    """Return the sum of p ln(p / q) over classes with p > 0."""
    dense, narrowed = (np.exp(np.array(v)) / np.exp(np.array(v)).sum() for v in (p, q))
    there = dense > 0
    with np.errstate(divide="ignore"):
        return float((dense[there] * np.log(dense[there] / narrowed[there])).sum())


INF = float("inf")


@pytest.mark.parametrize(
    ("narrowed", "dense"),
    [
        ([0.3, -1.0, 2.0], [0.1, 0.2, -0.7]),
        ([0.0, -INF, 1.0], [0.0, -INF, 1.0]),
        ([0.5, -INF, 1.0], [0.0, -INF, 1.0]),
        ([0.5, 3.0, 1.0], [0.0, -INF, 1.0]),
        ([0.0, -INF, 1.0], [0.0, 0.5, 1.0]),
    ],
    ids=["finite", "equal", "masked alike", "masked in the dense one", "masked in the narrowed one"],
)
def test_divergence_where_classes_are_ruled_out(narrowed: list[float], dense: list[float]) -> None:
    q = torch.tensor([narrowed], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([dense], dtype=torch.float64)
    expected = _divergence_by_hand(narrowed, dense)
    found = divergence(q, p)
    assert found.tolist() == [pytest.approx(expected, rel=1e-12, abs=1e-15)]
    if np.isfinite(expected):
        found.sum().backward()
        torch.testing.assert_close(q.grad, q.detach().softmax(-1) - p.softmax(-1), rtol=1e-12, atol=1e-15)


def test_divergence_of_equal_rows_is_nothing_whatever_they_hold() -> None:
    rows = torch.tensor([[-INF, -INF], [INF, 0.0], [INF, INF]], requires_grad=True)
    found = divergence(rows, rows.detach())
    assert found.tolist() == [0.0, 0.0, 0.0]
    found.sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[0.0, 0.0]] * 3
    nan = torch.tensor([[float("nan"), 0.0]])
    assert divergence(nan, nan).isnan().all()  # NaN never counts as agreement


def test_classes_that_the_bias_rules_out() -> None:
    """A bias sets the logits of some classes to -inf; only the other classes are compared."""
    whole = _two(nn.Linear(6, 5))
    with torch.no_grad():
        whole.head.bias[3] = -INF
    without = copy.deepcopy(whole)
    without.head = nn.Linear(6, 4).double()
    with torch.no_grad():
        stay = [0, 1, 2, 4]
        without.head.weight.copy_(whole.head.weight[stay])
        without.head.bias.copy_(whole.head.bias[stay])
    found = []
    for model in (whole, without):
        analysis, statistics = _stages(model)
        plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
        found.append(list(vbpfx.sensitivities(analysis, plan, [Inputs((DATA,), {})]).values()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize(
    "parts",
    [
        lambda y: y.chunk(2, -1),
        lambda y: torch.split(y, [2, 4], -1),
        lambda y: y.unbind(1),
        lambda y: {"both": y.chunk(2, 1), "rest": (2 * y,)},
    ],
    ids=["chunk", "split", "unbind", "nested"],
)
def test_outputs_that_are_parts_of_one_another(parts: Any) -> None:
    """For outputs such as a mean and a spread, the difference is half the squared distance, summed over the parts."""

    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return parts(x)

    model = _two(nn.Sequential(nn.Linear(6, 6), Parts()))
    analysis, statistics = _stages(model)
    plan = vbpfx.make_plan(analysis, statistics, ratio=SHARE, method="vbp", allocation="equal")
    found = vbpfx.sensitivities(analysis, plan, [Inputs((DATA[:8],), {})])
    moved = []
    with torch.no_grad():
        dense = tree_leaves(model(DATA[:8]))
        for entry in plan.blocks:
            small = vbpfx.convert(analysis.captured, dataclasses.replace(plan, blocks=(entry,)))
            apart = zip(tree_leaves(small(DATA[:8])), dense, strict=True)
            moved.append(sum((a - b).square().reshape(8, -1).sum(1) / 2 for a, b in apart).numpy())
    assert list(found.values()) == pytest.approx(_drawn_together(moved), rel=1e-9)
    assert vbpfx.prune(model, [DATA], ratio=SHARE, progress=False).plan.removed == 16


def test_batches_whose_first_axis_is_time() -> None:
    """A block has the same sensitivity in a batch-first and in a time-first version of a network."""

    class Steps(nn.Module):
        def __init__(self, time: int) -> None:
            super().__init__()
            self.time, self.fc1, self.fc2 = time, nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            total = sum(x.select(self.time, step) for step in range(7))
            return self.fc2(self.fc1(total).tanh())

    model, data = randomize(Steps(1)).double(), DATA.repeat(7, 1, 1).transpose(0, 1).contiguous()
    data = data * torch.arange(1.0, 8.0)[:, None].to(data)
    other = Steps(0).double()
    other.load_state_dict(model.state_dict())
    found = []
    for network, x in ((model, data), (other, data.transpose(0, 1).contiguous())):
        pruned = vbpfx.prune(network, [x], ratio=SHARE, method="vbp", progress=False)
        found.append(vbpfx.sensitivities(pruned.analysis, pruned.plan, [Inputs((x,), {})]))
    assert found[0].keys() == found[1].keys() == {"fc1->fc2"}
    assert found[1]["fc1->fc2"] == pytest.approx(found[0]["fc1->fc2"], rel=1e-9)
