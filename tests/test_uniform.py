"""``uniform=True`` gives all blocks of one shape the same width, chosen as by brute force."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Stages, randomize, stages
from torch import nn

import vbpfx
from vbpfx.report.make import count_parameters

DATA = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
# Hidden widths of the blocks; blocks of equal width have equal shapes. The softmax between them bounds the outputs.
WIDTHS = (24, 40, 24, 24, 40)


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for width in WIDTHS:
        layers += [nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6), nn.Softmax(-1)]
    return randomize(nn.Sequential(*layers))


def _widths(result: Stages) -> dict[str, int]:
    """Return every block's width after pruning, including blocks that lost nothing."""
    return {b.name: b.width for b in result.analysis.blocks} | result.plan.widths


def _per_group(result: Stages) -> dict[int, set[int]]:
    """Return width before pruning -> widths after pruning."""
    found: dict[int, set[int]] = defaultdict(set)
    for block in result.analysis.blocks:
        found[block.width].add(_widths(result)[block.name])
    return found


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.3}, {"ratio": 0.5}, {"macs": 0.6}, {"params": 0.7}, {"ratio": 0.5, "round_to": 8},
     {"macs": 0.6, "round_to": 4}, {"ratio": 0.5, "criterion": "magnitude"}, {"ratio": 0.8, "allocation": "normalised"}],
    ids=str,
)  # fmt: skip
def test_blocks_of_one_shape_have_one_width(options: dict[str, Any]) -> None:
    options = {"method": "vbp"} | options
    result = stages(_network(), DATA, uniform=True, **options)
    assert len(result.analysis.blocks) == len(WIDTHS)
    groups = _per_group(result)
    assert {before: len(after) for before, after in groups.items()} == {24: 1, 40: 1}
    assert all(width % options.get("round_to", 1) == 0 for widths in groups.values() for width in widths)
    # Without the constraint the same budget gives other widths, so the constraint has an effect.
    free = stages(_network(), DATA, **options)
    assert any(len(after) > 1 for after in _per_group(free).values())
    vbpfx.verify(result.captured, result.small, result.plan)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.77])
def test_the_ratio_is_met_to_one_step_of_a_group(ratio: float) -> None:
    result = stages(_network(), DATA, ratio=ratio, uniform=True)
    # A step removes one neuron from all blocks of a group; the larger group has three blocks.
    assert abs(result.plan.removed - round(ratio * sum(WIDTHS))) <= 3 / 2


@pytest.mark.parametrize("kept", [0.5, 0.66, 0.9])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_macs_and_params_hold(kind: str, kept: float) -> None:
    result = stages(_network(), DATA, uniform=True, **{kind: kept})

    def cost(network: torch.fx.GraphModule) -> int:
        if kind == "params":
            return count_parameters(network)
        return sum(dataclasses.replace(result.captured, graph_module=network).macs.values())

    dense, spent = cost(result.captured.graph_module), cost(result.small)
    assert spent <= kept * dense
    # The largest step is three neurons, each with 6 weights in, 6 out and, for params, a bias.
    assert spent > kept * dense - 3 * (6 + 6 + (kind == "params"))


def test_it_is_deterministic() -> None:
    model = _network()
    first, second = (stages(model, DATA, ratio=0.5, uniform=True) for _ in range(2))
    again = vbpfx.make_plan(first.analysis, first.statistics, ratio=0.5, uniform=True)
    kept = {entry.block.name: entry.kept for entry in first.plan.blocks}
    assert kept
    for plan in (second.plan, again):
        assert {entry.block.name: entry.kept for entry in plan.blocks} == kept
    assert again.settings["uniform"] is True


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
def test_groups_are_ranked_by_the_mean_of_their_kth_smallest_scores(ratio: float) -> None:
    model = _network()
    result = stages(model, DATA, ratio=ratio, uniform=True, method="vbp")
    # The oracle: variances from the layers themselves, and every order of removal by hand.
    x, variances = DATA, []
    for layer in range(0, len(model), 4):
        hidden = model[layer + 1](model[layer](x))
        variances.append(hidden.detach().double().numpy().var(0, ddof=1))
        x = model[layer + 3](model[layer + 2](hidden))
    groups = {width: [v for v in variances if len(v) == width] for width in (24, 40)}
    steps = sorted(
        (float(np.mean([np.sort(v)[k] for v in members])), width)
        for width, members in groups.items()
        for k in range(width - 1)
    )
    totals = [0]
    for _, width in steps:
        totals.append(totals[-1] + len(groups[width]))
    wanted = round(ratio * sum(WIDTHS))
    count = min(range(len(totals)), key=lambda n: abs(totals[n] - wanted))
    gone = {width: sum(w == width for _, w in steps[:count]) for width in groups}
    found = _widths(result)
    for block in result.analysis.blocks:
        assert found[block.name] == block.width - gone[block.width]
    # within a block its own lowest scores go
    for entry in result.plan.blocks:
        scores = variances[[b.name for b in result.analysis.blocks].index(entry.block.name)]
        assert set(entry.pruned) == set(np.argsort(scores, kind="stable")[: gone[entry.block.width]].tolist())


def test_equal_widths_of_other_shapes_are_groups_of_their_own() -> None:
    layers = (
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6), nn.Softmax(-1),
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4), nn.Softmax(-1),
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4),
    )  # fmt: skip
    model = randomize(nn.Sequential(*layers))
    with torch.no_grad():
        model[8].weight.mul_(1e-3)  # by far the lowest variances: alone in its group it is narrowed first
    result = stages(model, DATA, ratio=0.3, uniform=True, method="vbp")
    assert result.plan.widths == {"8->10": 16 - round(0.3 * 48)}
