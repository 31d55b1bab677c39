"""Sensitivity and the allocation by it, against what is written out by hand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import BudgetError
from vbpfx.measurement.sensitivity import _drawn_together as _drawn
from vbpfx.planning.importance import Scoring, score

SHARE = 0.5
DATA = torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Two(nn.Module):
    """Two residual blocks of widths 20 and 12, the second with a tenth of the first's effect, and a head of logits."""

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
    """The model with those neurons of one block at their mean over the data."""

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
    """d of every sample."""
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
    few = len(DATA) // 4  # two blocks, half a pass
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
    """A number a sample is no logit, an output that is not one of every sample counts for all, and integers do not."""

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
    """s_j / s_k (s_k D / (S c))^(1/4), ranked over all neurons."""
    model = _two(nn.Linear(6, 5))
    analysis, statistics = _stages(model)
    options: dict[str, Any] = {"criterion": "output_variance", "compensation": "mean", "min_width": 1}
    plan = vbpfx.make_plan(analysis, statistics, sensitivity=given, allocation="sensitivity", **options, **budget)
    per_neuron = {"first": 12, "second": 24}  # multiplications: 6 or 18 in, 6 out
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
    """Where one more neuron costs the output the same in every block, shares are equal."""
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


def test_auto_measures_and_says_so() -> None:
    model = _two(nn.Linear(6, 5))
    pruned = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False)
    assert pruned.plan.settings["allocation"] == "sensitivity"
    assert pruned.plan.widths["first"] > 10  # of 20; the other block's effect is a tenth
    assert pruned.plan.removed == 16
    one_shot = vbpfx.prune(model, [DATA], ratio=SHARE, progress=False, method="vbp", allocation="sensitivity")
    assert one_shot.plan.widths["first"] > 10
    analysis, statistics = _stages(model)
    assert vbpfx.make_plan(analysis, statistics, ratio=SHARE).settings["allocation"] == "equal"
    with pytest.raises(BudgetError, match="pass sensitivity="):
        vbpfx.make_plan(analysis, statistics, ratio=SHARE, allocation="sensitivity")
