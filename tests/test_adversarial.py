"""Networks that once caused an error: each is refused with a reason or rewritten exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_unchanged, double, randomize, stages, state
from torch import Tensor, nn
from zoo import Net, mlp, parameter, tokens

import vbpfx
from vbpfx.errors import AnalysisError, ArtifactError, CaptureError, VerificationError
from vbpfx.outputs.differences import relative_error

BOTH = pytest.mark.parametrize("frontend", ["symbolic", "export"])


def check(model: nn.Module, batch: Any, frontend: str, *, blocks: int) -> Any:
    """Assert that the analysis finds ``blocks`` blocks and that the oracle holds for them in float64."""
    model = double(randomize(model))
    captured = vbpfx.capture(model, batch.double(), frontend=frontend)
    found = vbpfx.find_blocks(captured)
    assert len(found.blocks) == blocks, found
    if not blocks:
        return None
    result = stages(model, batch.double(), frontend=frontend)
    assert vbpfx.verify(result.captured, result.small, result.plan, tolerance=1e-12).effect > 1e-6
    return result


class ReadsBuffer(nn.Module):
    """A layer over a buffer with a nested name, as for relative position biases."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.table)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "parameter cast on the way": mlp(lambda m, x: m.fc2(m.fc1(x).relu() * m.s.to(x.dtype)), s=parameter(12)),
    "dtype read off the next weight": mlp(lambda m, x: m.fc2(m.fc1(x).relu().to(m.fc2.weight.dtype))),
    "a scale used twice": mlp(lambda m, x: m.fc2(m.fc1(x).relu() * m.s + m.s), s=parameter(12)),
    "dropout of channels": mlp(lambda m, x: m.fc2(m.d(m.fc1(x).atan())), d=nn.Dropout1d(0.5)),
    "in place, result used": mlp(lambda m, x: m.fc2(m.fc1(x).relu_().mul_(2))),
    "in place, only read behind": mlp(lambda m, x: m.fc2(F.hardtanh(m.fc1(x), inplace=True))),
    "masked logits": mlp(lambda m, x: m.fc2(m.fc1(x).relu()).masked_fill(torch.tensor([True] + 7 * [False]), -torch.inf)),
    "frozen weight as buffer": mlp(lambda m, x: F.linear(m.fc1(x).relu(), m.get_buffer("w"), m.fc2.bias)),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", EXACT)
def test_rewritten_exactly(name: str, frontend: str) -> None:
    model = EXACT[name]()
    if name == "frozen weight as buffer":
        model.register_buffer("w", torch.randn(4, 12))
        model.fc2 = nn.Linear(12, 4)
    check(model, tokens(), frontend, blocks=1)


class Padded(nn.Module):
    """A common mistake: a mean over tokens that includes padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask).mean(1)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.fc1(x), 0.5, training=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_graph_unlike_its_model_says_why() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 5, 8), "mask": torch.arange(5) >= torch.tensor([5, 2, 3, 4])[:, None]}
    with pytest.raises(
        VerificationError, match=r"fast path gives zeros at padded positions.*enable_nested_tensor=False"
    ):
        vbpfx.prune(Padded(), [batch], ratio=0.5, method="vbp", progress=False)
    vbpfx.prune(Padded(enable_nested_tensor=False), [batch], ratio=0.5, method="vbp", progress=False)
    with pytest.raises(VerificationError, match="two runs of the model differ, too: it is random in eval mode"):
        vbpfx.prune(Noisy(), [torch.randn(4, 8)], ratio=0.5, method="vbp", progress=False)


class Complex(nn.Module):
    """A block of complex numbers, a block of real numbers, and a complex output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(*sizes, dtype=torch.complex64) for sizes in ((8, 12), (12, 8)))
        self.fc3, self.fc4 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc2((self.fc1(x + 0j)) * 2)
        return torch.complex(self.fc4(self.fc3(z.real).relu()), self.fc4(self.fc3(z.imag).relu()))


