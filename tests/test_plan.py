"""VBP's selection and the budgets against brute force."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize, stages
from torch import nn

import vbpfx
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.planning import select
from vbpfx.planning.budget import mac_cost, parameter_cost
from vbpfx.planning.options import in_words
from vbpfx.report.make import count_parameters


def _network() -> nn.Module:
    """Hidden widths 24, 40 and 16 behind different activations; the last consumer has no bias."""
    return randomize(
        nn.Sequential(
            nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 8), nn.Softmax(-1), nn.Linear(8, 40), nn.ReLU(),
            nn.Linear(40, 8), nn.Softmax(-1), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5, bias=False),
        )
    )  # fmt: skip


DATA = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))


def _activations(model: nn.Module) -> dict[str, np.ndarray]:
    x, found = DATA, {}
    for i, layer in enumerate(model):
        if i in (2, 6, 10):
            found[f"{i - 2}->{i}"] = x.detach().double().numpy()
        x = layer(x)
    return found


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.8])
def test_vbp_is_the_published_selection(ratio: float) -> None:
    model = _network()
    plan = stages(model, DATA, ratio=ratio, method="vbp").plan
    hidden = _activations(model)
    # One global ranking of the raw sample variances: the lowest fraction is removed, but never a block's last neuron.
    variances = [h.var(0, ddof=1) for h in hidden.values()]
    ranking = sorted(
        (float(v), block, i) for block, vs in enumerate(variances) for i, v in enumerate(vs) if i != vs.argmax()
    )
    gone = {(list(hidden)[block], i) for _, block, i in ranking[: round(ratio * 80)]}
    for entry in plan.blocks:
        name = entry.block.name
        assert set(entry.pruned) == {i for block, i in gone if block == name}
        mean = hidden[name].mean(0)[list(entry.pruned)]
        np.testing.assert_allclose(entry.constants[0], mean, rtol=1e-6, atol=1e-12)
    assert plan.removed == len(gone) == round(ratio * 80)


def test_the_fold_is_the_papers_formula() -> None:
    model = _network()
    result = stages(model, DATA, ratio=0.5, method="vbp")
    for entry in result.plan.blocks:
        kept, pruned = list(entry.kept), list(entry.pruned)
        first, second = (int(i) for i in entry.block.name.split("->"))
        w1, w2 = model[first].weight, model[second].weight
        small1, small2 = result.small.get_submodule(str(first)), result.small.get_submodule(str(second))
        bias = model[second].bias.double() if model[second].bias is not None else 0.0
        assert torch.equal(small1.weight, w1[kept])
        assert torch.equal(small1.bias, model[first].bias[kept])
        assert torch.equal(small2.weight, w2[:, kept])
        # b2' = b2 + W2[:, P] mu[P], rounded once to float32.
        expected = bias + w2.double()[:, pruned] @ entry.constants[0]
        torch.testing.assert_close(small2.bias.double(), expected, rtol=6e-8, atol=1e-9)
        assert (small1.out_features, small2.in_features) == (len(kept), len(kept))


def test_ties_go_by_index() -> None:
    model = _network()
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[3]
        model[0].bias[5] = model[0].bias[3]
    result = stages(model, DATA, ratio=0.5)
    scores = result.statistics.moments["0->2"][0].variance
    order = scores.argsort(stable=True).tolist()
    assert scores[3] == scores[5]
    assert order.index(5) == order.index(3) + 1
    again = vbpfx.make_plan(result.analysis, result.statistics, ratio=0.5)
    assert [entry.kept for entry in again.blocks] == [entry.kept for entry in result.plan.blocks]


@pytest.mark.parametrize("kept", [0.55, 0.7, 0.93])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_macs_and_params_are_met_to_the_neuron(kind: str, kept: float) -> None:
    result = stages(_network(), DATA, method="vbp", **{kind: kept})

    def cost(small: torch.fx.GraphModule) -> int:
        if kind == "params":
            return count_parameters(small)
        return sum(dataclasses.replace(result.captured, graph_module=small).macs.values())

    dense = cost(result.captured.graph_module)
    assert cost(result.small) <= kept * dense
    # Keeping one more neuron of any block exceeds the budget, in particular the last one removed.
    wider = []
    for entry in result.plan.blocks:
        scores = result.statistics.moments[entry.block.name][0].variance
        back = max(entry.pruned, key=lambda i: (float(scores[i]), i))
        wider.append((float(scores[back]), entry, back))
    _, last, back = max(wider, key=lambda item: item[0])
    grown = dataclasses.replace(
        last,
        kept=tuple(sorted((*last.kept, back))),
        constants=tuple(a[[p != back for p in last.pruned]] for a in last.constants),
    )
    blocks = tuple(grown if entry is last else entry for entry in result.plan.blocks)
    assert cost(vbpfx.convert(result.captured, dataclasses.replace(result.plan, blocks=blocks))) > kept * dense


def test_costs_are_those_of_the_converted_graph() -> None:
    result = stages(_network(), DATA, ratio=0.6)
    widths = {b.name: b.width for b in result.analysis.blocks} | result.plan.widths
    measured = dataclasses.replace(result.captured, graph_module=result.small)
    assert mac_cost(result.captured, result.analysis.blocks)(widths) == sum(measured.macs.values())
    blocks = result.analysis.blocks
    assert parameter_cost(result.captured.reference, blocks)(widths) == count_parameters(result.small)


@pytest.mark.parametrize("step", [4, 8])
def test_rounding(step: int) -> None:
    result = stages(_network(), DATA, ratio=0.5, round_to=step)
    widths = {b.name: b.width for b in result.analysis.blocks} | result.plan.widths
    assert all(width % step == 0 for width in widths.values())
    assert abs(sum(widths.values()) - 40) <= step / 2
    macs = stages(_network(), DATA, macs=0.6, round_to=step)
    after = sum(dataclasses.replace(macs.captured, graph_module=macs.small).macs.values())
    assert after <= 0.6 * sum(macs.captured.macs.values())


def test_floors_hold_and_the_total_is_still_met() -> None:
    model = _network()
    with torch.no_grad():
        model[8].weight.mul_(1e-3)  # now the variances of the last block are the smallest
        model[8].bias.mul_(1e-3)
    default = stages(model, DATA, ratio=0.5, criterion="variance", allocation="global")
    assert default.plan.widths["8->10"] == 1
    assert default.plan.removed == 40
    assert default.plan.settings["at_floor"] == ["8->10"]
    wide = stages(model, DATA, ratio=0.5, criterion="variance", allocation="global", min_width=7)
    assert wide.plan.widths["8->10"] == 7
    assert wide.plan.removed == 40


@pytest.mark.parametrize("options", [{"ratio": 0.97}, {"macs": 0.01}, {"params": 0.01}])
def test_the_nearest_possible_budget_is_named_and_possible(options: dict[str, float]) -> None:
    import re

    ((kind, _),) = options.items()
    with pytest.raises(BudgetError, match=f"use {kind}=") as caught:
        stages(_network(), DATA, min_width=3, **options)
    nearest = float(re.search(rf"use {kind}=([\d.]+)", str(caught.value)).group(1))
    assert stages(_network(), DATA, min_width=3, **{kind: nearest}).plan.removed > 60


def test_include_and_exclude() -> None:
    model = _network()
    only = stages(model, DATA, ratio=0.5, include="4")
    assert list(only.plan.widths) == ["4->6"]
    assert only.plan.removed == 20
    rest = stages(model, DATA, ratio=0.5, exclude=["4->6", "8*"])
    assert list(rest.plan.widths) == ["0->2"]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_other_criteria(criterion: str) -> None:
    model = _network()
    options = {"ratio": 0.5, "method": "vbp", "criterion": criterion, "compensation": "none"}
    result = stages(model, DATA, **options)
    assert result.plan.removed == 40
    assert all(not a.any() for entry in result.plan.blocks for a in entry.constants)
    again = stages(model, DATA, **options)
    assert [e.kept for e in again.plan.blocks] == [e.kept for e in result.plan.blocks]
    if criterion == "random":
        from vbpfx.planning.criteria.random import random
        from vbpfx.planning.importance import Scoring

        drawn = [random(Scoring(block, (), model, 0.5, 50)) for block in result.analysis.blocks]
        assert not torch.equal(drawn[0][:16], drawn[1][:16])
    if criterion == "magnitude":
        norms = []
        for first, second in ((0, 2), (4, 6), (8, 10)):
            w1, w2 = model[first].weight.detach().double(), model[second].weight.detach().double()
            norms += [(float(n), f"{first}->{second}", i) for i, n in enumerate((w1**2).sum(1) + (w2**2).sum(0))]
        gone = {(name, i) for _, name, i in sorted(norms)[:40]}
        assert gone == {(e.block.name, i) for e in result.plan.blocks for i in e.pruned}


def test_convolutions_keep_multiples_of_eight_where_nothing_is_said() -> None:
    """Linear layers may have any width, and so may convolutions under the paper's method."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 72, 1), nn.ReLU(), nn.Conv2d(72, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 72), nn.ReLU(), nn.Linear(72, 4),
    )  # fmt: skip
    images = [torch.randn(32, 3, 2, 2)]

    def widths(**options: Any) -> tuple[int, ...]:
        result = stages(model, images, ratio=0.25, allocation="equal", **options)
        return tuple(result.plan.widths[b.name] for b in result.analysis.blocks)

    assert widths(round_to=1) == widths(method="vbp") == (54, 18, 54)
    assert widths() == (56, 16, 54)  # the nearest to a total of 126; 48 would miss it by 8
    assert widths(round_to=8) == (56, 16, 56)


def convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *channels, 3)):
        layers += [nn.Conv2d(before, after, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("channels", "ratio", "expected"),
    [
        ((16, 64), 0.2, (16, 48)),  # 64 of 80 are kept; a stem of 15 would be slower than one of 16
        ((16, 16), 0.25, (16, 8)),
        ((12,), 0.3, (8,)),
        ((16,), 0.7, (4,)),
        ((8,), 0.4, (4,)),  # half of a group of 8 is empty, but it is no slower
        ((4,), 0.5, (2,)),  # below one group, any width is fine
        ((16,), 0.2, (12,)),  # a width of 8 would need 4 removed neurons
        ((16,), 0.1, (14,)),
    ],
)
def test_narrow_convolutions_keep_multiples_where_something_remains_to_remove(
    channels: tuple[int, ...], ratio: float, expected: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    result = stages(convolutions(*channels), [torch.randn(32, 3, 2, 2)], ratio=ratio, allocation="equal")
    assert tuple(result.plan.widths.get(b.name, b.width) for b in result.analysis.blocks) == expected


@pytest.mark.parametrize(
    ("width", "ratio", "expected"), [(64, 0.3, 48), (12, 0.4, 8), (12, 0.3, 8), (6, 0.4, 4), (64, 0.05, 60)]
)
def test_a_runtime_takes_its_multiple_or_the_half_that_leaves_something_to_remove(
    width: int, ratio: float, expected: int
) -> None:
    """ONNX Runtime's multiple is 8, with which nothing could be removed from 6 and 12, nor 3 neurons from 64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
    options: Any = {"ratio": ratio, "runtime": "onnxruntime", "method": "vbp", "progress": False}
    pruned = vbpfx.prune(model, [torch.randn(16, 4)], **options)
    assert list(pruned.plan.widths.values()) == [expected]


def test_a_multiple_that_leaves_every_block_whole_is_an_error() -> None:
    """A plan without changes would look like a success, although nothing was removed."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(BudgetError, match=r"ratio=0.1 removes 2 of 16 neurons, but widths must be multiples of 8"):
        stages(model, [torch.randn(16, 4)], ratio=0.1, round_to=8)


def test_a_criterion_goes_by_its_name_in_every_run() -> None:
    class Largest:
        def __call__(self, about: Any) -> torch.Tensor:
            return torch.zeros(about.block.width)

    def smallest(about: Any) -> torch.Tensor:
        return torch.zeros(about.block.width)

    assert in_words({"ratio": 0.5, "criterion": Largest()}) == "criterion=Largest, ratio=0.5"
    assert in_words({"criterion": smallest, "round_to": None}) == "criterion=smallest"


@pytest.mark.parametrize("criterion", ["magnitude", "output_variance", "obs", "greedy_obs"])
def test_a_score_that_is_not_finite_decides_nothing(criterion: str) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)))
    with torch.no_grad():
        model[2].weight[1, 2] = torch.nan
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(4, 6)))
    observed = vbpfx.prepare(analysis.captured, analysis)
    vbpfx.calibrate(observed, [torch.randn(40, 6)])
    statistics = vbpfx.statistics(observed)
    (block,) = analysis.blocks
    with pytest.raises(
        CalibrationError,
        match=rf"block {block.name}: criterion '{criterion}' .*NaN or infinity.*exclude='{block.name}'",
    ):
        vbpfx.make_plan(analysis, statistics, ratio=0.5, criterion=criterion, allocation="equal", compensation="mean")


