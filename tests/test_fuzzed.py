"""Networks that the fuzzer found, each named by what once went wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import double, randomize, stages
from torch import Tensor, nn
from zoo import Net, parameter, tokens

import vbpfx

L = nn.Linear


def gated_then_summed(m: nn.Module, x: Tensor) -> Tensor:
    h = m.b(x)
    h = h * m.up(m.down(h).relu()).sigmoid()
    return m.out(m.a(x) + h)


def part_changed_in_place(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.packed(x).chunk(2, -1)
    return m.out(first.abs_() * second)


def halves_swapped(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.a(x).chunk(2, -1)
    return m.out(torch.cat([second, first], -1).tanh() + m.b(x))


def shape_in_slices(m: nn.Module, x: Tensor) -> Tensor:
    outer = x.shape[:2]
    first, second = m.packed(x).view(outer[0], outer[1], 2, 12).unbind(-2)
    return m.out(first.relu() * second)


# name -> (network, widths of the blocks that must be found)
FOUND: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "a sum behind a squeeze-and-excite is not a residual stream": (
        lambda: Net(gated_then_summed, a=L(8, 12), b=L(8, 12), down=L(12, 3), up=L(3, 12), out=L(12, 8)),
        [3, 12],
    ),
    "a part changed in place leaves the others alone": (
        lambda: Net(part_changed_in_place, packed=L(8, 24), out=L(12, 8)),
        [12],
    ),
    "blocks that share all their layers have names of their own": (
        lambda: Net(halves_swapped, a=L(8, 12), b=L(8, 12), out=L(12, 8)),
        [6, 6],
    ),
    "a slice of a shape is no part of a tensor": (
        lambda: Net(shape_in_slices, packed=L(8, 24), out=L(12, 8)),
        [12],
    ),
    "a norm that reads the size of its axis": (
        lambda: Net(lambda m, x: m.out(F.layer_norm(h := m.a(x), h.shape[-1:])), a=L(8, 12), out=L(12, 8)),
        [12],
    ),
    "a bias behind a product whose input got one": (
        lambda: Net(
            lambda m, x: x @ m.w1 @ m.w2 @ m.w3, w1=parameter(8, 12), w2=parameter(12, 10), w3=parameter(10, 4)
        ),
        [10, 12],
    ),
    "feature_alpha_dropout": (lambda: nn.Sequential(L(8, 12), nn.FeatureAlphaDropout(0.1), L(12, 8)), [12]),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", FOUND)
def test_found_and_exact(name: str, frontend: str) -> None:
    make, widths = FOUND[name]
    model = double(randomize(make()))
    result = stages(model, tokens().double(), frontend=frontend)
    blocks = result.analysis.blocks
    assert sorted(block.width for block in blocks) == widths
    assert len({block.name for block in blocks}) == len(blocks)
    assert vbpfx.verify(result.captured, result.small, result.plan, tolerance=1e-12).effect > 1e-6


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_one_matrix_read_from_both_sides_has_no_bias_for_both(frontend: str) -> None:
    """x @ W and F.linear(y, W) would need biases of different lengths under the same name."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x).relu() @ m.w + F.linear(m.b(x).relu(), m.w).sum(-1, keepdim=True)

    model = double(randomize(Net(body, a=L(8, 12), b=L(8, 5), w=parameter(12, 5))))
    try:
        result = stages(model, tokens().double(), frontend=frontend)
    except vbpfx.AnalysisError as error:
        assert "bias of another layer" in str(error)  # noqa: PT017
    else:
        vbpfx.verify(result.captured, result.small, result.plan, tolerance=1e-12)


def test_export_from_an_empty_batch_says_so() -> None:
    with pytest.raises(vbpfx.CaptureError, match="the example batch is empty"):
        vbpfx.capture(nn.Sequential(L(8, 12), nn.ReLU(), L(12, 8)), torch.randn(0, 8), frontend="export")


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_weight_that_is_computed_is_no_adapter(frontend: str) -> None:
    """A layer whose weight the code computes is between two layers that look like an adapter on the stream."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        return x + m.b(F.linear(m.a(x), m.w * 0.5))

    model = double(randomize(Net(body, a=L(8, 12, bias=False), b=L(12, 8, bias=False), w=parameter(12, 12))))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, tokens().double(), frontend=frontend))
    assert not analysis.blocks
    assert any("computed value" in refusal.reason for refusal in analysis.refusals)


def test_a_part_of_a_packed_weight_is_refused_by_the_name_of_the_weight() -> None:
    """nn.MultiheadAttention splits its weight in this way if queries and keys differ."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        query, key = m.w.split([5, 7])
        return m.b(F.linear(x, query)) + m.c(F.linear(x.sin(), key))

    model = double(randomize(Net(body, w=parameter(12, 8), b=L(5, 8), c=L(7, 8))))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, tokens().double()))
    assert not analysis.blocks
    refused = {r.width: r.producers for r in analysis.refusals if "computed value" in r.reason}
    assert refused == {5: ("w",), 7: ("w",)}


def test_blocks_that_have_nothing_to_give_are_a_budget_that_cannot_be_met() -> None:
    model = double(randomize(Net(lambda m, x: x + m.b(m.a(x) * m.c(x)), a=L(8, 1), b=L(1, 8), c=L(8, 1))))
    with pytest.raises(vbpfx.BudgetError):
        stages(model, tokens().double(), ratio=0.5)
