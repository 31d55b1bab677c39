"""Padded and transposed convolutions: one removed neuron stays as a constant channel, and the result is exact.

The reference is computed by hand: convolutions tap by tap, the removed channels replaced before zeros are put around them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Stages, double, randomize, stages
from torch import Tensor, nn
from zoo import Net

import vbpfx
from vbpfx.errors import ArtifactError
from vbpfx.graph.capture import named_tensors
from vbpfx.planning.budget import parameter_cost
from vbpfx.planning.compensate import COMPENSATIONS
from vbpfx.plans.files import load_plan, plan_files
from vbpfx.plans.records import BlockPlan
from vbpfx.storage.files import write_atomically

# Rounding of a few dozen sums of products in float64.
ROUNDING = 1e-12


def network(reader: nn.Module, width: int = 12) -> nn.Sequential:
    """Return convolution, BatchNorm, ReLU and the reader, in float64 and with random statistics."""
    dims = int(type(reader).__name__[-2])
    made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        3, width, 1
    )  # of three inputs, so that neurons predict each other
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](width)
    net = double(randomize(nn.Sequential(made, norm, nn.ReLU(), reader)))
    nn.init.uniform_(norm.bias, 0.5, 1.5)  # most neurons fire
    nn.init.uniform_(norm.running_mean, -0.3, 0.3)
    return net


def pictures(*sizes: int, samples: int = 4, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, *sizes, generator=generator, dtype=torch.float64)


def hidden(net: nn.Sequential, x: Tensor) -> Tensor:
    """Return what the reader reads, with the norm written out."""
    norm, shape = net[1], (1, -1, *(1,) * (x.ndim - 2))
    mean, variance, weight, bias = (
        t.view(shape) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    h = (net[0](x) - mean) / (variance + norm.eps).sqrt() * weight + bias
    return torch.where(h > 0, h, torch.zeros_like(h))


def replaced(h: Tensor, entry: BlockPlan, index: int = 0) -> Tensor:
    """Return h with the removed channels replaced by a + B h_K."""
    value = entry.constants[index].view(1, -1, *(1,) * (h.ndim - 2)).expand(h.shape[0], -1, *h.shape[2:])
    prediction = entry.predictions[index]
    if prediction is not None:
        value = value + torch.einsum("pk,bk...->bp...", prediction, h[:, list(entry.kept)])
    h = h.clone()
    h[:, list(entry.pruned)] = value
    return h


def _each(value: Any, dims: int) -> Sequence[int]:
    return value if isinstance(value, (tuple, list)) else (value,) * dims


def convolved(h: Tensor, layer: Any) -> Tensor:
    """Return a convolution with zeros around h, tap by tap."""
    dims = h.ndim - 2
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        ends = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        ends = [(p, p) for p in _each(layer.padding, dims)]
    sizes = [before + size + after for (before, after), size in zip(ends, h.shape[2:], strict=True)]
    wide = h.new_zeros(*h.shape[:2], *sizes)
    wide[(..., *(slice(b, b + size) for (b, _), size in zip(ends, h.shape[2:], strict=True)))] = h
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]
    total = h.new_zeros(len(h), layer.out_channels, *counts)
    for tap in itertools.product(*map(range, kernel)):
        seen = [
            slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(tap, dilation, stride, counts, strict=True)
        ]
        total += torch.einsum("oi,bi...->bo...", layer.weight[(..., *tap)], wide[(..., *seen)])
    return total if layer.bias is None else total + layer.bias.view(1, -1, *(1,) * dims)


def transposed(h: Tensor, layer: Any) -> Tensor:
    """Return a transposed convolution, tap by tap."""
    dims = h.ndim - 2
    each = list(
        zip(
            h.shape[2:],
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            layer.padding,
            layer.output_padding,
            strict=True,
        )
    )
    total = h.new_zeros(len(h), layer.out_channels, *((n - 1) * s + d * (k - 1) + 1 + o for n, k, s, d, _, o in each))
    for tap in itertools.product(*map(range, layer.kernel_size)):
        reached = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, (n, _, s, d, _, _) in zip(tap, each, strict=True)]
        total[(..., *reached)] += torch.einsum("io,bi...->bo...", layer.weight[(..., *tap)], h)
    total = total[(..., *(slice(p, size - p) for (*_, p, _), size in zip(each, total.shape[2:], strict=True)))]
    return total if layer.bias is None else total + layer.bias.view(1, -1, *(1,) * dims)


def by_hand(net: nn.Sequential, entry: BlockPlan, x: Tensor) -> Tensor:
    """Return what the narrowed network must compute."""
    read = transposed if isinstance(net[3], nn.modules.conv._ConvTransposeNd) else convolved
    return read(replaced(hidden(net, x), entry), net[3])


def with_constant(result: Stages, kept: Sequence[int], compensation: str = "mean", place: int = 0) -> Stages:
    """Return the stages with a plan that keeps these neurons, and a constant channel in the place of another one."""
    (block,) = result.analysis.blocks
    removed = sorted(set(range(block.width)) - set(kept))
    moments = result.statistics.moments[block.name]
    fitted = [COMPENSATIONS[compensation](m, torch.tensor(kept), torch.tensor(removed), True) for m in moments]
    entry = BlockPlan(block, tuple(kept), *zip(*fitted, strict=True), constants_in=(removed[place],))
    plan = dataclasses.replace(result.plan, blocks=(entry,))
    return dataclasses.replace(result, plan=plan, small=vbpfx.convert(result.captured, plan))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "padded": (lambda: nn.Conv2d(12, 5, 3, padding=1), (6, 5), ((9, 4), (1, 7))),
    "without a bias": (lambda: nn.Conv2d(12, 5, 3, padding=1, bias=False), (6, 5), ((9, 4), (2, 3))),
    "strided": (lambda: nn.Conv2d(12, 5, 3, 2, 1), (6, 5), ((9, 4), (4, 7))),
    "dilated": (lambda: nn.Conv2d(12, 5, 3, 1, 3, 2), (6, 5), ((9, 4), (4, 7))),
    "same size": (lambda: nn.Conv2d(12, 5, (5, 3), padding="same", dilation=(1, 2)), (6, 5), ((9, 4), (2, 2))),
    "uneven": (lambda: nn.Conv2d(12, 5, (3, 2), (1, 2), (2, 0)), (6, 5), ((9, 4), (1, 8))),
    "wider than the picture": (lambda: nn.Conv2d(12, 5, 3, 1, 4), (2, 3), ((1, 1), (5, 2))),
    "one dimension": (lambda: nn.Conv1d(12, 5, 4, 3, 2), (8,), ((5,), (12,))),
    "three dimensions": (lambda: nn.Conv3d(12, 5, 3, (1, 2, 1), (1, 0, 2)), (3, 4, 3), ((2, 5, 4), (4, 3, 2))),
    "transposed": (lambda: nn.ConvTranspose2d(12, 5, 3, 2, 1, 1), (4, 3), ((2, 6), (1, 1))),
    "transposed cells": (lambda: nn.ConvTranspose2d(12, 5, 2, 2, bias=False), (7, 6), ((2, 6), (1, 1))),
    "transposed with gaps": (lambda: nn.ConvTranspose2d(12, 5, 1, (2, 3)), (4, 3), ((2, 6), (3, 1))),
    "transposed and dilated": (lambda: nn.ConvTranspose2d(12, 5, (3, 2), (2, 1), 1, dilation=2), (4, 3), ((2, 6), (3, 5))),
    "transposed, one dimension": (lambda: nn.ConvTranspose1d(12, 5, 4, 3, 1, 2), (5,), ((3,), (9,))),
    "transposed, three dimensions": (lambda: nn.ConvTranspose3d(12, 5, (3, 2, 1), 2), (2, 3, 2), ((3, 1, 2), (1, 1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", READERS)
def test_the_result_is_what_is_computed_by_hand_at_every_size(name: str, frontend: str) -> None:
    make, traced, others = READERS[name]
    net = network(make())
    planned = stages(net, pictures(*traced, samples=30), frontend=frontend, ratio=0.5, criterion="random")
    plans = [planned, *(with_constant(planned, (1, 2, 4, 7, 9), fit, place=2) for fit in ("ridge", "mean"))]
    for result in plans:
        (entry,) = result.plan.blocks
        assert entry.block.constant is not None
        with torch.no_grad():
            for seed, size in enumerate((traced, *others), start=1):
                x = pictures(*size, seed=seed)
                expected = by_hand(net, entry, x)
                assert error(result.small(x), expected) < ROUNDING, size
                assert error(net(x), expected) > 1e-3, "the substitution does nothing"


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_border_of_the_picture_itself_needs_no_constant_channel(mode: str) -> None:
    net = network(nn.Conv2d(12, 5, 3, 1, (2, 1), padding_mode=mode))
    result = stages(net, pictures(6, 5), ratio=0.5)
    (entry,) = result.plan.blocks
    assert entry.block.constant is None
    assert not entry.constants_in
    for size in ((6, 5), (4, 9)):
        with torch.no_grad():
            h = replaced(hidden(net, x := pictures(*size, seed=1)), entry)
            bordered = F.pad(h, (1, 1, 2, 2), mode=mode)
            assert error(result.small(x), F.conv2d(bordered, net[3].weight, net[3].bias)) < ROUNDING


def test_the_tensors_are_those_of_the_method() -> None:
    """The constant channel has the value 1 behind norm and ReLU, and its column is the sum of W_P a, tap by tap."""
    net = network(nn.Conv2d(12, 5, 3, padding=1))
    result = with_constant(stages(net, pictures(6, 5), ratio=0.5), (0, 3, 4, 8, 11), place=3)
    (entry,) = result.plan.blocks
    (place,), gone = entry.constants_in, list(entry.pruned)
    present = sorted([*entry.kept, place])
    at = present.index(place)
    assert place == 6
    assert entry.width == len(present) == 6
    small = named_tensors(result.small)
    maker, norm, reader = net[0], net[1], net[3]
    expected = {name: t[present] for name, t in (("0.weight", maker.weight), ("0.bias", maker.bias), ("1.weight", norm.weight), ("1.bias", norm.bias), ("1.running_mean", norm.running_mean), ("1.running_var", norm.running_var))}  # fmt: skip
    numbers = {
        "0.weight": 0.0,
        "0.bias": 1.0,
        "1.weight": 0.0,
        "1.bias": 1.0,
        "1.running_mean": 0.0,
        "1.running_var": 1.0,
    }
    for name, value in numbers.items():
        expected[name] = expected[name].clone()
        expected[name][at] = value
    column = torch.einsum("opij,p->oij", reader.weight[:, gone], entry.constants[0])
    expected["3.weight"] = reader.weight[:, present].clone()
    expected["3.weight"][:, at] = column
    expected["3.bias"] = reader.bias
    for name, tensor in expected.items():
        torch.testing.assert_close(small[name].detach(), tensor.detach(), rtol=1e-12, atol=1e-12)


def test_a_reader_without_padding_takes_the_constants_in_its_bias() -> None:
    """Of two readers of one value, one pads; the column of the constant channel is 0 in the other."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.b(h) + m.c(h)

    model = double(randomize(Net(body, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 5, 3, padding=1), c=nn.Conv2d(12, 5, 1))))
    result = with_constant(stages(model, pictures(6, 5), ratio=0.5), (0, 1, 5, 9), place=4)
    (entry,) = result.plan.blocks
    (at,) = [sorted([*entry.kept, *entry.constants_in]).index(place) for place in entry.constants_in]
    small = named_tensors(result.small)
    assert not small["c.weight"][:, at].any()
    assert small["b.weight"][:, at].any()
    torch.testing.assert_close(small["b.bias"], model.b.bias, rtol=0, atol=0)
    folded = model.c.bias + model.c.weight[:, list(entry.pruned), 0, 0] @ entry.constants[0]
    torch.testing.assert_close(small["c.bias"], folded, rtol=1e-12, atol=1e-12)


