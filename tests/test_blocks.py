"""The analysis finds the expected blocks of each network and refuses the others, and the oracle holds for all it finds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from oracle import double, randomize, stages
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FOUND, REFUSED, Case, Net

import vbpfx
from vbpfx.outputs.differences import relative_error
from vbpfx.rewrite.substitute import reference_graph

# Rounding errors of a few dozen operations in float64.
ROUNDING = 1e-12


def _cases(cases: list[Case]) -> list:
    return [pytest.param(c, f, id=f"{c.name}-{f}") for c in cases for f in c.frontends]


@pytest.mark.parametrize(("case", "frontend"), _cases(FOUND))
def test_blocks_are_found_and_the_oracle_holds(case: Case, frontend: str) -> None:
    model = double(randomize(case.make()))
    batch = case.batch().double()
    result = stages(model, batch, frontend=frontend)
    assert {b.name: b.width for b in result.analysis.usual} == case.blocks
    assert result.captured.batch is not None, "the batch axis was lost"
    verified = vbpfx.verify(result.captured, result.small, result.plan, tolerance=ROUNDING)
    assert verified.effect > 1e-6, "the substitution does nothing, so the comparison shows nothing"
    other = torch.cat([batch, batch[:2].flip(0)])
    with torch.no_grad():
        expected = pytree.tree_leaves(reference_graph(result.captured, result.plan)(other))
        found = pytree.tree_leaves(result.small(other))
    assert relative_error(found, expected) < ROUNDING


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in FOUND])
def test_own_class_computes_the_same(case: Case) -> None:
    model = double(randomize(case.make()))
    result = stages(model, case.batch().double(), frontend=case.frontends[0])
    if case.own:
        with pytest.raises(vbpfx.ArtifactError, match=case.own):
            vbpfx.apply_plan(model, result.plan)
        return
    small = vbpfx.apply_plan(model, result.plan)
    vbpfx.verify(result.captured, small, result.plan, tolerance=ROUNDING)


@pytest.mark.parametrize(("case", "frontend"), _cases(REFUSED))
def test_refusals_have_their_reason(case: Case, frontend: str) -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(randomize(case.make()), case.batch(), frontend=frontend))
    assert {b.name: b.width for b in analysis.usual} == case.blocks
    for name, part in (case.refused or {}).items():
        assert any(part in r.reason for r in analysis.refusals if r.name == name), analysis.refusals
    assert all(r.reason and r.width > 0 for r in analysis.refusals)


def test_forward_hooks_on_a_layer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(2, 8)))
    assert not analysis.blocks
    assert any("forward hooks" in refusal.reason for refusal in analysis.refusals if refusal.name == "0")


def test_the_observed_value_is_the_consumers_real_input() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).double()
    batch = torch.randn(7, 5, 8).double()
    (moments,) = stages(model, batch).statistics.moments["0->2"]
    hidden = model[1](model[0](batch)).detach().reshape(-1, 12)
    assert moments.count == 35
    torch.testing.assert_close(moments.mean, hidden.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, hidden.var(0), rtol=1e-12, atol=0)


def test_printing_the_analysis_names_blocks_and_reasons() -> None:
    text = str(vbpfx.find_blocks(vbpfx.capture(FOUND[10].make(), FOUND[10].batch())))
    assert "1 block, 12 hidden neurons; 2 blocks of attention, narrowed if kinds asks for them" in text
    assert "query" in text
    assert "it reaches the output of the model" in text


class _Positions(nn.Module):
    """A block over data plus a block over positions, which are computed from a table, a parameter, or a size."""

    def __init__(self, positions: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.real = (nn.Sequential(nn.Linear(d, 12), nn.ReLU(), nn.Linear(12, 8)) for d in (2, 8))
        self.positions, self.query = positions, nn.Parameter(torch.randn(5, 2))
        self.register_buffer("table", torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x + self.own(self.positions(self, x)))


def _written(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros_like(x[..., :2])
    table[..., 0] = x[..., 0]
    return table


WITHOUT_DATA = {
    "a buffer": lambda m, x: m.table,
    "a parameter": lambda m, x: m.query,
    "a size": lambda m, x: torch.arange(x.shape[1])[:, None].expand(-1, 2).float(),
    "zeros like the data": lambda m, x: torch.zeros_like(x[..., :2]),
    "a table in the data's form": lambda m, x: m.table.to(x).expand_as(x[..., :2]),
}
WITH_DATA = {
    "data": lambda m, x: x[..., :2],
    "a table and data": lambda m, x: m.table * x.mean(-1, keepdim=True),
    "zeros that data is written into": _written,
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_a_block_that_no_input_reaches_is_left_out_of_the_budget(name: str, frontend: str) -> None:
    torch.manual_seed(0)
    model, batch = _Positions(WITHOUT_DATA[name]).eval(), torch.randn(16, 5, 8)
    result = stages(model, batch, frontend=frontend)
    assert result.plan.widths == {"real": 6}, "the real block takes all of the budget"
    (refusal,) = (r for r in result.analysis.refusals if r.name == "own.0")
    assert refusal.width == 12
    assert "it does not depend on the model's inputs" in refusal.reason
    assert not any(layer.weight.startswith("own") for layer in result.analysis.layers), "nor is it fitted anew"


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_block_that_data_reaches_somewhere_stays_a_block(name: str) -> None:
    model, batch = _Positions(WITH_DATA[name]).eval(), torch.randn(16, 5, 8)
    assert {b.name for b in stages(model, batch).analysis.blocks} == {"own", "real"}


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


class _Translator(nn.Module):
    """nn.Transformer inside a model: an encoder and a decoder."""

    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        self.t, self.head = nn.Transformer(8, 2, 1, 1, 12, batch_first=True), head

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        made = self.t(a, b)
        return made if self.head is None else self.head(made)


@pytest.mark.parametrize("head", [_two_layers(), None], ids=["with a head", "alone"])
def test_the_layers_of_a_transformer_inside_a_model_are_found(head: nn.Module | None) -> None:
    model = randomize(_Translator(head)).double().eval()
    batch = (torch.randn(4, 5, 8).double(), torch.randn(4, 7, 8).double())
    pruned = vbpfx.prune(model, [batch], ratio=0.5, method="vbp", progress=False, min_width=1)
    found = {block.name: block.width for block in pruned.analysis.usual}
    assert found == {"t.encoder.layers.0": 12, "t.decoder.layers.0": 12} | ({"head": 12} if head else {})
    assert pruned.verification.error < ROUNDING


def test_a_module_that_runs_another_in_parallel_or_compiled_is_looked_into() -> None:
    torch.manual_seed(0)
    batch = torch.randn(16, 8)
    plain = nn.Sequential(_two_layers(), nn.LayerNorm(8), _two_layers())
    expected = vbpfx.prune(plain, [batch], ratio=0.5, method="vbp", progress=False)
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for wrap, inner in ((nn.DataParallel, "module"), (torch.compile, "_orig_mod")):
            model = nn.Sequential(wrap(plain[0]), *plain[1:])
            pruned = vbpfx.prune(model, [batch], ratio=0.5, method="vbp", progress=False)
            widths = {name.replace(f".{inner}", ""): width for name, width in pruned.plan.widths.items()}
            assert widths == expected.plan.widths
            torch.testing.assert_close(pruned.graph_module(batch), expected.graph_module(batch), rtol=0, atol=1e-6)
    finally:
        torch.compiler.set_stance("default")


class _Leaves(nn.Module):
    """Layers of torch.nn that hold weights, return several values, and have no row in the operator table."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.recurrent = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, 2)
        self.mlp = _two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.recurrent(self.attention(x, x, x)[0])[0])