@BOTH
def test_complex_numbers_are_refused_and_compared(frontend: str) -> None:
    torch.manual_seed(0)
    model = Complex()
    captured = vbpfx.capture(model, tokens(), frontend=frontend)
    found = vbpfx.find_blocks(captured)
    assert [block.producers for block in found.blocks] == [("fc3.weight",)]
    assert any("complex numbers" in refusal.reason and "fc1.weight" in refusal.producers for refusal in found.refusals)
    assert stages(model, tokens(), frontend=frontend).small(tokens()).is_complex()
    a = torch.tensor([3 + 4j])
    assert relative_error([a], [a.conj()]) == pytest.approx(8 / 5)


EXACT |= {
    "cast as the input": lambda: Net(lambda m, x: m.fc2(m.fc1(x).relu().type_as(x)), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 4)),
    "flattened, normalised, shaped as before": lambda: Net(
        lambda m, x: m.fc2(m.bn((h := m.fc1(x)).flatten(0, 1)).reshape_as(h).relu()),
        fc1=nn.Linear(8, 12), bn=nn.BatchNorm1d(12), fc2=nn.Linear(12, 4),
    ),
    "pointwise with padding same": lambda: Net(
        lambda m, x: m.fc2(m.fc1(x.transpose(1, 2)).relu()), fc1=nn.Conv1d(8, 12, 1), fc2=nn.Conv1d(12, 4, 1, padding="same")
    ),
    "a layer that reads a buffer": lambda: nn.Sequential(ReadsBuffer(), nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)),
}  # fmt: skip


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "pooled across": mlp(lambda m, x: m.fc2(F.avg_pool2d(m.fc1(x), 3, 1, 1))),
    "every axis squeezed": mlp(lambda m, x: m.fc2(m.fc1(x).relu().squeeze())),
    "reduced without an axis": mlp(lambda m, x: m.fc2(m.fc1(x) - m.fc1(x).mean(dim=()))),
    "a parameter named like a node, read by a layer": lambda: Net(
        lambda m, x: m.fc2(torch.relu(m.fc1(x)) * m.relu) + m.fc3(m.relu).mean((0, 1)),
        fc1=nn.Linear(8, 16),
        fc2=nn.Linear(16, 4),
        fc3=nn.Linear(16, 4),
        relu=parameter(1, 16),
    ),
    "statistics of the batch": lambda: Net(
        lambda m, x: m.fc2(m.bn(m.fc1(x))),
        fc1=nn.Linear(8, 12),
        bn=nn.BatchNorm1d(5, track_running_stats=False),
        fc2=nn.Linear(12, 4),
    ),
    "spread": mlp(lambda m, x: m.fc2(m.fc1(x) / m.fc1(x).std(False))),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, frontend: str) -> None:
    check(REFUSED[name](), tokens(), frontend, blocks=0)


def test_a_value_read_before_and_after_an_in_place_change_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        a = m.fc2(h)
        F.relu_(h)
        return a + m.fc3(h)

    model = Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4), fc3=nn.Linear(12, 4))
    check(model, tokens(), "symbolic", blocks=0)


@pytest.mark.parametrize("change", [lambda h: F.dropout(h, 0.1, False).relu_(), lambda h: h.double().relu_()])
def test_what_an_operator_hands_on_is_its_operands_memory(change: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        a = m.fc3(h)
        return m.fc2(change(h)) + a + m.fc3.bias + m.fc4(h)

    model = Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4), fc3=nn.Linear(12, 4), fc4=nn.Linear(12, 4))
    check(model, tokens(), "symbolic", blocks=0)


def test_an_out_argument_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        a = m.fc2(h)
        torch.clamp(h, 0, 1, out=h)
        return a + m.fc3(h)

    with torch.no_grad():
        model = Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4), fc3=nn.Linear(12, 4)).requires_grad_(False)
        check(model, tokens(), "symbolic", blocks=0)