# ---- whether a constant channel is worth its place, and budgets -----------------------------------------------------


def test_without_compensation_no_constant_channel_stays() -> None:
    net = network(nn.Conv2d(12, 5, 3, padding=1))
    result = stages(net, pictures(6, 5), ratio=0.5, compensation="none")
    (entry,) = result.plan.blocks
    assert not entry.constants_in
    assert entry.width == len(entry.kept)
    with torch.no_grad():
        assert error(result.small(pictures(7, 4)), by_hand(net, entry, pictures(7, 4))) < ROUNDING


@pytest.mark.parametrize("compensation", ["mean", "ridge"])
def test_neurons_that_hardly_vary_are_worth_a_constant_channel(compensation: str) -> None:
    """Half of the neurons are nearly constant: with one channel for them all, the output hardly changes."""
    net = network(nn.Conv2d(12, 5, 3, padding=1))
    with torch.no_grad():
        net[1].weight[:6] *= 1e-3
    result = stages(net, pictures(6, 5), ratio=0.5, round_to=1, compensation=compensation, method="vbp")
    (entry,) = result.plan.blocks
    assert (entry.width, len(entry.kept), len(entry.constants_in)) == (6, 5, 1)
    without = stages(net, pictures(6, 5), ratio=0.5, round_to=1, compensation="none", method="vbp")
    with torch.no_grad():
        x = pictures(7, 4, seed=1)
        assert error(result.small(x), net(x)) < 0.2 * error(without.small(x), net(x))


