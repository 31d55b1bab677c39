"""Mixtures of experts: every expert loses as many hidden channels, each its own, and the result is exact.

The reference runs every expert by itself on the rows that are routed to it, with channels that are replaced by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_unchanged, double, randomize, stages, state
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ArtifactError, CalibrationError
from vbpfx.outputs.differences import relative_error
from vbpfx.plans.files import load_plan, plan_files
from vbpfx.plans.records import BlockPlan
from vbpfx.rewrite.substitute import reference_graph
from vbpfx.storage.files import write_atomically

# Rounding of a few hundred sums of products in float64.
ROUNDING = 1e-12
EXPERTS, WIDTH, HIDDEN = 4, 12, 6


def tokens(samples: int = 80, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(samples * length)
    return torch.randn(samples, length, HIDDEN, generator=generator, dtype=torch.float64)


class Mixture(nn.Module):
    """Experts with packed gates, run by ``form``; the two best experts of a row are weighted by a softmax.

    Args:
        form: how the experts are run.
        bias: whether their layers have biases.
        interleaved: whether gates and values alternate in the first layer, as in gpt-oss, with clamped values.
    """

    def __init__(self, form: str, *, bias: bool = False, interleaved: bool = False) -> None:
        super().__init__()
        self.form, self.interleaved = form, interleaved
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.first_bias = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH)) if bias else None
        self.second_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if bias else None
        self.head = nn.Linear(HIDDEN, 3)

    def gated(self, h: Tensor) -> Tensor:
        if self.interleaved:
            gate, value = h[..., ::2].clamp(max=2.0), h[..., 1::2].clamp(-2.0, 2.0)
            return gate * torch.sigmoid(gate * 1.7) * (value + 1)
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, ids = self.router(rows).softmax(-1).topk(2, dim=-1)
        y = getattr(self, self.form)(rows, ids, weights)
        return self.head(x + y.reshape(x.shape))

    def batched(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen, h = ids.reshape(-1), rows.repeat_interleave(2, dim=0)
        h = torch.bmm(self.first[chosen], h.unsqueeze(-1)).squeeze(-1)
        if self.first_bias is not None:
            h = h + self.first_bias[chosen]
        y = torch.bmm(self.second[chosen], self.gated(h).unsqueeze(-1)).squeeze(-1)
        if self.second_bias is not None:
            y = y + self.second_bias[chosen]
        return (y * weights.reshape(-1, 1)).view(-1, 2, HIDDEN).sum(1)

    def loop(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(rows)
        for expert in range(EXPERTS):
            row, place = torch.where(ids == expert)
            first = None if self.first_bias is None else self.first_bias[expert]
            second = None if self.second_bias is None else self.second_bias[expert]
            h = self.gated(F.linear(rows[row], self.first[expert], first))
            h = F.linear(h, self.second[expert], second)
            y = y.index_add(0, row, h * weights[row, place].unsqueeze(-1))
        return y

    def everywhere(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = rows.unsqueeze(0).expand(EXPERTS, -1, -1)
        h = torch.bmm(h, self.first.transpose(1, 2))
        if self.first_bias is not None:
            h = h + self.first_bias.unsqueeze(1)
        y = torch.bmm(self.gated(h), self.second.transpose(1, 2))
        if self.second_bias is not None:
            y = y + self.second_bias.unsqueeze(1)
        share = (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1)
        return (y * share.t().unsqueeze(-1)).sum(0)

    def einsums(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = torch.einsum("nh,eih->nei", rows, self.first)
        if self.first_bias is not None:
            h = h + self.first_bias
        y = torch.einsum("nei,ehi->neh", self.gated(h), self.second)
        if self.second_bias is not None:
            y = y + self.second_bias
        share = (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1)
        return (y * share.unsqueeze(-1)).sum(1)

    def grouped(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen, order = torch.sort(ids.reshape(-1), stable=True)
        ends = torch.cumsum(F.one_hot(chosen, EXPERTS).sum(0), 0).to(torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        h = product(rows[order // 2], self.first.transpose(-2, -1), ends)
        if self.first_bias is not None:
            h = h + self.first_bias[chosen]
        y = product(self.gated(h), self.second.transpose(-2, -1), ends)
        if self.second_bias is not None:
            y = y + self.second_bias[chosen]
        y = (y * weights.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
        return y.view(-1, 2, HIDDEN).sum(1)


def mixture(form: str, **settings: bool) -> Mixture:
    if form == "grouped":
        pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    net = Mixture(form, **settings)
    nn.init.normal_(net.router.weight, std=2.0)
    return double(net)


def expert_by_expert(net: Mixture, x: Tensor, entry: BlockPlan) -> Tensor:
    """Return the output of a mixture in which the removed channels of every expert are replaced by a + B h_K."""
    rows = x.reshape(-1, HIDDEN)
    weights, ids = net.router(rows).softmax(-1).topk(2, dim=-1)
    y = torch.zeros_like(rows)
    for expert in range(EXPERTS):
        own = range(expert * WIDTH, (expert + 1) * WIDTH)
        kept = [c - expert * WIDTH for c in entry.kept if c in own]
        gone = [c for c in range(WIDTH) if c not in kept]
        for row, place in (ids == expert).nonzero().tolist():
            h = net.first[expert] @ rows[row]
            if net.first_bias is not None:
                h = h + net.first_bias[expert]
            h = net.gated(h).clone()
            prediction = entry.predictions[expert]
            h[gone] = entry.constants[expert] + (0.0 if prediction is None else prediction @ h[kept])
            h = net.second[expert] @ h
            if net.second_bias is not None:
                h = h + net.second_bias[expert]
            y[row] += weights[row, place] * h
    return net.head(x + y.reshape(x.shape))


FORMS = ("batched", "loop", "everywhere", "einsums", "grouped")


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "settings", [{}, {"bias": True}, {"bias": True, "interleaved": True}], ids=["plain", "bias", "interleaved"]
)
def test_experts_are_narrowed_exactly(form: str, settings: dict[str, bool], frontend: Any) -> None:
    net = mixture(form, **settings)
    before = state(net)
    s = stages(net, tokens(), frontend=frontend, ratio=0.5, method="auto")
    (block,) = s.analysis.blocks
    assert (block.width, block.groups, block.is_stack) == (EXPERTS * WIDTH, EXPERTS, True)
    (entry,) = s.plan.blocks
    assert any(prediction is not None for prediction in entry.predictions)
    assert any(bool(a.any()) for a in entry.constants) == ("bias" in settings)
    reference = reference_graph(s.captured, s.plan)
    own = vbpfx.apply_plan(net, s.plan)
    assert own.first.shape == (EXPERTS, WIDTH, HIDDEN) and own.second.shape == (EXPERTS, HIDDEN, WIDTH // 2)
    for x in (tokens(), tokens(3)):
        with torch.no_grad():
            wanted = expert_by_expert(net, x, entry)
            assert relative_error([net(x)], [wanted]) > 1e-3
            for narrowed in (reference, s.small, own):
                assert relative_error([narrowed(x)], [wanted]) < ROUNDING
    checked = vbpfx.verify(s.captured, s.small, s.plan)
    assert checked.error < ROUNDING and checked.behind is not None and checked.behind < ROUNDING and checked.proven
    assert vbpfx.verify(s.captured, own, s.plan).error < ROUNDING
    assert_unchanged(net, before)