def test_a_layer_without_a_row_is_refused_by_name_with_all_its_weights() -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(_Leaves(), torch.randn(4, 5, 8), frontend="symbolic"))
    assert [block.name for block in analysis.blocks] == ["mlp"]
    found = {(r.name, r.width): (set(r.producers), r.reason) for r in analysis.refusals}
    weights, reason = found["recurrent", 32]
    assert weights == {f"recurrent.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
    assert "operator LSTM is not in the operator table" in reason
    assert found["attention", 24][0] == {"attention.in_proj_weight"}
    assert found["attention", 8][0] == {"attention.out_proj.weight"}, "it lies one module deeper"


@pytest.mark.filterwarnings("ignore")  # both are deprecated but still used in models
def test_quantised_and_scripted_layers_are_refused_by_name() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(_two_layers().eval(), {nn.Linear})
    with pytest.raises(vbpfx.AnalysisError, match=r"0: layer 0 is quantised \(Linear\): prune the plain model"):
        vbpfx.prune(quantised, [torch.randn(4, 8)], ratio=0.5, progress=False)
    model = nn.Sequential(torch.jit.trace(_two_layers(), torch.randn(4, 8)), _two_layers())
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(4, 8)))
    assert [block.name for block in analysis.blocks] == ["1"]
    assert any(r.name == "0" and "layer 0 is TorchScript" in r.reason for r in analysis.refusals)


