"""Grouped convolutions: every group of channels loses as many channels, each its own, and the result is exact.

The reference computes every group by itself, with a convolution without groups, on channels that were replaced by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx_files import run
from oracle import double, randomize, stages
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ArtifactError, BudgetError
from vbpfx.plans.files import load_plan, plan_files
from vbpfx.plans.records import BlockPlan
from vbpfx.rewrite.substitute import reference_graph
from vbpfx.storage.files import write_atomically

# Rounding of a few hundred sums of products in float64.
ROUNDING = 1e-12


def pictures(height: int = 9, width: int = 7, samples: int = 4, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(samples, channels, height, width, generator=generator, dtype=torch.float64)


def network(reader: nn.Conv2d, width: int = 24) -> nn.Sequential:
    """Return a convolution, a norm whose neurons mostly fire, ReLU and a grouped reader, in float64."""
    net = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(), reader)
    randomize(net)
    nn.init.uniform_(net[1].bias, 0.5, 1.5)
    return double(net)


def replaced(h: Tensor, entry: BlockPlan) -> Tensor:
    """Return h with the removed channels replaced by a + B h_K."""
    value = entry.constants[0].view(1, -1, 1, 1).expand(h.shape[0], -1, *h.shape[2:])
    if entry.predictions[0] is not None:
        value = value + torch.einsum("pk,bkxy->bpxy", entry.predictions[0], h[:, list(entry.kept)])
    h = h.clone()
    h[:, list(entry.pruned)] = value
    return h


def group_by_group(h: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return a grouped convolution, computed by convolutions without groups."""
    parts = []
    for x, weight in zip(h.chunk(layer.groups, 1), layer.weight.chunk(layer.groups, 0), strict=True):
        parts.append(F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation))
    y = torch.cat(parts, 1)
    return y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1)


READERS: dict[str, Callable[[], nn.Conv2d]] = {
    "pointwise": lambda: nn.Conv2d(24, 8, 1, groups=4),
    "window": lambda: nn.Conv2d(24, 12, 3, groups=4, bias=False),
    "padded": lambda: nn.Conv2d(24, 8, 3, padding=1, groups=4),
    "padded, without a bias": lambda: nn.Conv2d(24, 48, 3, 2, (1, 2), groups=2, bias=False),
    "dilated": lambda: nn.Conv2d(24, 9, 3, padding=2, dilation=2, groups=3),
}


