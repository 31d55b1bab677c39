"""Code that computes where to split an axis: the halves of a gate, counted from the front or the back, and parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomize, stages
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ArtifactError


class Gate(nn.Module):
    """A packed gate; ``cut`` computes the input of the second layer from its 24 channels."""

    def __init__(self, cut: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.cut = nn.Linear(8, 24), nn.Linear(width, 8), cut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.cut(self.up(x)))
        return y


def halves(h: Tensor) -> Tensor:
    d = h.shape[-1] // 2
    return F.silu(h[..., :d]) * h[..., d:]


def to_the_end(h: Tensor) -> Tensor:
    d = h.size(1) // 2
    return F.silu(h[:, :d]) * h[:, d : 2 * d]


def from_the_back(h: Tensor) -> Tensor:
    d = h.shape[-1] // 2
    return F.silu(h[..., :-d]) * h[..., -d:]


def narrowed(h: Tensor) -> Tensor:
    d = h.shape[-1] // 2
    return F.silu(h.narrow(-1, 0, d)) * h.narrow(-1, d, d)


def split(h: Tensor) -> Tensor:
    a, b = h.split(h.shape[-1] // 2, -1)
    return F.silu(a) * b


def viewed(h: Tensor) -> Tensor:
    packed = h.view(-1, 2, h.shape[-1] // 2)
    return F.silu(packed[:, 0]) * packed[:, 1]


def of_another_value(h: Tensor) -> Tensor:
    d = torch.tanh(h).size(-1) // 2
    return F.silu(h[..., :d]) * h[..., d:]


def minus_a_number(h: Tensor) -> Tensor:
    d = h.shape[-1] - 12
    return F.silu(h[..., :d]) * h[..., d:]


def by_two_sizes(h: Tensor) -> Tensor:
    d = h.shape[-1] // 2
    a, b = h.split([d, h.shape[-1] - d], -1)
    return F.silu(a) * b


FOLLOWING = [halves, to_the_end, from_the_back, narrowed, split, viewed, of_another_value]


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("cut", [*FOLLOWING, minus_a_number, by_two_sizes])
def test_a_gate_cut_at_a_computed_size_is_a_block(cut: Callable[[Tensor], Tensor], frontend: str) -> None:
    result = stages(randomize(Gate(cut)), torch.randn(6, 8), frontend=frontend)
    assert result.plan.widths == {"up->down": 6}
    assert result.small.up.weight.shape == (12, 8)
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))


@pytest.mark.parametrize("cut", FOLLOWING)
def test_code_that_takes_a_share_of_the_width_is_right_in_the_models_own_class(cut: Callable[[Tensor], Tensor]) -> None:
    model = randomize(Gate(cut))
    result = stages(model, torch.randn(6, 8), frontend="symbolic", ratio=0.25)
    small = vbpfx.apply_plan(model, result.plan)
    vbpfx.verify(result.captured, small, result.plan, torch.randn(9, 8))


def test_code_that_takes_a_number_off_the_width_is_refused_in_the_models_own_class() -> None:
    model = randomize(Gate(minus_a_number))
    plan = stages(model, torch.randn(6, 8), frontend="symbolic").plan
    with pytest.raises(ArtifactError, match="states the hidden width 12 as a number"):
        vbpfx.apply_plan(model, plan)


def test_branches_of_one_layer_are_cut_where_each_of_them_ends() -> None:
    """The first two thirds are blocks with their own widths; nothing reads the last third."""

    def branches(h: Tensor) -> Tensor:
        d = h.size(1) // 3
        return torch.cat([h[:, :d].relu(), h[:, d : 2 * d].sigmoid()], -1)

    model = randomize(Gate(branches, 16))
    result = stages(model, torch.randn(6, 8), frontend="symbolic", ratio=0.4)
    assert len(result.analysis.blocks) == 2
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))
    with pytest.raises(ArtifactError, match="as a number"):
        vbpfx.apply_plan(model, result.plan)


def test_a_part_of_another_axis_as_long_as_half_the_width_stays_whole() -> None:
    """The width of one block determines which part of a value of another width is taken."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 18), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            y: Tensor = self.b(h) + self.d(self.c(x).tanh()[:, : h.shape[-1] // 2])
            return y

    result = stages(randomize(Two()), torch.randn(6, 8), frontend="symbolic", include=["a*"], ratio=0.5)
    assert result.plan.widths == {"a->b": 12}
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))


def refused(cut: Callable[[Tensor], Tensor]) -> list[str]:
    analysis = vbpfx.find_blocks(vbpfx.capture(randomize(Gate(cut)), torch.randn(6, 8), frontend="symbolic"))
    assert not analysis.blocks
    return [refusal.reason for refusal in analysis.refusals if refusal.name == "up"]


def test_what_changes_with_the_inputs_size_or_is_no_size_is_refused() -> None:
    def by_samples(h: Tensor) -> Tensor:
        d = 12 * h.shape[0] // h.shape[0]
        return h[:, :d] * h[:, d:]

    def by_chunks(h: Tensor) -> Tensor:
        a, b = h.chunk(h.shape[-1] // 12, -1)
        return a * b

    def scaled(h: Tensor) -> Any:
        return h[:, :12] * h.shape[-1]

    assert refused(by_samples) == ["a part of it is cut out whose size depends on the size of an input"]
    assert refused(by_chunks) == ["chunk makes a computed number of parts"]
    assert refused(scaled) == ["its size enters a computation"]
