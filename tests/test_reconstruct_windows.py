"""Convolutions are fitted on their windows, block after block; the results are exact in every form and at every size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from oracle import double, randomize
from torch import Tensor, fx, nn
from torch.nn.functional import relu
from zoo import Net

import vbpfx
from vbpfx.planning.elimination import elimination_costs
from vbpfx.plans.files import load_plan, plan_digest
from vbpfx.plans.records import Plan, ValueAxis
from vbpfx.reconstruction.layer_input import Held, LayerInput
from vbpfx.rules.windows import Window, window_of

# Rounding of a few hundred sums of products in float64.
ROUNDING = 1e-12

CONVOLUTIONS = [
    nn.Conv1d(3, 4, 5, stride=2, padding=3),
    nn.Conv1d(3, 4, 2, padding="same", dilation=3),
    nn.Conv2d(3, 4, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(3, 4, 3, padding="valid"),
    nn.Conv2d(3, 4, 1, stride=2),
    nn.Conv2d(3, 4, 1, padding=1),
    nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
    nn.Conv3d(3, 4, (1, 3, 2), padding=(1, 2, 0), padding_mode="replicate"),
    nn.Conv3d(3, 4, 3, stride=2, padding=1, bias=False),
    nn.ConvTranspose1d(3, 4, 4, stride=3, padding=1, output_padding=2),
    nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3), bias=False),
    nn.ConvTranspose2d(3, 4, 2, stride=2),
    nn.ConvTranspose3d(3, 4, 3, stride=(1, 2, 3), padding=1, output_padding=(0, 1, 2)),
    nn.Conv2d(3, 6, 3, padding=1, groups=3),
    nn.Conv1d(3, 6, 1, groups=3),
]


def _window(layer: nn.Module) -> Window:
    graph_module = fx.symbolic_trace(nn.Sequential(layer))
    (found,) = (window_of(n, layer) for n in graph_module.graph.nodes if n.op == "call_module")
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("samples", [None, 2])
def test_a_convolution_is_a_matrix_product_with_its_windows(layer: nn.Module, samples: int | None) -> None:
    layer = double(randomize(layer))
    window, axes = _window(layer), layer.weight.ndim - 2
    weight = layer.weight.transpose(0, 1) if "Transpose" in type(layer).__name__ else layer.weight
    bias = torch.zeros(layer.out_channels, dtype=torch.float64) if layer.bias is None else layer.bias
    matrix = torch.block_diag(*weight.flatten(1).chunk(window.groups))
    x = torch.randn(*([] if samples is None else [samples]), 3, *range(6, 6 + axes), dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(window.convolve(x, weight, bias), y, rtol=0, atol=ROUNDING)
        rows = (y if samples else y[None]).movedim(1, -1).flatten(0, -2)
        positions = torch.randperm(len(rows))[:50]
        windows, inside = window.gather(x, positions)
        assert windows.shape == (len(positions), 3, window.taps)
        torch.testing.assert_close(windows.flatten(1) @ matrix.T + bias, rows[positions], rtol=0, atol=ROUNDING)
        ones, _ = window.gather(torch.ones_like(x), positions)
        assert torch.equal(ones[:, 0].bool(), inside)


def test_columns_are_numbered_channel_by_channel_and_constants_are_zero_in_the_padding() -> None:
    layer = double(randomize(nn.Conv2d(5, 4, 3, stride=2, padding=1)))
    held = [Held("block", ValueAxis("h", 1, 0), value) for value in (1.5, -0.5)]
    read = LayerInput(1, 5, 4, 1, (3, 3), _window(layer), tuple(held), (torch.arange(5),) * 2)
    (part,) = read.parts
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    positions = torch.randperm(2 * 3 * 4)
    whole = torch.cat([x, torch.full_like(x[:, :1], 1.5), torch.full_like(x[:, :1], -0.5)], 1)
    expected = F.unfold(whole, 3, padding=1, stride=2).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(read.rows(x, positions), expected[positions], rtol=0, atol=0)
    assert torch.equal(read.columns(torch.tensor([1, 6])), torch.tensor([*range(9, 18), *range(54, 63)]))
    assert part.channels == list(range(7))
    matrix = read.matrix(layer.weight.detach(), part)
    assert torch.equal(matrix[:, :45], layer.weight.detach().flatten(1))
    assert not matrix[:, 45:].any()
    # means are of the picture alone: of every fourth entry, as the stride is 2, and of all nine entries of windows
    h = torch.rand(1, 5, 1, 1, dtype=torch.float64).expand(2, 5, 6, 7)
    means = read.means(read.rows(h, torch.arange(24)).mean(0), part)
    torch.testing.assert_close(means, h[0, :, 0, 0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_columns_of_a_channel_are_eliminated_together(taps: int, block: int) -> None:
    """The greedy order, found by fitting the layer anew for every choice."""
    generator = torch.Generator().manual_seed(taps)
    mix = torch.randn(8 * taps, 8 * taps, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.T / len(mix) + 0.05 * torch.eye(len(mix), dtype=torch.float64)
    weight = torch.randn(4, len(mix), generator=generator, dtype=torch.float64)
    among = torch.tensor([0, 1, 3, 4, 6, 7])
    order, costs = elimination_costs([(covariance, weight)], 5, among, 1e-2, block, group=taps)
    a = covariance.numpy() + 1e-2 * float(covariance.diagonal().mean()) * np.eye(len(mix))
    w, kept, before = weight.numpy(), list(range(8)), 0.0

    def error(channels: list[int]) -> float:
        k = [c * taps + t for c in channels for t in range(taps)]
        p = [i for i in range(len(a)) if i not in k]
        left = a[np.ix_(p, p)] - a[np.ix_(p, k)] @ np.linalg.inv(a[np.ix_(k, k)]) @ a[np.ix_(k, p)]
        return float(np.trace(w[:, p] @ left @ w[:, p].T))

    for chosen, cost in zip(order.tolist(), costs.tolist(), strict=True):
        errors = {j: error([i for i in kept if i != j]) for j in among.tolist() if j in kept}
        assert chosen == min(errors, key=lambda j: errors[j])
        np.testing.assert_allclose(cost, errors[chosen] - before, rtol=1e-8, atol=1e-10)
        before = errors[chosen]
        kept.remove(chosen)


def test_shares_lose_equally_many_neurons() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    weight[:, :6] *= 100  # without shares, the others would go
    among, shares = torch.arange(12), torch.arange(12) // 3
    problem = [(mix @ mix.T + torch.eye(12), weight)]
    order, costs = elimination_costs(problem, 8, among, shares=shares)
    assert torch.bincount(shares[order]).tolist() == [2, 2, 2, 2]
    free, _ = elimination_costs(problem, 8, among)
    assert torch.bincount(shares[free], minlength=4).tolist() != [2, 2, 2, 2]
    # after the first one, the order is that of an elimination without it
    order, costs = elimination_costs(problem, 9, among[1:], shares=shares[1:] // 4, first=0)
    assert order[0] == 0
    assert torch.bincount(shares[order[1:]] // 4).tolist() == [8]
    assert float(costs[0]) > 0


C1, C2, C3, T1, T2 = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d


def _sequence(made: nn.Module, reader: nn.Module, act: nn.Module | None = None) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(made, act or nn.SiLU(), reader)


def _basic(x_in: int, out: int, hidden: int, stride: int = 1) -> nn.Module:
    return Net(
        lambda s, x: relu(s.bn2(s.b(relu(s.bn1(s.a(x))))) + s.down(x)),
        a=C2(x_in, hidden, 3, stride, 1, bias=False), bn1=nn.BatchNorm2d(hidden), b=C2(hidden, out, 3, 1, 1, bias=False),
        bn2=nn.BatchNorm2d(out), down=C2(x_in, out, 1, stride, bias=False) if stride > 1 else nn.Identity(),
    )  # fmt: skip


def _bottleneck() -> nn.Module:
    return Net(
        lambda s, x: relu(x + s.c(relu(s.bn(s.b(relu(s.a(x))))))),
        a=C2(8, 24, 1), b=C2(24, 24, 3, padding=1, groups=4, bias=False), bn=nn.BatchNorm2d(24), c=C2(24, 8, 1, bias=False),
    )  # fmt: skip


def _groups_of_two_kinds() -> nn.Module:
    return Net(
        lambda s, x: s.four(h := nn.functional.silu(s.made(x))) + s.two(h) + s.whole(h),
        made=C2(3, 24, 1), four=C2(24, 8, 3, padding=1, groups=4), two=C2(24, 8, 5, padding=2, groups=2), whole=C2(24, 8, 3, padding=1),
    )  # fmt: skip


def _up_and_down() -> nn.Module:
    """A skip connection by concatenation, so that two layers read one block at different values."""
    return Net(
        lambda s, x: s.out(relu(s.join(torch.cat([h := relu(s.enter(x)), s.up(relu(s.down(h)))], 1)))),
        enter=C2(3, 12, 3, padding=1), down=C2(12, 16, 2, 2), up=T2(16, 12, 2, 2), join=C2(24, 12, 3, padding=1), out=C2(12, 2, 1),
    )  # fmt: skip


def _two_readers() -> nn.Module:
    return Net(
        lambda s, x: s.wide(h := nn.functional.silu(s.made(x))) + s.narrow(h) + s.inner(h).mean((2, 3), keepdim=True),
        made=C2(3, 16, 3), wide=C2(16, 4, 5, padding=2), narrow=C2(16, 4, 1), inner=C2(16, 4, 3),
    )  # fmt: skip


def _twice() -> nn.Module:
    return Net(
        lambda s, x: s.b(torch.tanh(s.a(x))) + s.b(torch.tanh(s.a(2 * x + 1))),
        a=C2(3, 12, 3),
        b=C2(12, 4, 3, padding=1),
    )


# name -> the network, the size at which it is traced, and sizes that tracing does not see
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[int, ...]]]] = {
    "strided, dilated": (_sequence(C2(3, 16, 3), C2(16, 5, 3, 2, 2, 2)), (9, 7), [(12, 5), (6, 11)]),
    "not padded": (_sequence(C2(3, 16, 1), C2(16, 5, (2, 3))), (6, 7), [(9, 5), (4, 4)]),
    "reflected": (_sequence(C2(3, 16, 1), C2(16, 5, 3, padding=2, padding_mode="reflect")), (6, 7), [(9, 5), (4, 4)]),
    "one dimension": (_sequence(C1(3, 16, 3), C1(16, 5, 4, padding=3)), (12,), [(20,), (7,)]),
    "three dimensions": (_sequence(C3(3, 10, 1), C3(10, 4, 3, padding=(0, 1, 2))), (4, 5, 3), [(5, 3, 6)]),
    "transposed": (_sequence(C2(3, 16, 1), T2(16, 5, 3, 2, 1, 1)), (5, 4), [(3, 7)]),
    "transposed, apart": (_sequence(C1(3, 16, 1), T1(16, 5, 2, 3)), (6,), [(9,)]),
    "residual": (
        lambda: nn.Sequential(C2(3, 8, 3, padding=1), _basic(8, 8, 12), _basic(8, 8, 12), C2(8, 3, 1)),
        (8, 6),
        [(5, 9), (12, 4)],
    ),
    "halved": (lambda: nn.Sequential(C2(3, 8, 1), _basic(8, 12, 16, 2), C2(12, 3, 1)), (8, 6), [(5, 9), (12, 4)]),
    "groups": (_sequence(C2(3, 24, 1), C2(24, 8, 3, 2, 1, groups=4)), (8, 6), [(5, 9)]),
    "groups of one entry": (_sequence(C1(3, 24, 1), C1(24, 8, 1, groups=4)), (8,), [(5,)]),
    "groups, not padded": (_sequence(C2(3, 24, 1), C2(24, 6, (2, 3), groups=3)), (8, 6), [(5, 9)]),
    "groups of two kinds": (_groups_of_two_kinds, (8, 6), [(5, 9)]),
    "bottlenecks": (lambda: nn.Sequential(C2(3, 8, 1), _bottleneck(), _bottleneck(), C2(8, 3, 1)), (8, 6), [(5, 9)]),
    "skip connection": (_up_and_down, (8, 6), [(4, 10), (12, 8)]),
    "two readers": (_two_readers, (8, 6), [(5, 9)]),
    "called twice": (_twice, (8, 6), [(5, 9)]),
}  # fmt: skip


def _pruned(name: str, **options: object) -> tuple[nn.Module, vbpfx.Pruned, list[Tensor]]:
    """Return a network, its pruned form and batches at sizes that tracing has not seen."""
    torch.manual_seed(0)
    make, size, others = NETWORKS[name]
    model = double(randomize(make()))
    data = [torch.randn(20, 3, *size, dtype=torch.float64) + 0.5 for _ in range(4)]
    given = {"ratio": 0.5, "round_to": 1, "allocation": "equal", "open_sizes": True, **options}
    pruned = vbpfx.prune(model, data, verify=False, progress=False, **given)
    return model, pruned, [torch.randn(3, 3, *other, dtype=torch.float64) for other in others]


def _with_noise(plan: Plan) -> Plan:
    """Return the plan with noise on what its corrections change: a good fit changes too little to prove anything."""
    noisy = [
        c.__class__(c.layer, c.weight * (1 + torch.rand_like(c.weight)), c.bias, c.further) for c in plan.corrections
    ]
    return Plan(plan.blocks, plan.fingerprint, plan.frontend, plan.settings, tuple(noisy))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_is_exact_in_every_form_and_at_every_size(name: str, tmp_path: Path) -> None:
    model, pruned, others = _pruned(name)
    readers = {c.weight for entry in pruned.plan.blocks for c in entry.block.consumers}
    assert readers <= {correction.layer.weight for correction in pruned.plan.corrections}
    for plan in (pruned.plan, _with_noise(pruned.plan)):
        for batch in (None, *others):
            for small in (vbpfx.convert(pruned.captured, plan), vbpfx.apply_plan(model, plan)):
                found = vbpfx.verify(pruned.captured, small, plan, batch, tolerance=1e-9)
                assert found.effect > 1e-4
                assert found.refits < ROUNDING
    pruned.save(tmp_path)
    loaded, plan = vbpfx.load(tmp_path), load_plan(tmp_path)
    assert plan_digest(plan) == plan_digest(pruned.plan)
    for batch in others:
        assert torch.equal(loaded(batch), pruned.graph_module(batch))


@pytest.mark.filterwarnings("ignore:.*a width that 8 does not divide")
@pytest.mark.parametrize("name", ["strided, dilated", "transposed", "residual", "bottlenecks", "skip connection"])
def test_onnx_files_compute_the_same_at_every_size(name: str, tmp_path: Path) -> None:
    make, size, others = NETWORKS[name]
    torch.manual_seed(0)
    model = randomize(make()).eval()
    pruned = vbpfx.prune(model, [torch.randn(40, 3, *size) + 0.5], ratio=0.5, open_sizes=True, progress=False)
    assert pruned.plan.corrections
    pruned.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for other in (size, *others):
        batch = torch.randn(3, 3, *other)
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        expected = pruned.graph_module(batch).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def _by_hand(model: nn.Sequential, pruned: vbpfx.Pruned, x: Tensor) -> Tensor:
    """Return what the plan says for ``Sequential(made, act, reader)`` with a padded reader, computed tap by tap."""
    (entry,), (correction,) = pruned.plan.blocks, pruned.plan.corrections
    assert entry.block.constant is not None
    value, weight = entry.block.constant.values[0], model[2].weight.detach()
    with torch.no_grad():
        h = model[1](model[0](x))
    picture = torch.ones_like(h[:, :1])
    removed = torch.einsum("opij,p->oij", weight[:, list(entry.pruned)], entry.constants[0].double())
    parts = [(h[:, k, None], weight[:, k]) for k in entry.kept] + [(picture, removed)]
    for place, channel in enumerate(sorted((*entry.kept, *entry.constants_in))):
        read = value * picture if channel in entry.constants_in else h[:, channel, None]
        parts.append((read, correction.weight[:, place].double()))
    y = torch.zeros(len(x), len(weight), *x.shape[2:], dtype=torch.float64)
    for source, taps in parts:
        around = F.pad(source, (1, 1, 1, 1))
        for i, j in itertools.product(range(3), range(3)):
            y += around[:, :, i : i + h.shape[2], j : j + h.shape[3]] * taps[:, i, j][:, None, None]
    return y


@pytest.mark.parametrize(("act", "constant"), [(nn.Tanh(), False), (nn.Sigmoid(), True)])
def test_the_plan_says_what_is_computed_by_hand(act: nn.Module, constant: bool) -> None:
    """If neurons have large means, a constant channel is worth its place, and its column is fitted, too."""
    torch.manual_seed(1)
    model = double(randomize(nn.Sequential(C2(12, 24, 1), act, C2(24, 5, 3, padding=1, bias=False))))
    nn.init.zeros_(model[0].bias)
    data = [torch.randn(20, 12, 6, 5, dtype=torch.float64) for _ in range(4)]
    pruned = vbpfx.prune(model, data, ratio=0.875, round_to=1, open_sizes=True, progress=False)
    (entry,), (correction,) = pruned.plan.blocks, pruned.plan.corrections
    assert entry.width == 3
    assert bool(entry.constants_in) == constant
    for channel in entry.constants_in:
        assert bool(correction.weight[:, sorted((*entry.kept, channel)).index(channel)].any())
    for size in ((6, 5), (4, 9)):
        x = torch.randn(3, 12, *size, dtype=torch.float64)
        found, expected = pruned.graph_module(x).detach(), _by_hand(model, pruned, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
        with torch.no_grad():
            assert float((model(x) - expected).abs().max()) > 1e-3


def test_a_fitted_convolution_errs_less_than_the_one_shot_fold_on_other_data() -> None:
    torch.manual_seed(2)
    model = randomize(nn.Sequential(C2(3, 8, 3), _basic(8, 8, 24), _basic(8, 8, 24))).eval()
    smooth = nn.AvgPool2d(3, 1)
    data = [smooth(torch.randn(50, 3, 12, 12)) for _ in range(6)]
    test = smooth(torch.randn(200, 3, 12, 12))
    errors = {}
    for name, options in {
        "one shot": {"reconstruct": False},
        "auto": {},
        "its neurons": {"criterion": "greedy_obs"},
    }.items():
        pruned = vbpfx.prune(model, data, ratio=0.5, allocation="equal", progress=False, **options)
        with torch.no_grad():
            errors[name] = float((pruned.graph_module(test) - model(test)).square().mean())
    assert errors["auto"] < errors["its neurons"] < errors["one shot"]
    assert errors["auto"] < 0.9 * errors["one shot"]


def test_a_convolution_without_a_bias_that_pads_gets_none() -> None:
    model, pruned, _ = _pruned("residual")
    own = pruned.apply_to(model)
    assert {name for name, _ in own.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_layers_behind_a_narrowed_block_are_fitted_even_if_they_read_none() -> None:
    _, both, _ = _pruned("residual")
    assert both.plan.refitted == ("2.a.weight", "3.weight")  # what 1.a reads is as in the dense network
    _, first, _ = _pruned("residual", exclude="2")
    assert [entry.block.name for entry in first.plan.blocks] == ["1"]
    assert first.plan.refitted == ("2.a.weight", "3.weight")  # 2.b reads the block that was left out
    _, second, _ = _pruned("residual", exclude="1")
    assert second.plan.refitted == ("3.weight",)
    assert _pruned("residual", refit=False)[1].plan.refitted == ()


@pytest.mark.parametrize("memory", [0.02, 8.0])
def test_few_rows_are_made_at_once(memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are gathered for some positions at a time, at most as many as the layer has columns."""
    most = []
    rows = LayerInput.rows

    def noting(self: LayerInput, x: Tensor, positions: Tensor) -> Tensor:
        found = rows(self, x, positions)
        most.append(found.shape)
        return found

    monkeypatch.setattr(LayerInput, "rows", noting)
    _pruned("residual", memory=memory)
    assert most
    assert all(n <= columns for n, columns in most)


def test_a_block_of_width_one_has_no_constant_channel() -> None:
    torch.manual_seed(3)
    model = double(randomize(nn.Sequential(C2(3, 6, 1), nn.SiLU(), C2(6, 4, 3, padding=1))))
    data = [torch.randn(20, 3, 6, 5, dtype=torch.float64) for _ in range(4)]
    pruned = vbpfx.prune(model, data, ratio=0.8, min_width=1, round_to=1, progress=False)
    (entry,) = pruned.plan.blocks
    assert (len(entry.kept), entry.constants_in) == (1, ())
    assert vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, tolerance=1e-9).effect > 1e-3