def test_movedim_is_read_by_name() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.movedim(m.fc1(x), destination=(1,), source=(2,)).relu()
        return m.fc2(h.movedim(1, 2))

    check(Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), tokens(), "symbolic", blocks=1)


def test_a_class_whose_code_states_the_width_is_a_typed_error() -> None:
    """An ATen graph does not show that the code states the width; the error appears when the class runs."""
    model = mlp(lambda m, x: m.fc2(m.fc1(x).relu().reshape(-1, 12)))()
    pruned = vbpfx.prune(model, [tokens()], ratio=0.5, frontend="export", progress=False)
    with pytest.raises(VerificationError, match="does not run"):
        pruned.apply_to(model)


def test_an_analysis_of_another_model_is_refused() -> None:
    first, second = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in (12, 16))
    analysis = vbpfx.find_blocks(vbpfx.capture(first, tokens()))
    with pytest.raises(AnalysisError, match="another model"):
        vbpfx.prepare(vbpfx.capture(second, tokens()), analysis)


def test_a_view_changed_in_place_counts_as_its_base() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        h.transpose(1, 2).mul_(2)
        return m.fc2(h)

    check(Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), tokens(), "symbolic", blocks=0)


@BOTH
def test_a_size_that_states_another_tensors_shape_stays_a_number(frontend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x[:, 0])
        return m.fc2(h.relu()).view(-1, 2, 6).reshape(x.shape[0], h.shape[1])

    model = Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 12))
    check(model, tokens(), frontend, blocks=1)
    if frontend == "symbolic":  # an ATen graph does not tell that the model's own code reads the size
        with pytest.raises(vbpfx.VbpfxError):
            vbpfx.prune(model, [tokens()], ratio=0.5, frontend=frontend, progress=False).apply_to(model)


@BOTH
def test_a_created_bias_takes_nobodys_name(frontend: str) -> None:
    """A layer adds its own bias later, and the fold must not overwrite it."""

    class SkipBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.weight, self.bias = nn.Linear(8, 12), parameter(4, 12), parameter(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc1(x).relu(), self.weight) + self.bias

    result = check(SkipBias(), tokens(), frontend, blocks=1)
    assert result.plan.blocks[0].block.consumers[0].bias == "bias_"


@BOTH
def test_a_class_that_ignores_its_bias_is_refused_by_apply_plan(frontend: str) -> None:
    class NoBias(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight)

    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), NoBias(12, 4, bias=False))
    result = check(model, tokens(), frontend, blocks=1)
    with pytest.raises(ArtifactError, match="adds no bias"):
        vbpfx.apply_plan(double(model), result.plan)


@BOTH
def test_block_names_are_unique(frontend: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3, self.w4 = parameter(12, 8), parameter(8, 12), parameter(10, 8), parameter(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(F.linear(x, self.w1).relu(), self.w2), self.w3).relu(), self.w4)

    result = check(nn.Sequential(Inner()), tokens(), frontend, blocks=3)
    assert len({block.name for block in result.analysis.blocks}) == 3


@BOTH
def test_buffers_written_in_forward_stay_the_callers_own(frontend: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.steps.add_(1)
        return m.fc2(F.batch_norm(m.fc1(x).relu().mean(1), m.mean, m.var, training=True))

    model = Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4))
    for name, value in {"steps": torch.zeros(()), "mean": torch.zeros(12), "var": torch.ones(12)}.items():
        model.register_buffer(name, value)
    before = state(model)
    vbpfx.prune(model, [tokens(), tokens()], ratio=0.5, frontend=frontend, progress=False)
    assert_unchanged(model, before)


@BOTH
def test_a_batch_that_forward_writes_into_stays_the_callers_own(frontend: str) -> None:
    model = mlp(lambda m, x: m.fc2(m.fc1(x.sub_(1.0)).relu()))()
    batch = tokens()
    kept = batch.clone()
    vbpfx.prune(model, [batch], ratio=0.5, frontend=frontend, progress=False)
    assert torch.equal(batch, kept)