def test_neurons_that_follow_from_the_others_are_not_worth_one() -> None:
    """All twelve are products of a matrix and three inputs, without a bias, so three of them give all the others."""
    net = network(nn.Conv2d(12, 5, 3, padding=1))
    with torch.no_grad():
        for tensor in (net[0].bias, net[1].bias, net[1].running_mean):
            tensor.zero_()
    net[2] = nn.Identity()
    result = stages(net, 3 + pictures(6, 5, samples=30), ratio=0.75, round_to=1)
    (entry,) = result.plan.blocks
    assert (entry.width, len(entry.kept), len(entry.constants_in)) == (3, 3, 0)
    with torch.no_grad():
        x = 3 + pictures(7, 4, seed=1)
        assert error(result.small(x), net(x)) < 1e-2


def test_neurons_that_never_fire_leave_the_width_as_planned() -> None:
    net = network(nn.Conv2d(16, 5, 3, padding=1), width=16)
    with torch.no_grad():
        net[1].bias[:8] = -100.0
    result = stages(net, pictures(6, 5), ratio=0.25, round_to=4, method="vbp")
    (entry,) = result.plan.blocks
    assert set(entry.pruned) < set(range(8))
    assert (entry.width, entry.constants_in) == (12, ())
    with torch.no_grad():
        assert error(result.small(pictures(7, 4)), net(pictures(7, 4))) < ROUNDING


