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
from vbpfx.errors import ArtifactError
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
    assert (block.width, block.groups, block.has_experts) == (EXPERTS * WIDTH, EXPERTS, True)
    (entry,) = s.plan.blocks
    assert any(prediction is not None for prediction in entry.predictions)
    assert any(bool(a.any()) for a in entry.constants) == ("bias" in settings)
    reference = reference_graph(s.captured, s.plan)
    own = vbpfx.apply_plan(net, s.plan)
    shapes = [tuple(own.first.shape), tuple(own.second.shape)]
    assert shapes == [(EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH // 2)]
    for x in (tokens(), tokens(3)):
        with torch.no_grad():
            wanted = expert_by_expert(net, x, entry)
            assert relative_error([net(x)], [wanted]) > 1e-3
            for narrowed in (reference, s.small, own):
                assert relative_error([narrowed(x)], [wanted]) < ROUNDING
    checked = vbpfx.verify(s.captured, s.small, s.plan)
    assert checked.behind is not None
    assert max(checked.error, checked.behind) < ROUNDING
    assert checked.proven
    assert vbpfx.verify(s.captured, own, s.plan).error < ROUNDING
    assert_unchanged(net, before)


def test_each_expert_keeps_neurons_of_its_own() -> None:
    s = stages(mixture("batched"), tokens(), ratio=0.5)
    own = s.plan.blocks[0].block.in_groups(s.plan.blocks[0].kept)
    assert {len(kept) for kept in own} == {WIDTH // 2}
    assert len({tuple(kept) for kept in own}) > 1


@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_those_of_the_rows_of_an_expert(form: str) -> None:
    net = mixture(form, bias=True)
    captured = vbpfx.capture(net, tokens())
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with torch.no_grad():
        for part in tokens().split(30):
            observed(part)
        (found,) = vbpfx.statistics(observed).moments.values()
        rows = tokens().reshape(-1, HIDDEN)
        _, ids = net.router(rows).softmax(-1).topk(2, dim=-1)
        for expert, moments in enumerate(found):
            # without routing, every expert computes all rows
            own = rows if form in ("everywhere", "einsums") else rows[(ids == expert).any(-1)]
            h = net.gated(own @ net.first[expert].T + net.first_bias[expert])
            assert moments.count == len(own)
            torch.testing.assert_close(moments.mean, h.mean(0), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(moments.variance, h.var(0), rtol=1e-9, atol=1e-12)
            if moments.co is not None and moments.held_out is not None:
                assert moments.all_co.covariance.shape == (WIDTH, WIDTH)


def test_an_expert_that_saw_nothing_is_chosen_by_its_weights_and_named_in_the_report() -> None:
    net = mixture("batched", bias=True)
    with torch.no_grad():
        net.router.bias[2] = -1e3
    pruned = vbpfx.prune(net, [tokens()], ratio=0.5, progress=False)
    (entry,) = pruned.plan.blocks
    kept, gone = entry.of_expert(2)
    norms = net.first[2].view(2, WIDTH, HIDDEN).square().sum((0, 2)) + net.second[2].square().sum(0)
    # the bias of the first layer is no weight
    assert kept.tolist() == sorted(norms.argsort()[WIDTH // 2 :].tolist())
    assert len(gone) == WIDTH // 2
    assert not entry.constants[2].any()
    assert entry.predictions[2] is None
    assert pruned.plan.settings["experts"] == {entry.block.name: {"experts": EXPERTS, "unseen": 1, "few_rows": 0}}
    assert f"{entry.block.name}: 1 of {EXPERTS} experts saw no calibration data" in str(pruned.report)


def test_an_expert_that_saw_few_rows_gets_no_predictions() -> None:
    net = mixture("batched", bias=True)
    captured = vbpfx.capture(net, tokens())
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis)
    with torch.no_grad():
        observed(tokens(2))
    plan = vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=0.5)
    found = plan.settings["experts"]["first->second"]
    assert found["few_rows"] + found["unseen"] == EXPERTS
    assert all(prediction is None for prediction in plan.blocks[0].predictions)


def test_experts_without_a_bias_get_no_constants() -> None:
    s = stages(mixture("batched"), tokens(), ratio=0.5)
    (entry,) = s.plan.blocks
    with pytest.raises(ArtifactError, match="no place for constants"):
        BlockPlan(entry.block, entry.kept, tuple(a + 1 for a in entry.constants), entry.predictions)
    with pytest.raises(ArtifactError, match="4 experts need one value each"):
        BlockPlan(entry.block, entry.kept, entry.constants[:1], entry.predictions)


class Twice(Mixture):
    """The same experts run twice in sequence, with other rows for each."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(-1) * 0.7)


@pytest.mark.parametrize("form", ["batched", "grouped", "loop"])
def test_experts_that_are_called_twice_take_one_prediction(form: str) -> None:
    if form == "grouped":
        pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    net = double(Twice(form, bias=True))
    s = stages(net, tokens(), ratio=0.5)
    (entry,) = s.plan.blocks
    assert len(entry.block.sources) == (2 * EXPERTS if form == "loop" else 2)
    x = tokens(3)
    with torch.no_grad():
        wanted = expert_by_expert(net, x, entry) + expert_by_expert(net, x.flip(-1) * 0.7, entry)
        for narrowed in (s.small, vbpfx.apply_plan(net, s.plan)):
            assert relative_error([narrowed(x)], [wanted]) < ROUNDING


@pytest.mark.parametrize("form", ["loop", "grouped"])
def test_a_plan_of_experts_can_be_saved(form: str, tmp_path: Path) -> None:
    s = stages(mixture(form, bias=True), tokens(), ratio=0.5)
    write_atomically(plan_files(s.plan, tmp_path))
    again = load_plan(tmp_path)
    assert again.blocks[0].block == s.plan.blocks[0].block
    with torch.no_grad():
        torch.testing.assert_close(vbpfx.convert(s.captured, again)(tokens(3)), s.small(tokens(3)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "criterion", ["variance", "output_variance", "denoised_variance", "obs", "magnitude", "random"]
)
def test_every_criterion_scores_experts(criterion: str) -> None:
    s = stages(mixture("batched"), tokens(), ratio=0.5, criterion=criterion)
    assert vbpfx.verify(s.captured, s.small, s.plan).error < ROUNDING


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.6}])
def test_budgets_count_the_channels_of_every_expert(budget: dict[str, float]) -> None:
    net = mixture("batched", bias=True)
    s = stages(net, tokens(), **budget)
    (kind,) = budget
    if kind == "params":
        dense, small = (sum(p.numel() for p in network.parameters()) for network in (net, s.small))
    else:
        narrowed = vbpfx.capture(vbpfx.apply_plan(net, s.plan), tokens())
        dense, small = sum(s.captured.macs.values()), sum(narrowed.macs.values())
    assert 0.5 * dense < small <= 0.6 * dense


class Changed(Mixture):
    """A mixture of which the subclass changes what is between the layers of the experts."""

    def __init__(self) -> None:
        super().__init__("batched")
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)


class Shared(Changed):
    def gated(self, h: Tensor) -> Tensor:
        return super().gated(h) * self.scale


class Normed(Changed):
    def gated(self, h: Tensor) -> Tensor:
        return F.layer_norm(super().gated(h), (WIDTH,))


class Moved(Changed):
    def gated(self, h: Tensor) -> Tensor:
        return super().gated(h)[torch.arange(h.shape[0]).flip(0)]


class Other(Mixture):
    """The layers of two different experts follow each other."""

    def __init__(self) -> None:
        super().__init__("loop")

    def loop(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(rows)
        for expert in range(EXPERTS):
            row, place = torch.where(ids == expert)
            h = F.linear(self.gated(F.linear(rows[row], self.first[expert])), self.second[(expert + 1) % EXPERTS])
            y = y.index_add(0, row, h * weights[row, place].unsqueeze(-1))
        return y


class Latent(Mixture):
    """All experts read the same hidden channels, which a layer without experts makes."""

    def __init__(self) -> None:
        super().__init__("einsums")
        self.before, self.after = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)

    def einsums(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.after(super().einsums(self.before(rows).relu(), ids, weights))


@pytest.mark.parametrize(
    ("kind", "weight", "reason"),
    [
        (Shared, "first", "all experts share scale"),
        (Normed, "first", "a statistic is taken over the hidden channels of experts"),
        (Moved, "first", "rows are moved"),
        (Other, "first", "the experts that make it and those that read it may be different ones"),
        (Latent, "before", "experts read it, and before.weight, which is not divided among experts, makes it"),
    ],
)
def test_what_is_left_has_a_reason(kind: Callable[[], Mixture], weight: str, reason: str) -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(double(kind()), tokens()))
    found = [r.reason for r in analysis.refusals if any(weight in name for name in r.producers)]
    assert any(reason in r for r in found), found


def test_the_rows_of_grouped_products_stay_multiples_of_16_bytes() -> None:
    net = copy.deepcopy(mixture("grouped")).float()
    for options in ({"ratio": 0.6}, {"ratio": 0.6, "round_to": 1}, {"ratio": 0.6, "method": "vbp"}):
        s = stages(net, tokens().float(), **options)
        assert s.plan.blocks[0].width == EXPERTS * 4


def transformer(name: str, implementation: str) -> Any:
    """Return a small language model with experts, with random weights."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "head_dim": 8, "max_position_embeddings": 32}
    experts = {
        "Mixtral": {"intermediate_size": 64, "num_local_experts": 4},
        "Qwen3Moe": {"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4},
        "GptOss": {"intermediate_size": 64, "num_local_experts": 4},
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **ends, **experts[name], num_experts_per_tok=2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_experts_implementation(implementation)
    randomize(model)
    return model


@pytest.mark.parametrize(
    ("name", "implementation"), [("Mixtral", "grouped_mm"), ("Qwen3Moe", "grouped_mm"), ("GptOss", "batched_mm")]
)
def test_language_models_with_experts(name: str, implementation: str, tmp_path: Path) -> None:
    model = transformer(name, implementation)
    ids = {"input_ids": torch.randint(1, 50, (24, 9), generator=torch.Generator().manual_seed(0))}
    s = stages(model, ids, ratio=0.5, uniform=True)
    (block,) = [block for block in s.analysis.blocks if block.has_experts]
    assert (block.width, block.groups) == (4 * 64, 4)
    spent = {node: macs for node, macs in s.captured.macs.items() if "grouped" in node or "bmm" in node}
    assert len(spent) == 2
    assert sum(spent.values()) > 0.7 * sum(s.captured.macs.values())
    wide = stages(double(model), ids, ratio=0.5)
    with torch.no_grad():
        found, expected = (network(**ids) for network in (wide.small, reference_graph(wide.captured, wide.plan)))
    tensors = [next(iter(output.values())) if isinstance(output, dict) else output[0] for output in (found, expected)]
    assert relative_error(tensors[:1], tensors[1:]) < 1e-9
    assert vbpfx.verify(s.captured, s.small, s.plan).proven
    own = vbpfx.apply_plan(model, s.plan)
    assert vbpfx.verify(s.captured, own, s.plan).error < 1e-5
    own.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(type(own).from_pretrained(tmp_path)(**ids).logits, own(**ids).logits)