PLAIN = {
    "weight_norm": (nn.utils.weight_norm, r"made by weight_norm.*torch\.nn\.utils\.remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, r"made by spectral_norm.*torch\.nn\.utils\.remove_spectral_norm"),
    "mask": (lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.3), r"masked.*prune\.remove\(layer, 'weight'\)"),
    "parametrized": (nn.utils.parametrizations.weight_norm, r"parametrize\.remove_parametrizations"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_made_before_every_call_is_named_once_with_the_way_to_undo_it(name: str) -> None:
    make, reason = PLAIN[name]
    model = _two_layers()
    make(model[0])
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(4, 8)))
    (refusal,) = (r for r in analysis.refusals if r.producers[0].startswith("0."))
    assert refusal.name == "0"
    assert re.search(reason, refusal.reason), refusal.reason


class _Stream(nn.Module):
    """Two blocks on a stream x, with a gate g computed from another input and layers t on the stream."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.i, self.g, self.o, self.step = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 5), step
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2))
        self.t, self.s = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, g = self.i(x), self.g(c)
        for f, t in zip(self.f, self.t, strict=True):
            x = self.step(x, g, f, t, self.s)
        return self.o(x)


STREAMS = {
    "a gate of another input": lambda x, g, f, t, s: x + g * f(x),
    "a squashed gate": lambda x, g, f, t, s: x + f(x) * g.sigmoid(),
    "a learned scale": lambda x, g, f, t, s: x + s * f(x),
    "the stream is gated": lambda x, g, f, t, s: x * g + f(x),
    "a gate of the stream": lambda x, g, f, t, s: x + t(x).sigmoid() * f(x),
    "a highway": lambda x, g, f, t, s: x * (1 - t(x).sigmoid()) + f(x) * t(x).sigmoid(),
    "an interpolation": lambda x, g, f, t, s: torch.lerp(x, f(x), t(x).sigmoid()),
}
GATES = {
    "squeeze-and-excite": lambda x, g, f, t, s: x * t(f(x)).sigmoid(),
    "of what is activated": lambda x, g, f, t, s: x.relu() * t(f(x)).sigmoid(),
    "with a sum behind": lambda x, g, f, t, s: x * t(f(x)).sigmoid() + g,
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", [*STREAMS, *GATES])
def test_a_stream_with_gated_branches_is_the_width_of_the_network_and_a_gate_on_an_axis_is_not(
    name: str, frontend: str
) -> None:
    model, batch = _Stream((STREAMS | GATES)[name]), (torch.randn(4, 8), torch.randn(4, 4))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, batch, frontend=frontend))
    streams = [r for r in analysis.refusals if "residual stream" in r.reason]
    widths = sorted(block.width for block in analysis.blocks)
    if name in STREAMS:
        assert [r.width for r in streams] == [16]
        assert widths == [24, 24]
    else:
        assert not streams
        assert 16 in widths


class _Adapted(nn.Module):
    """A linear layer with parallel low-rank adapters, as fine-tuning libraries make them."""

    def __init__(self, base: nn.Linear, count: int) -> None:
        super().__init__()
        self.base, self.drop = base, nn.Dropout(0.1)
        self.down = nn.ModuleList(nn.Linear(base.in_features, 3, bias=False) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(3, base.out_features, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            y = y + up(down(self.drop(x.to(down.weight.dtype)))) * 0.5
        return y

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            for down, up in zip(self.down, self.up, strict=True):
                layer.weight += 0.5 * up.weight @ down.weight
        return layer


class _Tuned(nn.Module):
    """A mixing layer and an MLP on a stream; some of their layers have adapters."""

    def __init__(self, adapted: dict[str, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        for name, sizes in (("mix", (8, 8)), ("fc1", (8, 24)), ("fc2", (24, 8))):
            layer = nn.Linear(*sizes)
            setattr(self, name, _Adapted(layer, adapted[name]) if name in adapted else layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x)).softmax(-1)
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def _merge(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, child in list(model.named_children()):
        if isinstance(child, _Adapted):
            setattr(model, name, child.merged())
    return model


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_adapters_of_low_rank_are_one_layer_with_what_they_adapt(method: str, frontend: str) -> None:
    torch.manual_seed(0)
    model = randomize(_Tuned({"mix": 1, "fc1": 2})).double().eval()
    data = [torch.randn(16, 5, 8).double() for _ in range(4)]
    pruned = vbpfx.prune(model, data, ratio=0.5, method=method, frontend=frontend, progress=False)
    assert list(pruned.plan.widths.values()) == [12]
    ranks = [r for r in pruned.analysis.refusals if "the rank of a low-rank adapter" in r.reason]
    assert [r.width for r in ranks] == [3, 3, 3]
    small = pruned.apply_to(model)
    assert not any("down" in n or "up" in n for n, _ in small.named_parameters() if n.endswith("bias"))
    with torch.no_grad():
        found, expected = _merge(small).eval()(data[0]), pruned.graph_module(data[0])
    assert relative_error([found], [expected]) < ROUNDING, "merged after pruning it is what was pruned"


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_what_an_adapter_reads_is_refused_until_it_is_merged(frontend: str) -> None:
    model, data = randomize(_Tuned({"fc2": 1})).eval(), torch.randn(16, 5, 8)
    with pytest.raises(
        vbpfx.AnalysisError, match=r"fc2\.down\.0\.weight and fc2\.up\.0\.weight adapt fc2\.base\.weight.*merge"
    ):
        vbpfx.prune(model, [data], ratio=0.5, method="vbp", frontend=frontend, progress=False)
    assert list(vbpfx.prune(_merge(model), [data], ratio=0.5, progress=False).plan.widths.values()) == [12]


NO_ADAPTERS = {
    "an activation between": lambda m, x: m.a(x) + m.c(m.b(x).relu()),
    "of another input": lambda m, x: m.a(x) + m.c(m.b(x.relu())),
    "multiplied": lambda m, x: m.a(x) * m.c(m.b(x)),
    "alone": lambda m, x: m.c(m.b(x)).relu() + m.a(x),
}


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_two_layers_in_a_row_are_no_adapter_elsewhere(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return NO_ADAPTERS[name](self, x)

    analysis = vbpfx.find_blocks(vbpfx.capture(Net(), torch.randn(4, 8)))
    assert [block.width for block in analysis.blocks] == [3]


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul])
def test_a_sparse_adjacency_mixes_nodes_and_leaves_channels_apart(product: Any) -> None:
    model = Net(lambda m, x: m.fc2(product(m.adjacency, m.fc1(x)).relu()), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8))
    model.register_buffer("adjacency", (torch.rand(7, 7) > 0.5).float().to_sparse())
    model = double(randomize(model))
    result = stages(model, torch.randn(7, 8).double())
    assert [block.width for block in result.analysis.blocks] == [12]
    assert vbpfx.verify(result.captured, result.small, result.plan, tolerance=ROUNDING).effect > 1e-6


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_weights_and_layouts_that_cannot_be_copied_are_named() -> None:
    model = Net(lambda m, x: m.fc(torch.sparse.mm(m.w, x.t()).t()), fc=nn.Linear(12, 8))
    model.w = nn.Parameter(torch.eye(12, 8).to_sparse())
    with pytest.raises(vbpfx.CaptureError, match=r"parameter w .* is sparse .*to_dense"):
        vbpfx.capture(model, torch.randn(3, 8))
    model = Net(lambda m, x: m.fc(torch.sparse.mm(m.a, x)), fc=nn.Linear(8, 8))
    model.register_buffer(
        "a", torch.sparse_csr_tensor([0, 1, 2, 3], [0, 1, 2], torch.ones(3), (3, 3), check_invariants=True)
    )
    with pytest.raises(vbpfx.CaptureError, match=r"buffer a .*to_sparse_coo"):
        vbpfx.capture(model, torch.randn(3, 8))


def test_costs_of_picked_rows_are_those_of_all_rows() -> None:
    case = next(case for case in FOUND if case.name == "rows picked and added")
    captured = vbpfx.capture(case.make(), case.batch())
    assert sum(captured.macs.values()) == 5 * (8 * 12 + 12 * 8)  # five tokens per sample


def test_an_expert_that_saw_nothing_is_named_with_what_to_do() -> None:
    case = next(case for case in FOUND if case.name == "rows picked and added")
    batch = -case.batch().abs()
    with pytest.raises(vbpfx.CalibrationError, match=r"block fc1->fc2 saw no data: .* exclude='fc1->fc2'"):
        stages(case.make(), batch)