@pytest.mark.parametrize("compensation", ["mean", "ridge", "none"])
def test_the_narrowest_block_has_a_place_for_its_constants(compensation: str) -> None:
    """One ranking takes all neurons that it may from the block of low variance, and their means stay."""
    net = nn.Sequential(*network(nn.Conv2d(12, 12, 3, padding=1)), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)).double()
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
    result = stages(net, pictures(6, 5), ratio=0.7, method="vbp", compensation=compensation)
    entry = next(entry for entry in result.plan.blocks if "0.weight" in entry.block.producers)
    expected = (1, 1, 0) if compensation == "none" else (2, 1, 1)
    assert (entry.width, len(entry.kept), len(entry.constants_in)) == expected
    assert bool(entry.constants[0].any()) == (compensation != "none")


def test_groups_of_two_channels_may_keep_one() -> None:
    net = network(nn.Conv2d(16, 8, 3, padding=1, groups=8), width=16)
    result = stages(net, pictures(6, 5), ratio=0.5, method="vbp")
    (entry,) = result.plan.blocks
    assert (entry.width, entry.constants_in) == (8, ())


def test_the_constant_channel_counts_in_the_width() -> None:
    net = network(nn.Conv2d(32, 5, 3, padding=1), width=32)
    result = stages(net, pictures(6, 5), ratio=0.5, round_to=8, method="vbp")
    (entry,) = result.plan.blocks
    assert (entry.width, len(entry.kept), len(entry.constants_in)) == (16, 15, 1)
    assert result.plan.removed == 16
    assert result.small.get_parameter("3.weight").shape[1] == 16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_the_constant_channel_counts_in_the_budget(budget: str, bias: bool) -> None:
    """A layer that pads gets no bias for constants, so none is counted."""
    net = network(nn.Conv2d(32, 5, 3, padding=1, bias=bias), width=32)
    result = stages(net, x := pictures(6, 5, samples=1), round_to=1, method="vbp", **{budget: 0.5})
    (entry,) = result.plan.blocks

    def spent(width: int) -> int:
        if budget == "macs":  # all products of both convolutions at 6 x 5 positions
            return 30 * width * (3 + 9 * 5)
        return width * (3 + 1 + 2) + 5 * 9 * width + 5 * bias

    assert len(entry.constants_in) == 1
    assert spent(entry.width) <= 0.5 * spent(32) < spent(entry.width + 1)
    if budget == "params":
        blocks = result.analysis.blocks
        assert parameter_cost(net, blocks)({blocks[0].name: entry.width}) == spent(entry.width)
        assert sum(p.numel() for p in result.small.parameters()) == spent(entry.width)
    else:
        again = vbpfx.capture(result.small, x)
        assert sum(again.macs.values()) == spent(entry.width)