def test_hooks_on_the_model_itself_are_not_dropped() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    pruned = vbpfx.prune(model, [tokens()], ratio=0.1, progress=False)
    assert pruned.captured.frontend == "export"
    torch.testing.assert_close(pruned.captured.graph_module(batch := tokens()), model(batch))


def test_a_decision_that_tracing_fixed_is_noticed() -> None:
    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.calls = nn.Linear(8, 12), nn.Linear(12, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc2(self.fc1(x).relu()) * self.calls

    with pytest.raises(CaptureError, match="Global keeps state between calls, in calls: a second call"):
        vbpfx.prune(Global(), [tokens()], ratio=0.5, progress=False)


def test_layers_outside_the_traced_path_come_back_too(tmp_path) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.aux = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(self.fc1(x).relu())
            return self.aux(y) if self.training else y

    model = Auxiliary()
    vbpfx.prune(model, [tokens()], ratio=0.5, progress=False).save(tmp_path)
    loaded = vbpfx.load(tmp_path, into=Auxiliary())
    assert torch.equal(loaded.aux.weight, model.aux.weight)


def test_a_plan_of_the_other_front_end_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    plan = stages(model, tokens(), frontend="symbolic").plan
    with pytest.raises(ArtifactError, match="same front end"):
        vbpfx.convert(vbpfx.capture(model, tokens(), frontend="export"), plan)


def test_old_weight_norm_elsewhere_in_the_model_does_not_stop_apply_plan() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        other = nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(other, nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model(tokens())
    result = stages(model, tokens())
    vbpfx.verify(result.captured, vbpfx.apply_plan(model, result.plan), result.plan)


class _Scaled(nn.Module):
    """A class that computes with its hidden width in the way that the test gives."""

    def __init__(self, scale: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.how, self.remembered = nn.Linear(8, 32), nn.Linear(32, 4), scale, 32**-0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.shape[0] < 1:
            return h
        return self.b(h.relu() * self.how(self, h))


SCALES = {
    "size": (lambda m, h: h.size(-1) ** -0.5, r"test_adversarial\.py:\d+ reads a narrowed width: .*h\.size\(-1\) \*\* -0\.5"),
    "shape": (lambda m, h: h.shape[-1] ** -0.5, r"reads a narrowed width: .*h\.shape\[-1\] \*\* -0\.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_code_that_computes_with_a_width_is_named_by_its_line(name: str) -> None:
    scale, where = SCALES[name]
    model = _Scaled(scale)
    pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, method="vbp", frontend="export", progress=False)
    with pytest.raises(VerificationError, match=where) as raised:
        pruned.apply_to(model)
    text = str(raised.value)
    assert "every tensor is the one that follows from the plan" in text
    assert "exclude=['a->b']" in text
    assert "report the model" not in text


def test_a_scale_that_a_class_remembers_is_left_as_it_is() -> None:
    """Graph and class both keep the remembered scale, so they compute the same."""
    model = _Scaled(lambda m, h: m.remembered)
    pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, method="vbp", frontend="export", progress=False)
    small, batch = pruned.apply_to(model), torch.randn(5, 8)
    torch.testing.assert_close(small(batch), pruned.graph_module(batch), rtol=1e-5, atol=1e-6)


class _Cuts(nn.Module):
    """A class that cannot run at other widths, because it stores the index at which its gate begins."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.half = nn.Linear(8, 32), nn.Linear(16, 4), 16

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h[:, : self.half] * h[:, self.half :].sigmoid())


def test_a_class_that_does_not_run_narrowed_is_named_by_its_line() -> None:
    model = _Cuts()
    pruned = vbpfx.prune(model, [torch.randn(16, 8)], ratio=0.5, method="vbp", frontend="export", progress=False)
    with pytest.raises(
        VerificationError,
        match=r"does not run: (.|\n)*test_adversarial\.py:\d+: .*self\.half(.|\n)*use the GraphModule",
    ):
        pruned.apply_to(model)