@pytest.mark.parametrize("criterion", ["obs", "greedy_obs"])
def test_covariances_that_are_not_finite_name_the_block(criterion: str) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(4, 6)))
    observed = vbpfx.prepare(analysis.captured, analysis, covariance=True)
    vbpfx.calibrate(observed, [torch.randn(40, 6)])
    (block,) = analysis.blocks
    statistics = vbpfx.statistics(observed)
    (moments,) = statistics.moments[block.name]
    assert moments.co is not None
    co = dataclasses.replace(moments.co, m2=torch.full((12, 12), torch.inf))
    changed = {block.name: (dataclasses.replace(moments, co=co),)}
    statistics = dataclasses.replace(statistics, moments=changed)
    with pytest.raises(
        CalibrationError, match=rf"block {block.name}: criterion '{criterion}' .*covariances.*exclude='{block.name}'"
    ):
        vbpfx.make_plan(analysis, statistics, ratio=0.5, criterion=criterion, allocation="equal", compensation="mean")


def test_patterns_are_compared_once_with_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(2, 4)))
    compared = 0

    def counting(name: str, pattern: str) -> bool:
        nonlocal compared
        compared += 1
        return fnmatch.fnmatchcase(name, pattern)

    monkeypatch.setattr(select, "fnmatch", SimpleNamespace(fnmatchcase=counting))
    chosen = select.select_blocks(analysis, include="*", exclude=["1*", "2*"])
    names = [b.name for b in analysis.blocks if not any(n.startswith(("1", "2")) for n in (b.name, *b.layers))]
    assert [b.name for b in chosen] == names
    assert 0 < compared <= 3 * sum(1 + len(b.layers) for b in analysis.blocks)


@pytest.mark.parametrize("criterion", ["output_variance", "magnitude", "greedy_obs"])
def test_scoring_looks_up_the_weights_of_a_block_and_not_those_of_all(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of planning grows linearly with the number of blocks and not quadratically."""

    def looked_at(blocks: int) -> int:
        model = nn.Sequential(
            *(layer for _ in range(blocks) for layer in (nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
        )
        captured = vbpfx.capture(model, torch.randn(8, 2))
        analysis = vbpfx.find_blocks(captured)
        observed = vbpfx.prepare(captured, analysis)
        vbpfx.calibrate(observed, [torch.randn(8, 2)])
        statistics = vbpfx.statistics(observed)
        seen, plain = 0, nn.Module._named_members

        def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            for found in plain(self, *args, **kwargs):
                seen += 1
                yield found

        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "_named_members", counting)
            plan = vbpfx.make_plan(analysis, statistics, ratio=0.5, criterion=criterion, allocation="equal")
        assert plan.removed == 3 * blocks - 1
        return seen

    few, many = looked_at(4), looked_at(12)
    assert many <= 3 * few + 8