@pytest.mark.parametrize(
    ("width", "ratio", "left"), [(2, 0.5, 1), (3, 0.34, 2), (4, 0.5, 2), (12, 0.92, 1), (12, 0.83, 2), (12, 0.1, 11)]
)
@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_narrow_blocks_and_extreme_ratios(width: int, ratio: float, left: int, method: str) -> None:
    net = network(nn.Conv2d(width, 5, 3, padding=1), width=width)
    result = stages(net, pictures(6, 5), ratio=ratio, min_width=1, round_to=1, method=method)
    (entry,) = result.plan.blocks
    assert entry.width == left == len(entry.kept) + len(entry.constants_in)
    with torch.no_grad():
        assert error(result.small(pictures(7, 4)), by_hand(net, entry, pictures(7, 4))) < ROUNDING


def test_uniform_blocks_have_one_width_even_if_one_loses_dead_neurons_only() -> None:
    first, second = (network(nn.Conv2d(16, 3, 3, padding=1), width=16) for _ in range(2))
    with torch.no_grad():
        first[1].bias[:9] = -100.0
    model = nn.Sequential(first, nn.Softmax(1), second)
    result = stages(model, pictures(6, 5), ratio=0.5, uniform=True, round_to=1, method="vbp")
    assert sorted(result.plan.widths.values()) == [8, 8]
    vbpfx.verify(result.captured, result.small, result.plan, tolerance=ROUNDING)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_lower_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """The reference is computed in float64 from the rounded weights; bfloat16 rounds each of a few values by 2^-9."""
    net = network(nn.Conv2d(12, 5, 3, padding=1)).to(dtype)
    pruned = vbpfx.prune(net, [pictures(6, 5, samples=16).to(dtype)], ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    assert entry.constants_in
    x = pictures(9, 4).to(dtype)
    with torch.no_grad():
        expected = by_hand(copy.deepcopy(net).double(), entry, x.double())
        assert error(pruned.graph_module(x).double(), expected) < tolerance


# ---- the model's own class ------------------------------------------------------------------------------------------


def test_the_models_own_class_computes_the_same_and_can_be_trained() -> None:
    """In training mode the norm takes its statistics from a channel without variance; nothing becomes NaN."""
    net = network(nn.Conv2d(12, 5, 3, padding=1))
    pruned = vbpfx.prune(net, [pictures(6, 5, samples=16)], ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    assert entry.constants_in
    small = pruned.apply_to(net)
    x = pictures(9, 4)
    with torch.no_grad():
        assert error(small(x), by_hand(net, entry, x)) < ROUNDING
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    small.train()
    before = copy.deepcopy(small.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        small(x).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in small.state_dict().values())
    at = sorted([*entry.kept, *entry.constants_in]).index(entry.constants_in[0])
    moved = {name: not torch.equal(t, before[name]) for name, t in small.state_dict().items()}
    assert moved["3.weight"]
    assert small[1].bias[at] != before["1.bias"][at], "the constant is trained"


def test_without_a_norm_the_constant_channel_is_a_neuron_that_can_be_trained() -> None:
    model = double(randomize(nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3, padding=1))))
    nn.init.constant_(model[0].bias, 2.0)
    pruned = vbpfx.prune(model, [pictures(6, 5, samples=16)], ratio=0.5, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    small = pruned.apply_to(model).train()
    at = sorted([*entry.kept, *entry.constants_in]).index(entry.constants_in[0])
    assert not small[0].weight[at].any()
    small(pictures(9, 4)).square().mean().backward()
    assert small[0].weight.grad[at].any()


@pytest.mark.parametrize("own", [False, True])
def test_a_narrowed_network_can_be_narrowed_again(own: bool) -> None:
    """The old constant channel has no variance, so it goes first, and a new one takes its place."""
    net = network(nn.Conv2d(24, 5, 3, padding=1), width=24)
    data = [pictures(6, 5, samples=16)]
    first = vbpfx.prune(net, data, ratio=0.5, method="vbp", round_to=1, progress=False)
    small = first.apply_to(net) if own else first.graph_module
    second = vbpfx.prune(small, data, ratio=0.5, method="vbp", round_to=1, progress=False)
    (entry,) = second.plan.blocks
    old = sorted([*first.plan.blocks[0].kept, *first.plan.blocks[0].constants_in])
    assert old.index(first.plan.blocks[0].constants_in[0]) in entry.pruned
    assert (entry.block.width, entry.width, len(entry.constants_in)) == (12, 6, 1)
    assert second.verification.error < ROUNDING
    assert second.verification.effect > 1e-3
    with torch.no_grad():
        x = pictures(9, 4)
        modules = [small.get_submodule(str(i)) for i in range(4)]
        assert error(second.graph_module(x), by_hand(nn.Sequential(*modules), entry, x)) < ROUNDING


# ---- plans and files ------------------------------------------------------------------------------------------------


def _result(reader: nn.Module) -> Stages:
    return stages(network(reader), pictures(6, 5), ratio=0.5, method="vbp", compensation="ridge")


def test_a_plan_with_a_constant_channel_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = with_constant(_result(nn.Conv2d(12, 5, 3, padding=1)), (0, 3, 4, 8, 11), "ridge", place=3)
    write_atomically(plan_files(result.plan, tmp_path))
    (again,), (entry,) = load_plan(tmp_path).blocks, result.plan.blocks
    assert again.block == entry.block
    assert (again.kept, again.constants_in) == (entry.kept, entry.constants_in) == ((0, 3, 4, 8, 11), (6,))
    assert torch.equal(again.constants[0], entry.constants[0])
    assert torch.equal(again.predictions[0], entry.predictions[0])


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its plan says nothing of padding, groups or constant channels."""
    net = network(nn.Conv2d(12, 5, 3))
    pruned = vbpfx.prune(net, [pictures(6, 5)], ratio=0.5, method="vbp", progress=False)
    folder = pruned.save(tmp_path / "net")
    data = json.loads((folder / "plan.json").read_text())
    data["format"] = 3
    for entry in data["blocks"]:
        del entry["constants_in"], entry["block"]["constant"], entry["block"]["groups"]
        for parameter in entry["block"]["parameters"]:
            del parameter["groups"]
        for consumer in entry["block"]["consumers"]:
            del consumer["padded"], consumer["groups"]
    (folder / "plan.json").write_text(json.dumps(data))
    assert load_plan(folder).blocks[0].block == pruned.plan.blocks[0].block
    with torch.no_grad():
        expected = pruned.graph_module(pictures(9, 4))
        assert torch.equal(vbpfx.load(folder)(pictures(9, 4)), expected)
        assert error(vbpfx.load(folder, into=copy.deepcopy(net))(pictures(9, 4)), expected) < ROUNDING


def test_a_saved_network_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    net = network(nn.Conv2d(12, 5, 3, padding=1)).float()
    pruned = vbpfx.prune(net, [pictures(6, 5, samples=16).float()], ratio=0.5, method="vbp", progress=False)
    assert pruned.plan.blocks[0].constants_in
    again = vbpfx.load(pruned.save(tmp_path / "net"))
    into = vbpfx.load(tmp_path / "net", into=copy.deepcopy(net))
    x = pictures(9, 4).float()
    with torch.no_grad():
        assert torch.equal(again(x), pruned.graph_module(x))
        assert type(into) is type(net)
        assert error(into(x), pruned.graph_module(x)) < 1e-6


def test_plans_that_need_a_constant_channel_or_have_a_wrong_one_are_refused() -> None:
    (entry,) = _result(nn.Conv2d(12, 5, 3, padding=1)).plan.blocks
    assert entry.constants_in
    given = (entry.block, entry.kept, entry.constants, entry.predictions)
    with pytest.raises(ArtifactError, match=r"3\.weight pads its input, so the constants .* and the plan has none"):
        BlockPlan(*given)
    with pytest.raises(ArtifactError, match="these are not all removed"):
        BlockPlan(*given, constants_in=(entry.kept[0],))
    (unpadded,) = _result(nn.Conv2d(12, 5, 3)).plan.blocks
    with pytest.raises(ArtifactError, match="or no layer of the block needs a constant channel"):
        BlockPlan(unpadded.block, unpadded.kept, unpadded.constants, constants_in=(unpadded.pruned[0],))