@pytest.mark.parametrize("compensation", ["none", "mean", "ridge"])
@pytest.mark.parametrize("reader", READERS)
def test_a_grouped_reader_by_hand(reader: str, compensation: str) -> None:
    net = network(READERS[reader]())
    found = stages(net, pictures(), ratio=0.5, method="vbp", compensation=compensation)
    (entry,) = found.plan.blocks
    groups = net[3].groups
    assert entry.block.groups == groups
    in_groups = entry.block.in_groups(entry.kept)
    assert len({len(kept) for kept in in_groups}) == 1
    assert sum(map(len, in_groups)) + len(entry.constants_in) == entry.width
    small = found.small.get_submodule("3")
    assert (small.groups, small.in_channels, small.weight.shape[1]) == (groups, entry.width, entry.width // groups)
    for x in (pictures(), pictures(12, 17)):
        expected = group_by_group(replaced(net[:3](x), entry), net[3]).detach()
        assert torch.allclose(found.small(x), expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def test_a_constant_channel_in_every_group() -> None:
    """Means that a bias cannot hold: each group keeps one channel of a constant value, and its own neurons."""
    net = network(nn.Conv2d(24, 8, 3, padding=1, groups=4))
    entry = stages(net, pictures(), ratio=0.5, method="vbp").plan.blocks[0]
    assert [len(group) for group in entry.block.in_groups(entry.constants_in)] == [1, 1, 1, 1]
    assert [len(group) for group in entry.block.in_groups(entry.kept)] == [2, 2, 2, 2]


def test_nothing_is_predicted_from_another_group() -> None:
    net = network(nn.Conv2d(24, 8, 3, groups=4))
    entry = stages(net, pictures(), ratio=0.5, method="vbp", compensation="ridge").plan.blocks[0]
    group = torch.arange(24) // 6
    across = group[list(entry.pruned)][:, None] != group[list(entry.kept)]
    assert entry.predictions[0] is not None
    assert bool(entry.predictions[0].any())
    assert not bool(entry.predictions[0][across].any())


def test_each_group_chooses_its_own_channels() -> None:
    """Channels that never fire go first, at different places in every group."""
    net = network(nn.Conv2d(12, 6, 1, groups=3), width=12)
    dead = [0, 3, 5, 6, 8, 9]
    with torch.no_grad():
        net[1].weight[dead], net[1].bias[dead] = 0.0, -1.0
    for method in ("vbp", "auto"):
        plan = stages(net, pictures(), ratio=0.5, method=method, round_to=1).plan
        assert plan.blocks[0].pruned == tuple(dead)


class Bottleneck(nn.Module):
    """Two pointwise convolutions around a grouped one, as in ResNeXt."""

    def __init__(self, groups: int = 4, *, second: int | None = None) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.window, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(24)
        self.expand = nn.Conv2d(24, 5, 1, groups=1) if second is None else nn.Conv2d(24, 2 * second, 1, groups=second)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three convolutions."""
        x = self.norm1(self.reduce(x)).relu()
        return self.expand(self.norm2(self.window(x)).relu())


class Gated(nn.Module):
    """A grouped convolution makes both halves of a gate, and another one reads the product."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(4, 24, 3, padding=1, groups=2), nn.Conv2d(12, 6, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return W2 (a * silu(b))."""
        a, b = self.make(x[:, [0, 1, 2, 0]]).chunk(2, 1)
        return self.read(a * F.silu(b))


class Multiplied(nn.Module):
    """A depthwise convolution makes three channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 24, 3, padding=1, groups=8),
            nn.Conv2d(24, 4, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three convolutions."""
        return self.last(self.depthwise(self.first(x).relu()).relu())


class Functional(nn.Module):
    """The same operators as functions, whose number of groups is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(24, 3, 1, 1)), nn.Parameter(torch.randn(24, 6, 3, 3))
        self.d, self.bias = nn.Parameter(torch.randn(4, 24, 1, 1)), nn.Parameter(torch.rand(24))
        self.shift = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        """Apply a convolution, a grouped one, and another."""
        x = F.conv2d(F.conv2d(x, self.a, self.bias).relu(), self.b, None, 1, 1, 1, 4).relu()
        return F.conv2d(x, self.d, self.shift)


# Network, and the width and the number of groups of each of its blocks.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    "bottleneck": (Bottleneck, [(24, 4), (24, 4)]),
    "groups of two sizes on one axis": (lambda: Bottleneck(4, second=6), [(24, 4), (24, 12)]),
    "a gate of halves": (Gated, [(12, 3)]),
    "a depthwise convolution that multiplies channels": (Multiplied, [(8, 1)]),
    "functions": (Functional, [(24, 4), (24, 4)]),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("method", ["vbp", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_every_form(name: str, method: str, frontend: str, tmp_path: Path) -> None:
    make, blocks = NETWORKS[name]
    torch.manual_seed(0)
    net = double(randomize(make()))
    data = [pictures(samples=6), pictures(samples=5)]
    pruned = vbpfx.prune(net, data, ratio=0.5, method=method, round_to=1, frontend=frontend, progress=False)
    assert [(b.width, b.groups) for b in pruned.analysis.blocks] == blocks
    assert pruned.plan.removed >= sum(width for width, _ in blocks) // 3
    own, folder = pruned.apply_to(net), tmp_path / "saved"
    pruned.save(folder)
    loaded = vbpfx.load(folder)
    reference = reference_graph(pruned.captured, pruned.plan)
    sizes = [(12, 17), (8, 31)] if frontend == "symbolic" else [(9, 7)]
    for x in (pictures(*size) for size in sizes):
        expected = reference(x).detach()
        bound = ROUNDING * float(expected.abs().max())
        for network in (pruned.graph_module, own, loaded):
            assert torch.allclose(network(x), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_in_and_out(name: str, tmp_path: Path) -> None:
    """Half of a file's channels go, and the number of groups stays."""
    net = randomize(NETWORKS[name][0]()).eval()
    x = pictures().float()
    torch.onnx.export(net, (x,), tmp_path / "in.onnx", input_names=["x"], dynamo=True, verbose=False)
    result = vbpfx.prune_onnx(
        tmp_path / "in.onnx", [x.numpy()] * 2, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False
    )
    (found,) = run(tmp_path / "out.onnx", {"x": x.numpy()})
    expected = reference_graph(result.captured, result.plan)(x).detach()
    # float32 in two runtimes
    assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.6}])
def test_what_a_budget_counts_is_what_is_left(budget: dict[str, float]) -> None:
    net = double(randomize(Bottleneck()))
    pruned = vbpfx.prune(net, [pictures(samples=8)], method="vbp", progress=False, **budget)
    if "params" in budget:
        counts = [sum(p.numel() for p in m.parameters()) for m in (net, pruned.graph_module)]
    else:
        counts = [sum(vbpfx.capture(m, pictures()).macs.values()) for m in (net, copy.deepcopy(pruned.graph_module))]
    assert 0.3 < counts[1] / counts[0] <= 0.6


