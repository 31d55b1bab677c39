"""Attention: values, queries and keys of every head are found, narrowed, and equal to the dense network with channels replaced."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.graph.capture import tensor_named
from vbpfx.plans.files import load_plan

# Rounding errors of a few dozen operations in float64; other coordinates multiply them by the condition of their matrices.
ROUNDING, IN_COORDINATES = 1e-12, 1e-10
C, H, D, N = 12, 3, 4, 5


class Layers(nn.Module):
    """Attention whose code is given as a function, beside an MLP."""

    def __init__(
        self, attend: Callable[..., Tensor], *, kv: int = H, packed: bool = False, **further: nn.Module
    ) -> None:
        super().__init__()
        self.attend, self.heads = attend, H
        if packed:
            self.qkv = nn.Linear(C, 3 * H * D)
        else:
            self.q, self.k, self.v = nn.Linear(C, H * D), nn.Linear(C, kv * D), nn.Linear(C, kv * D)
        self.o = nn.Linear(H * D, C)
        self.mlp = nn.Sequential(nn.Linear(C, 16), nn.GELU(), nn.Linear(16, C))
        for name, module in further.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self, x)
        return x + self.mlp(x)


def _heads(x: Tensor, heads: int = H) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, D).transpose(1, 2)


def _merged(m: Layers, y: Tensor) -> Tensor:
    return m.o(y.transpose(1, 2).flatten(2))


def _fused(m: Layers, x: Tensor) -> Tensor:
    return _merged(m, F.scaled_dot_product_attention(_heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))))


def _written_out(m: Layers, x: Tensor) -> Tensor:
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    return _merged(m, (q @ k.transpose(-2, -1) * D**-0.5).softmax(-1) @ v)


def _size_of_input(m: Layers, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = (y.reshape(b, n, m.heads, c // m.heads).permute(0, 2, 1, 3) for y in (m.q(x), m.k(x), m.v(x)))
    return m.o(F.scaled_dot_product_attention(q, k, v, scale=0.3).permute(0, 2, 1, 3).reshape(b, n, c))


def _three_first(m: Layers, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def _three_indexed(m: Layers, x: Tensor) -> Tensor:
    qkv = m.qkv(x).view(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4)
    return _merged(m, F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]))


def _three_behind_heads(m: Layers, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], H, 3, D).permute(3, 0, 2, 1, 4).unbind(0)
    return _merged(m, F.scaled_dot_product_attention(q, k, v))


def _chunks(m: Layers, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return _merged(m, F.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v)))


def _chunks_of_heads(m: Layers, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return _merged(m, F.scaled_dot_product_attention(q, k, v))


def _samples_and_heads(m: Layers, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (_heads(y).reshape(b * H, n, D) for y in (m.q(x), m.k(x), m.v(x)))
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return _merged(m, torch.bmm(weights, v).view(b, H, n, D))


def _einsum(m: Layers, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (H, D)) for y in (m.q(x), m.k(x), m.v(x)))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return m.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def _shared_keys(repeat: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def attend(m: Layers, x: Tensor) -> Tensor:
        q = m.q2(x).view(x.shape[0], x.shape[1], 2 * H, D).transpose(1, 2)
        k, v = (repeat(_heads(y), 2) for y in (m.k(x), m.v(x)))
        return m.o2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return attend


def _expanded(x: Tensor, times: int) -> Tensor:
    b, heads, n, d = x.shape
    return x[:, :, None].expand(b, heads, times, n, d).reshape(b, heads * times, n, d)


def _enable_gqa(m: Layers, x: Tensor) -> Tensor:
    q = m.q2(x).view(x.shape[0], x.shape[1], 2 * H, D).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, _heads(m.k(x)), _heads(m.v(x)), enable_gqa=True)
    return m.o2(y.transpose(1, 2).flatten(2))


def _one_key_for_all(m: Layers, x: Tensor) -> Tensor:
    q, k, v = _heads(m.q(x)), m.k(x)[:, None], m.v(x)[:, None]
    return _merged(m, (q @ k.mT * 0.5).softmax(-1) @ v)


def _wide() -> dict[str, Any]:
    return {"q2": nn.Linear(C, 2 * H * D), "o2": nn.Linear(2 * H * D, C)}


# Name -> the network, and the groups and widths of its values and of its queries and keys.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "fused": (lambda: Layers(_fused), {"value": (H, H * D), "query": (H, H * D)}),
    "written out": (lambda: Layers(_written_out), {"value": (H, H * D), "query": (H, H * D)}),
    "width of the input": (lambda: Layers(_size_of_input), {"value": (H, H * D), "query": (H, H * D)}),
    "packed, three first": (lambda: Layers(_three_first, packed=True), {"value": (H, H * D), "query": (H, H * D)}),
    "packed, indexed": (lambda: Layers(_three_indexed, packed=True), {"value": (H, H * D), "query": (H, H * D)}),
    "packed, heads first": (lambda: Layers(_three_behind_heads, packed=True), {"value": (H, H * D), "query": (H, H * D)}),
    "packed, chunks": (lambda: Layers(_chunks, packed=True), {"value": (H, H * D), "query": (H, H * D)}),
    "packed, chunks of heads": (lambda: Layers(_chunks_of_heads, packed=True), {"value": (H, H * D), "query": (H, H * D)}),
    "samples and heads in one axis": (lambda: Layers(_samples_and_heads), {"value": (H, H * D), "query": (H, H * D)}),
    "einsum": (lambda: Layers(_einsum), {"value": (H, H * D), "query": (H, H * D)}),
    "keys expanded": (lambda: Layers(_shared_keys(_expanded), **_wide()), {"value": (H, H * D), "query": (H, H * D)}),
    "keys repeated": (
        lambda: Layers(_shared_keys(lambda x, times: x.repeat_interleave(times, dim=1)), **_wide()),
        {"value": (H, H * D), "query": (H, H * D)},
    ),
    "keys shared by the call": (lambda: Layers(_enable_gqa, **_wide()), {"value": (H, H * D), "query": (H, H * D)}),
    "one key for all heads": (lambda: Layers(_one_key_for_all, kv=1), {"value": (1, D), "query": (1, D)}),
}  # fmt: skip
FRONTENDS = ("symbolic", "export")


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(NETWORKS[name][0]()).double().eval()


def _batch(samples: int = 24) -> Tensor:
    return torch.randn(samples, N, C, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_heads_are_found_and_every_head_keeps_channels_of_its_own(name: str, frontend: str) -> None:
    model = _model(name)
    analysis = vbpfx.find_blocks(vbpfx.capture(model, _batch(3), frontend=frontend))
    found = {block.kind: (block.groups, block.width) for block in analysis.blocks}
    assert found == {"mlp": (1, 16), **NETWORKS[name][1]}
    assert [block.kind for block in analysis.usual] == ["mlp"], "by default attention stays as it is"
    assert all(block.linear for block in analysis.blocks if block.kind != "mlp")


@pytest.mark.parametrize("kinds", [["value"], ["query"], ["mlp", "value", "query"]], ids="+".join)
@pytest.mark.parametrize("method", ["vbp", "auto"])
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_narrowed_network_is_the_dense_one_with_channels_replaced(
    name: str, frontend: str, method: str, kinds: list[str]
) -> None:
    ratio = dict.fromkeys(kinds, 0.5)
    pruned = vbpfx.prune(_model(name), [_batch()], ratio=ratio, method=method, frontend=frontend, progress=False)
    assert {entry.block.kind for entry in pruned.plan.blocks} == set(kinds)
    assert pruned.verification.error < (ROUNDING if method == "vbp" else IN_COORDINATES)
    assert pruned.verification.behind < (ROUNDING if method == "vbp" else IN_COORDINATES)
    assert pruned.verification.proven
    assert pruned.verification.effect > 1e-6
    for entry in pruned.plan.blocks:
        assert (entry.basis is not None) == (method == "auto" and entry.block.kind != "mlp")
        assert {len(group) for group in entry.block.in_groups(entry.kept)} == {entry.block.group_size // 2}


def _by_hand(model: Layers, x: Tensor, query: vbpfx.BlockPlan, value: vbpfx.BlockPlan) -> Tensor:
    """Compute :func:`_fused` with keys that are 0 and values that are constant at removed channels."""
    with torch.no_grad():
        q, k, v = model.q(x), model.k(x), model.v(x)
        k[..., list(query.pruned)] = 0.0
        weights = torch.softmax(_heads(q) @ _heads(k).mT / math.sqrt(D), -1)
        read = (weights @ _heads(v)).transpose(1, 2).flatten(2)
        read[..., list(value.pruned)] = value.constants[0]
        x = x + model.o(read)
        return x + model.mlp(x)


def test_removed_keys_are_zero_and_removed_values_are_their_means() -> None:
    model, batch = _model("fused"), _batch()
    pruned = vbpfx.prune(
        model, [batch], ratio={"query": 0.5, "value": 0.25}, method="vbp", allocation="equal", progress=False
    )
    entries = {entry.block.kind: entry for entry in pruned.plan.blocks}
    expected = _by_hand(model, batch, entries["query"], entries["value"])
    torch.testing.assert_close(pruned.graph_module(batch), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        weights = torch.softmax(_heads(model.q(batch)) @ _heads(model.k(batch)).mT / math.sqrt(D), -1)
        read = (weights @ _heads(model.v(batch))).transpose(1, 2).flatten(2).flatten(0, 1)
    torch.testing.assert_close(entries["value"].constants[0], read.mean(0)[list(entries["value"].pruned)])


def test_queries_and_keys_lose_the_channels_that_move_the_products_least() -> None:
    model, batch = _model("fused"), _batch()
    pruned = vbpfx.prune(model, [batch], ratio={"query": 0.5}, method="vbp", progress=False)
    with torch.no_grad():
        scores = model.q(batch).flatten(0, 1).square().mean(0) * model.k(batch).flatten(0, 1).var(0)
    (entry,) = pruned.plan.blocks
    expected = [
        head * D + c for head, own in enumerate(scores.view(H, D)) for c in own.topk(2).indices.sort().values.tolist()
    ]
    assert list(entry.kept) == expected


def test_the_best_rank_of_the_products_is_kept() -> None:
    """The kept part of queries and keys is the truncated singular value decomposition, computed here from all products."""
    model, batch = _model("fused"), _batch(200)
    pruned = vbpfx.prune(model, [batch], ratio={"query": 0.5}, reconstruct=False, progress=False)
    (entry,) = pruned.plan.blocks
    assert entry.basis is not None
    kept = entry.block.group_size // 2
    with torch.no_grad():
        q, k = (_heads(layer(batch)).movedim(1, 0).flatten(1, 2) for layer in (model.q, model.k))  # (H, rows, D)
        k = k - k.mean(1, keepdim=True)
    for head in range(H):
        m, c = (x[head].T @ x[head] / x.shape[1] for x in (q, k))

        def error(products: Tensor, m: Tensor = m, c: Tensor = c) -> float:
            return float(torch.trace(m @ products @ c @ products.T))

        to, back = entry.basis.to[head], entry.basis.back[head]
        removed = torch.eye(D).double() - to[:kept].T @ back[:, :kept].T
        s = torch.linalg.eigvals(m @ c).real.sort(descending=True).values
        assert error(removed) == pytest.approx(float(s[kept:].sum()), rel=1e-2), (
            "rows for covariances are a part of all rows"
        )


def test_values_keep_the_subspace_that_the_layer_reads_best() -> None:
    model, batch = _model("fused"), _batch(200)
    pruned = vbpfx.prune(model, [batch], ratio={"value": 0.5}, reconstruct=False, compensation="mean", progress=False)
    (entry,) = pruned.plan.blocks
    assert entry.basis is not None
    kept = entry.block.group_size // 2
    with torch.no_grad():
        weights = torch.softmax(_heads(model.q(batch)) @ _heads(model.k(batch)).mT / math.sqrt(D), -1)
        read = (weights @ _heads(model.v(batch))).movedim(1, 0).flatten(1, 2)
    for head in range(H):
        c = torch.cov(read[head].T)
        w = tensor_named(model, "o.weight").detach()[:, head * D : (head + 1) * D]
        s = torch.linalg.svdvals(w @ torch.linalg.cholesky(c))
        removed = torch.eye(D).double() - entry.basis.back[head][:, :kept] @ entry.basis.to[head][:kept]
        error = torch.trace(w @ removed @ c @ removed.T @ w.T)
        assert float(error) == pytest.approx(float(s[kept:].square().sum()), rel=1e-2)


def test_a_plan_with_coordinates_is_saved_and_applied_again(tmp_path: Path) -> None:
    model = _model("packed, three first")
    pruned = vbpfx.prune(model, [_batch()], ratio={"mlp": 0.5, "query": 0.5, "value": 0.5}, progress=False)
    pruned.save(tmp_path / "small")
    torch.testing.assert_close(
        vbpfx.load(tmp_path / "small")(_batch(2)), pruned.graph_module(_batch(2)), rtol=0, atol=0
    )
    plan = load_plan(tmp_path / "small")
    again = vbpfx.convert(vbpfx.capture(model, _batch(2)), plan)
    torch.testing.assert_close(again(_batch(2)), pruned.graph_module(_batch(2)), rtol=0, atol=0)
    basis = next(entry.basis for entry in pruned.plan.blocks if entry.block.kind == "query")
    kept = next(entry.basis for entry in plan.blocks if entry.block.kind == "query")
    assert basis is not None
    assert kept is not None
    assert torch.equal(basis.to, kept.to)


def test_the_models_own_class_says_why_it_cannot_hold_narrowed_heads() -> None:
    model = _model("packed, three first")
    pruned = vbpfx.prune(model, [_batch()], ratio={"query": 0.5}, progress=False)
    with pytest.raises(vbpfx.ArtifactError, match=r"attention .* compute its scale from the width"):
        vbpfx.apply_plan(model, pruned.plan)
    pruned = vbpfx.prune(model, [_batch()], ratio={"value": 0.5}, progress=False)
    with pytest.raises(vbpfx.ArtifactError, match="states the hidden width"):
        vbpfx.apply_plan(model, pruned.plan)


def test_the_model_is_not_changed() -> None:
    model = _model("fused")
    before = copy.deepcopy(model.state_dict())
    vbpfx.prune(model, [_batch()], ratio={"mlp": 0.5, "query": 0.5, "value": 0.5}, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _mixed(m: Layers, x: Tensor) -> Tensor:
    v = _heads(m.v(x)).flip(1)  # the heads in another order
    return _merged(m, F.scaled_dot_product_attention(_heads(m.q(x)), _heads(m.k(x)), v))


def _scaled_channels(m: Layers, x: Tensor) -> Tensor:
    return _merged(m, F.scaled_dot_product_attention(_heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x)) * m.norm.weight))


def test_heads_that_cannot_be_told_apart_lose_the_same_channels() -> None:
    for attend in (_mixed, _scaled_channels):
        torch.manual_seed(0)
        model = randomize(Layers(attend, norm=nn.LayerNorm(D))).double().eval()
        pruned = vbpfx.prune(model, [_batch()], ratio={"value": 0.5}, progress=False)
        (entry,) = pruned.plan.blocks
        assert (entry.block.groups, entry.block.width, entry.width) == (1, D, D // 2)
        assert pruned.verification.error < ROUNDING
    assert entry.basis is None, "a scale of every channel forbids linear combinations"


def test_norms_of_queries_and_keys_are_carried() -> None:
    def attend(m: Layers, x: Tensor) -> Tensor:
        q, k = m.q_norm(_heads(m.q(x))), m.k_norm(_heads(m.k(x)))
        return _merged(m, F.scaled_dot_product_attention(q, k, _heads(m.v(x)), scale=0.5))

    torch.manual_seed(0)
    model = randomize(Layers(attend, q_norm=nn.LayerNorm(D), k_norm=nn.LayerNorm(D))).double().eval()
    pruned = vbpfx.prune(model, [_batch()], ratio={"query": 0.5}, method="vbp", progress=False)
    (entry,) = pruned.plan.blocks
    assert (entry.block.groups, entry.width, len(entry.block.reductions)) == (1, D // 2, 2)
    assert pruned.verification.error < ROUNDING


def test_an_encoder_layer_of_torch_is_narrowed_whole() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, H, 16, batch_first=True)
    model = randomize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).double().eval()
    pruned = vbpfx.prune(model, [_batch()], ratio={"mlp": 0.5, "query": 0.5, "value": 0.5}, progress=False)
    assert len(pruned.plan.blocks) == 6
    assert pruned.verification.error < IN_COORDINATES


def test_macs_count_both_products_of_attention() -> None:
    model = _model("fused")
    for kind in ("query", "value"):
        pruned = vbpfx.prune(model, [_batch()], ratio={kind: 0.5}, method="vbp", allocation="equal", progress=False)
        dense, small = pruned.report.macs
        # two projections of queries and keys, or one of values and the output layer, and one of the two products
        assert dense - small == N * (2 * C * H * D + N * H * D) // 2
        asked = vbpfx.prune(model, [_batch()], macs=small / dense, kinds=kind, method="vbp", progress=False)
        assert asked.report.macs[1] == small


def test_kinds_that_do_not_exist_are_an_error() -> None:
    model = _model("fused")
    with pytest.raises(vbpfx.BudgetError, match="names no kinds of blocks; choose from mlp, value, query"):
        vbpfx.prune(model, [_batch()], ratio=0.5, kinds="attention", progress=False)
    with pytest.raises(vbpfx.BudgetError, match="leave kinds out"):
        vbpfx.prune(model, [_batch()], ratio={"mlp": 0.5}, kinds="mlp", progress=False)
    with pytest.raises(vbpfx.BudgetError, match="names kinds of blocks with their ratios"):
        vbpfx.prune(model, [_batch()], ratio={"heads": 0.5}, progress=False)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(vbpfx.AnalysisError, match=r"no block of the kinds value.*pass kinds=\['mlp'\]"):
        vbpfx.prune(mlp, [torch.randn(8, 4)], ratio=0.5, kinds="value", progress=False)


def test_a_single_head_is_attention_as_well() -> None:
    def single(m: Layers, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], x.shape[1], 1, H * D).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], H * D))

    captured = vbpfx.capture(Layers(single).eval(), torch.randn(2, N, C))
    analysis = vbpfx.find_blocks(captured)
    assert {block.kind for block in analysis.blocks} == {"mlp", "query", "value"}
    assert [block.producers for block in analysis.usual] == [("mlp.0.weight",)]


def test_a_bias_that_the_fold_creates_has_the_precision_of_the_model() -> None:
    network = Layers(_fused).float().eval()
    network.o = nn.Linear(H * D, C, bias=False)
    pruned = vbpfx.prune(network, [torch.randn(16, N, C)], ratio={"value": 0.5}, progress=False)
    assert pruned.plan.blocks[0].basis is not None
    assert {parameter.dtype for parameter in pruned.graph_module.parameters()} == {torch.float32}