def test_widths_are_rounded_in_every_group() -> None:
    """By default the groups of convolutions keep multiples of 16 channels, or of fewer if they are narrow."""
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 3, 1))
    pruned = vbpfx.prune(double(randomize(wide)), [pictures(samples=8)], macs=0.6, method="auto", progress=False)
    assert {entry.width // 2 for entry in pruned.plan.blocks} == {16}
    explicit = vbpfx.prune(
        double(randomize(Bottleneck())), [pictures(samples=8)], ratio=0.5, method="vbp", round_to=6, progress=False
    )
    assert {entry.width % 12 for entry in explicit.plan.blocks} == {0}


@pytest.mark.parametrize("budget", [{"ratio": 0.5}, {"macs": 0.7}, {"params": 0.7}])
def test_blocks_that_a_multiple_keeps_whole_are_named(budget: dict[str, float]) -> None:
    """RegNet: no smaller width than 24 is a multiple of both 8 and 3 groups."""
    wide = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1))
    net = double(randomize(nn.Sequential(Bottleneck(groups=3), nn.Conv2d(5, 3, 1), wide)))
    data = [pictures(samples=8)]
    with pytest.raises(BudgetError) as caught:
        vbpfx.prune(net, data, method="vbp", round_to=8, progress=False, **budget)
    message = str(caught.value)
    assert "the floors and round_to" in message
    assert (
        "4 of 5 blocks keep all their neurons, among them 0.reduce->0.window, because no smaller width than 24 is a multiple of 8 and of its 3 groups"
        in message
    )
    assert "min_width" not in message  # it is 1 already
    (multiple,) = re.findall(r"or round_to=(\d+)", message)
    vbpfx.prune(net, data, method="vbp", round_to=int(multiple), progress=False, **budget)
    with pytest.raises(BudgetError):
        vbpfx.prune(net, data, method="vbp", round_to=2 * int(multiple), progress=False, **budget)


def test_a_budget_that_no_block_can_give_names_the_multiple() -> None:
    net = double(randomize(Bottleneck(groups=3)))
    with pytest.raises(
        BudgetError, match=r"no budget can be met: the floors and round_to .* of its 3 groups; use round_to=4$"
    ):
        vbpfx.prune(net, [pictures(samples=8)], ratio=0.5, method="vbp", round_to=8, progress=False)


class Shared(nn.Module):
    """A grouped convolution that reads the channels of two layers, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(12, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Read both."""
        return self.read(torch.cat([self.a(x), self.b(x)], 1))


def test_channels_of_several_layers_are_refused() -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(double(randomize(Shared())), pictures()))
    assert not analysis.blocks
    reasons = {r.reason for r in analysis.refusals if r.node == "read"}
    assert reasons == {"a grouped convolution divides it, together with other channels, into 2 groups"}


def test_groups_of_one_channel_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, groups=2), nn.Conv2d(2, 3, 1))
    analysis = vbpfx.find_blocks(vbpfx.capture(double(randomize(net)), pictures()))
    assert [(b.width, b.groups) for b in analysis.blocks] == [(4, 2)]
    reasons = [r.reason for r in analysis.refusals if r.producers == ("1.weight",)]
    assert reasons == ["grouped convolutions divide it into groups of a single channel"]


def test_a_plan_that_predicts_from_another_group_is_an_error() -> None:
    net = network(nn.Conv2d(24, 8, 3, groups=4))
    entry = stages(net, pictures(), ratio=0.5, method="vbp", compensation="ridge").plan.blocks[0]
    everything = torch.ones(len(entry.pruned), len(entry.kept), dtype=torch.float64)
    with pytest.raises(ArtifactError, match="of one group from kept neurons of another"):
        dataclasses.replace(entry, predictions=(everything,))


def test_a_plan_with_unequal_groups_is_an_error(tmp_path: Path) -> None:
    net = network(nn.Conv2d(24, 8, 3, padding=1, groups=4))
    plan = stages(net, pictures(), ratio=0.5, method="vbp").plan
    entry = plan.blocks[0]
    kept = tuple(sorted({*entry.kept, entry.gone[0]}))
    constants = tuple(a[1:] for a in entry.constants)
    with pytest.raises(ArtifactError, match=r"its 4 groups must keep the same number of channels each.* into \[2, 3\]"):
        dataclasses.replace(entry, kept=kept, constants=constants)
    write_atomically(plan_files(plan, tmp_path))
    again = load_plan(tmp_path).blocks[0]
    assert (again.block, again.kept, again.constants_in) == (entry.block, entry.kept, entry.constants_in)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "regnet_y_400mf"])
def test_real_architectures_at_sizes_that_tracing_never_saw(name: str) -> None:
    net: Any = double(randomize(torchvision.models.get_model(name, num_classes=7)))
    pruned = vbpfx.prune(net, [pictures(64, 64)], ratio=0.5, method="vbp", progress=False)
    assert {b.groups for b in pruned.analysis.blocks} > {1}
    assert pruned.verification.error < 1e-9
    reference = reference_graph(pruned.captured, pruned.plan)
    for x in (pictures(75, 49, samples=2), pictures(33, 98, samples=2)):
        expected = reference(x).detach()
        found = pruned.graph_module(x).detach()
        assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())
