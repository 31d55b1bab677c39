"""Every bad input raises an error that says what, where and what to do, and leaves the model unchanged."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vbpfx
from vbpfx.calibration.calibrate import calibrate
from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.errors import (
    AnalysisError,
    ArtifactError,
    BudgetError,
    CalibrationError,
    CaptureError,
    VbpfxError,
    VerificationError,
)


class Net(nn.Module):
    """Two blocks, BatchNorm, dropout, a hook, a frozen weight, a gradient; all but one layer are in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.stem.weight.requires_grad_(False)
        self.stem.bias.grad = torch.ones(8)
        self.second.register_forward_hook(lambda module, args, output: None)
        self.train()
        self.second[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)) * self.scale
        x = x + self.first(x)
        return x + self.second(x)


NEURONS = 16 + 32


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that must not change, so that == compares bits and identities."""

    def bits(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.detach().numpy().tobytes())

    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return {
        "parameters": {n: (id(p), p.requires_grad, bits(p), bits(p.grad)) for n, p in parameters.items()},
        "buffers": {n: (id(b), bits(b)) for n, b in buffers.items()},
        "state": list(model.state_dict()),
        "modules": {n: (id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()},
        "hooks": {n: {k: dict(v) for k, v in vars(m).items() if "hooks" in k and v is not None and hasattr(v, "items")} for n, m in model.named_modules()},
    }  # fmt: skip


def test_a_snapshot_sees_every_change() -> None:
    changes: list[Callable[[Net], Any]] = [
        lambda m: m.stem.weight.data[0, 0].add_(1e-7),
        lambda m: m.bn.running_mean.add_(1e-7),
        lambda m: m.bn.num_batches_tracked.add_(1),
        lambda m: m.bn.eval(),
        lambda m: m.second.train(),
        lambda m: m.stem.requires_grad_(True),
        lambda m: setattr(m.stem.bias, "grad", None),
        lambda m: m.first.register_forward_hook(lambda *_: None),
        lambda m: m.first.register_forward_pre_hook(lambda *_: None),
        lambda m: m.first.add_module("4", nn.Identity()),
        lambda m: setattr(m, "note", 1),
        lambda m: setattr(m.stem, "weight", nn.Parameter(m.stem.weight.detach().clone(), requires_grad=False)),
    ]
    for change in changes:
        model = Net()
        before = snapshot(model)
        assert snapshot(model) == before
        change(model)
        assert snapshot(model) != before, inspect.getsource(change)


@contextmanager
def refused(model: nn.Module, kind: type[VbpfxError], *parts: str) -> Iterator[None]:
    """Expect exactly that kind of error with all the parts in its message, and an unchanged model."""
    before = snapshot(model)
    with pytest.raises(VbpfxError) as caught:
        yield
    assert type(caught.value) is kind, repr(caught.value)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"
    assert snapshot(model) == before


def batches(count: int = 3, width: int = 8) -> list[Tensor]:
    return [torch.randn(16, width) for _ in range(count)]


def prune(model: nn.Module, data: Any = None, **options: Any) -> vbpfx.Pruned:
    options = {"ratio": 0.5, "progress": False} | options
    return vbpfx.prune(model, batches() if data is None else data, **options)


def test_a_good_input_leaves_the_model_alone_too() -> None:
    model = Net()
    before = snapshot(model)
    pruned = prune(model)
    pruned.apply_to(model)
    assert pruned.plan.removed == NEURONS // 2
    assert snapshot(model) == before


# ---- calibration data -----------------------------------------------------------------------------------------------


def test_an_empty_list() -> None:
    model = Net()
    with refused(model, CalibrationError, "calibration data is empty", "pass at least one batch"):
        prune(model, [])


def test_an_exhausted_generator() -> None:
    model, data = Net(), (batch for batch in batches())
    assert len(list(data)) == 3
    with refused(model, CalibrationError, "calibration data is empty", "pass at least one batch"):
        prune(model, data)


def test_a_loader_that_does_not_know_its_length() -> None:
    class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return (sample for batch in batches() for sample in batch)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=len(batches()[0]))
    with pytest.raises(TypeError):
        len(loader)  # although it has the method
    model = Net()
    assert prune(model, loader).plan.widths == prune(model, batches()).plan.widths


def test_an_iterable_that_yields_only_once() -> None:
    class Once:
        """An iterable that is not an iterator, but whose data is used up after the first pass."""

        def __init__(self) -> None:
            self.left = batches()

        def __iter__(self) -> Iterator[Tensor]:
            while self.left:
                yield self.left.pop()

    pruned = prune(Net(), Once())
    # There were three batches of 16; reading the first one in advance must not lose it.
    assert pruned.plan.settings["samples"] == 48


@pytest.mark.parametrize(("data", "name"), [(5, "int"), (None, "NoneType"), (len, "builtin_function_or_method")])
def test_no_iterable(data: Any, name: str) -> None:
    model = Net()
    with refused(model, CalibrationError, f"calibration is a {name}, expected an iterable of batches"):
        vbpfx.prune(model, data, ratio=0.5, progress=False)


@pytest.mark.parametrize("batch", [None, 3, "text", [], {}])
def test_a_batch_without_a_tensor(batch: Any) -> None:
    model = Net()
    with refused(model, CaptureError, "hold no tensor", "pass one batch as the model takes it"):
        prune(model, [batch])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_that_is_not_finite(number: int, value: float) -> None:
    model, data = Net(), batches()
    data[number - 1][3, 5] = value
    with refused(
        model,
        CalibrationError,
        rf"batch {number} \(counted from 1\) makes NaN or infinite activations in block first",
        "its input holds NaN or infinity already: leave that batch out",
    ):
        prune(model, data)


def test_a_model_that_overflows_by_itself() -> None:
    model, data = Net(), [torch.zeros(16, 8), torch.zeros(16, 8), 100 * torch.randn(16, 8)]
    with torch.no_grad():
        model.second[0].weight.fill_(1e38)
        for layer in (model.stem, model.first[0], model.first[3]):
            layer.bias.zero_()  # zeros remain zeros up to the second block
    with refused(
        model,
        CalibrationError,
        r"batch 3 \(counted from 1\) makes NaN or infinite activations in block second",
        "input is finite: the model itself overflows, run it in a wider dtype",
    ):
        prune(model, data)


@pytest.mark.parametrize("progress", [False, True])
def test_a_wrong_shape_in_the_third_batch(progress: bool) -> None:
    model = Net()
    with refused(
        model,
        CalibrationError,
        r"batch 3 \(counted from 1\) does not fit the model",
        r"this batch: 0: \(16, 7\) float32",
        r"a batch that did: 0: \(16, 8\) float32",
    ):
        prune(model, [*batches(2), torch.randn(16, 7)], progress=progress)


def test_a_wrong_shape_in_the_first_batch() -> None:
    model = Net()
    with refused(model, CaptureError, "Net could not be traced", r"\(0: \(4, 7\) float32\)"):
        prune(model, batches(width=7))


def test_a_wrong_dtype_in_the_second_batch() -> None:
    model = Net()
    with refused(model, CalibrationError, "batch 2 ", "float64", "the model computes in torch.float32: cast the batch"):
        prune(model, [*batches(1), torch.randn(16, 8, dtype=torch.float64)])


def test_a_missing_argument_in_the_second_batch() -> None:
    model = Net()
    with refused(
        model, CalibrationError, "batch 2 .* does not fit the model", r"a batch that did: x: \(4, 8\) float32"
    ):
        prune(model, [{"x": torch.randn(4, 8)}, {"y": torch.randn(4, 8)}])


def test_a_data_loader_that_fails_keeps_its_own_error() -> None:
    def data() -> Iterator[Tensor]:
        yield torch.randn(4, 8)
        raise FileNotFoundError("image 2")

    model = Net()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match="image 2"):
        prune(model, data())
    assert snapshot(model) == before


def test_statistics_of_nothing_and_of_a_bad_batch() -> None:
    model = Net()
    captured = vbpfx.capture(model, torch.randn(4, 8))
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with refused(model, CalibrationError, "block first saw no data: run batches through the prepared graph"):
        vbpfx.statistics(observed)
    with torch.no_grad():
        observed(torch.randn(4, 8))
        observed(torch.full((4, 8), torch.nan))
        observed(torch.randn(4, 8))
    with refused(model, CalibrationError, r"block first: NaN or infinite activations in batch 2 \(counted from 1\)"):
        vbpfx.statistics(observed)


def test_a_graph_that_was_not_prepared() -> None:
    model = Net()
    captured = vbpfx.capture(model, torch.randn(4, 8))
    message = ("holds no observers", "pass what vbpfx.prepare returned")
    with refused(model, CalibrationError, *message):
        vbpfx.statistics(captured.graph_module)

    def read(batch: Any) -> Inputs:
        return as_inputs(batch, model)

    with refused(model, CalibrationError, *message):
        calibrate(captured.graph_module, batches())


# ---- objects that are not models -----------------------------------------------------------------------------------


def _quantised() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda: torch.compile(Net()), r"is a OptimizedModule; pass .*model\._orig_mod"),
        (lambda: nn.DataParallel(Net()), r"is a DataParallel; pass .*model\.module"),
        (lambda: nn.Sequential(nn.Linear(8, 4)).to("meta"), r"0\.weight is on the meta device .*prune_files"),
        (_quantised, r"0\.weight is a Int8Tensor, quantised .*prune the plain model"),
    ],
)
def test_what_hides_its_code_or_its_numbers(wrapped: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        vbpfx.prune(wrapped(), batches(), ratio=0.5, progress=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_script() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    with pytest.raises(CaptureError, match="is a RecursiveScriptModule; pass the module that the script was made of"):
        vbpfx.prune(script, batches(), ratio=0.5, progress=False)


def test_images_that_nobody_normalised() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with refused(model, CalibrationError, "the model computes in torch.float32: cast the batch to it"):
        vbpfx.prune(model, [torch.ones(4, 8, dtype=torch.uint8)], ratio=0.5, progress=False)


# ---- budgets and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ratio", "macs", "params"])
@pytest.mark.parametrize("value", [0, 1, -1, 1.5, "half", True, float("nan"), float("inf"), [0.5], 1 + 0j])
def test_a_budget_that_is_no_fraction(kind: str, value: Any) -> None:
    model = Net()
    with refused(model, BudgetError, rf"^{kind}={re.escape(repr(value))} is not a number between 0 and 1, exclusive"):
        prune(model, **({"ratio": None} | {kind: value}))


def test_no_budget() -> None:
    model = Net()
    options = ("exactly one budget is needed, found none", "ratio= ", "macs= ", "params= ")
    with refused(model, BudgetError, *options):
        vbpfx.prune(model, batches(), progress=False)
    with refused(model, BudgetError, *options):
        vbpfx.prune(model, iter(()), progress=False)  # the error is raised before the data is read


@pytest.mark.parametrize("second", ["macs", "params"])
def test_two_budgets(second: str) -> None:
    model = Net()
    with refused(model, BudgetError, rf"exactly one budget is needed, found ratio=0\.5 and {second}=0\.5"):
        prune(model, **{second: 0.5})


def kept(pruned: vbpfx.Pruned, kind: str) -> float:
    """Return the kept share of the dense model, counted by hand for Net at hidden widths w1 and w2."""
    w1, w2 = (pruned.report.widths[name][1] for name in ("first", "second"))
    weights = lambda w1, w2: 8 * 8 + 2 * 8 * w1 + 2 * 8 * w2  # noqa: E731
    biases = lambda w1, w2: 8 + 2 * 8 + (w1 + 8) + (w2 + 8)  # noqa: E731
    if kind == "macs":
        return weights(w1, w2) / weights(16, 32)
    return (weights(w1, w2) + biases(w1, w2)) / (weights(16, 32) + biases(16, 32))


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("options", [{}, {"min_width": 12}, {"round_to": 8}, {"method": "vbp"}])
def test_an_impossible_budget_names_the_nearest(kind: str, options: dict[str, Any]) -> None:
    model = Net()
    with refused(model, BudgetError, f"{kind}=0.001 cannot be met", "every block as narrow as the floors"):
        prune(model, **({"ratio": None, kind: 0.001} | options))
    with pytest.raises(BudgetError) as caught:
        prune(model, **({"ratio": None, kind: 0.001} | options))
    nearest = float(re.search(rf"use {kind}=([\d.]+) or more", str(caught.value))[1])
    pruned = prune(model, **({"ratio": None, kind: nearest} | options))
    assert kept(pruned, kind) <= nearest
    # The named budget is the nearest possible one to four digits: every block is at its floor.
    lowest = {"min_width": (12, 12), "round_to": (8, 8), "method": (1, 1)}.get(next(iter(options), ""), (1, 2))
    assert tuple(pruned.report.widths[name][1] for name in ("first", "second")) == lowest
    assert nearest - kept(pruned, kind) < 1e-4
    with pytest.raises(BudgetError, match="cannot be met"):
        prune(model, **({"ratio": None, kind: nearest - 1e-4} | options))


@pytest.mark.parametrize(
    ("options", "removable"),
    [
        ({}, 15 + 30),
        ({"min_width": 12}, 4 + 20),
        ({"min_width": 20}, 0 + 12),
        ({"round_to": 8}, 8 + 24),
        ({"method": "vbp"}, 15 + 31),
    ],
)
def test_a_ratio_above_the_floors_names_the_nearest(options: dict[str, Any], removable: int) -> None:
    model = Net()
    limits = "the floors and round_to" if "round_to" in options else "the floors"
    with refused(model, BudgetError, f"ratio=0.99 removes 48 of 48 neurons, but {limits} leave at most {removable};"):
        prune(model, **({"ratio": 0.99} | options))
    with pytest.raises(BudgetError) as caught:
        prune(model, **({"ratio": 0.99} | options))
    nearest = float(re.search(r"use ratio=([\d.]+) or less", str(caught.value))[1])
    assert prune(model, **({"ratio": nearest} | options)).plan.removed == removable


@pytest.mark.parametrize("kind", ["ratio", "macs", "params"])
def test_floors_that_leave_nothing_to_remove(kind: str) -> None:
    model = Net()
    with refused(model, BudgetError, "min_width"):
        prune(model, **({"ratio": None, kind: 0.5, "min_width": 32}))
    with pytest.raises(BudgetError) as caught:
        prune(model, **({"ratio": None, kind: 0.5, "min_width": 32}))
    for value in re.findall(rf"use {kind}=([\d.]+)", str(caught.value)):
        assert 0 < float(value) < 1, f"the message advises {kind}={value}, which is not a budget: {caught.value}"


@pytest.mark.parametrize("option", ["round_to", "min_width"])
@pytest.mark.parametrize("value", [0, -8, 2.5, True, "8"])
def test_a_width_that_is_no_positive_integer(option: str, value: Any) -> None:
    model = Net()
    with refused(model, BudgetError, f"{option}={value!r} is not a positive integer"):
        prune(model, **{option: value})


@pytest.mark.parametrize(
    ("option", "kind", "known"),
    [
        ("method", BudgetError, "auto, vbp"),
        ("criterion", BudgetError, "magnitude, obs, output_variance"),
        ("compensation", BudgetError, "mean, none"),
        ("allocation", BudgetError, "equal, global, normalised"),
        ("frontend", CaptureError, "'auto', 'symbolic' or 'export'"),
    ],
)
def test_an_unknown_name(option: str, kind: type[VbpfxError], known: str) -> None:
    model = Net()
    with refused(model, kind, f"^{option}='nonesuch' is unknown; ", known):
        prune(model, **{option: "nonesuch"})


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(("pattern", "near"), [("secnd", "second"), ("frist.0", r"first\.0"), ("zzz*", "first")])
def test_a_pattern_that_matches_nothing(option: str, pattern: str, near: str) -> None:
    model = Net()
    message = rf"{option} pattern '{re.escape(pattern)}' matches none of 2 blocks; near it are .*{near}"
    with refused(model, AnalysisError, message):
        prune(model, **{option: pattern})
    with refused(model, AnalysisError, message):
        prune(model, **{option: ["first", pattern]})


def test_nothing_is_left() -> None:
    model = Net()
    with refused(model, AnalysisError, r"include=None, exclude='\*' and kinds=\['mlp'\] leave none of 2 blocks"):
        prune(model, exclude="*")
    with refused(
        model, AnalysisError, r"include='first', exclude=\['first\.\*'\] and kinds=\['mlp'\] leave none of 2 blocks"
    ):
        prune(model, include="first", exclude=["first.*"])


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 4))
    with refused(model, AnalysisError, "has no block that can be narrowed", "0: softmax mixes the channels along it"):
        prune(model)
    one = nn.Linear(8, 4)
    with refused(one, AnalysisError, "has no block that can be narrowed"):
        prune(one)
    none = nn.Sequential(nn.ReLU())
    with refused(none, AnalysisError, "has no block that can be narrowed"):
        prune(none)


# ---- models ---------------------------------------------------------------------------------------------------------


def test_half_precision_on_the_cpu() -> None:
    model = Net().half()
    with refused(
        model, CaptureError, r"float16 on the CPU \(parameter stem\.weight\)", r"model\.float\(\)", r"\.half\(\) on the result"
    ):  # fmt: skip
        prune(model, [torch.randn(4, 8).half()])


@pytest.mark.parametrize("model", [F.relu, Net, "net", None])
def test_no_module(model: Any) -> None:
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module, got "):
        vbpfx.capture(model, torch.randn(4, 8))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:  # untraceable
            x = -x
        return self.fc2(self.fc1(x).relu())


class NumpyInside(DataDependent):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.from_numpy(self.fc1(x).numpy() * 2)  # untraceable
        return self.fc2(h)


class Raises(DataDependent):
    def forward(self, x: Tensor) -> Tensor:
        return self.deep(x)

    def deep(self, x: Tensor) -> Tensor:
        raise ValueError("not today")  # untraceable


@pytest.mark.parametrize("frontend", ["auto", "symbolic", "export"])
@pytest.mark.parametrize("kind", [DataDependent, NumpyInside, Raises])
def test_a_model_that_cannot_be_traced(kind: type[nn.Module], frontend: str) -> None:
    lines, first = inspect.getsourcelines(kind)
    number = first + next(i for i, line in enumerate(lines) if "# untraceable" in line)
    model = kind()
    front_ends = ["symbolic", "export"] if frontend == "auto" else [frontend]
    with refused(
        model,
        CaptureError,
        rf"^{kind.__name__} could not be traced with inputs \(0: \(4, 8\) float32\)",
        "Try: check that the model runs on these inputs",
        # Every front end that was tried names the line.
        "".join(rf"(?s:.*){name}: [^\n]*\n    at {re.escape(__file__)}:{number}: " for name in front_ends),
    ):
        prune(model, frontend=frontend)


def test_a_model_that_cannot_be_copied() -> None:
    model = Net()
    model.lock = (x for x in "a generator")
    with refused(model, CaptureError, "Net cannot be copied", "remove the attribute"):
        prune(model)


# ---- stages of different models -------------------------------------------------------------------------------------


def mlp(width: int = 16, activation: type[nn.Module] = nn.GELU, depth: int = 1) -> nn.Module:
    layers = [nn.Linear(8, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def stages(model: nn.Module, **options: Any) -> tuple[vbpfx.Captured, vbpfx.Analysis, vbpfx.Statistics]:
    captured = vbpfx.capture(model, torch.randn(4, 8))
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis)
    with torch.no_grad():
        observed(torch.randn(16, 8))
    return captured, analysis, vbpfx.statistics(observed)


def test_statistics_of_a_model_with_other_blocks() -> None:
    model = Net()
    _, analysis, _ = stages(model)
    _, _, other = stages(mlp())
    with refused(model, CalibrationError, "the statistics lack block first", "gather them from this model"):
        vbpfx.make_plan(analysis, other, ratio=0.5)


@pytest.mark.parametrize("width", [8, 24])
def test_statistics_of_a_model_of_another_width(width: int) -> None:
    model = mlp()
    _, analysis, _ = stages(model)
    _, _, other = stages(mlp(width))  # the block has the same name
    with refused(model, CalibrationError, "block 0->2"):
        vbpfx.make_plan(analysis, other, ratio=0.5)


def test_statistics_of_a_model_with_other_consumers() -> None:
    class Two(nn.Module):
        """``b`` reads the hidden values directly or behind a function, which gives one or two consumer inputs."""

        def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.fc, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
            self.behind = behind

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x).relu()
            return self.a(h) + self.b(self.behind(h))

    model = Two(torch.tanh)
    _, analysis, own = stages(model)
    _, _, other = stages(Two(lambda h: h))
    (block,) = analysis.blocks
    assert (len(own.moments[block.name]), len(other.moments[block.name])) == (2, 1)
    with refused(model, CalibrationError, f"block {re.escape(block.name)}"):
        vbpfx.make_plan(analysis, other, ratio=0.5)


def test_statistics_of_different_models_do_not_merge() -> None:
    model = Net()
    _, _, own = stages(model)
    with refused(
        model, CalibrationError, r"different blocks cannot be merged: block 0->2, block first, block second differ"
    ):
        own | stages(mlp())[2]
    narrow, wide = mlp(16), mlp(24)
    with refused(narrow, CalibrationError, "block 0->2"):
        stages(narrow)[2] | stages(wide)[2]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: mlp(24), id="width"),
        pytest.param(lambda: mlp(activation=nn.ReLU), id="class names"),
        pytest.param(lambda: mlp(depth=2), id="depth"),
        pytest.param(lambda: nn.ModuleDict({"0": mlp()})["0"].append(nn.ReLU()), id="one module more"),
    ],
)
def test_a_plan_of_another_model(other: Callable[[], nn.Module]) -> None:
    _, analysis, statistics = stages(mlp())
    plan = vbpfx.make_plan(analysis, statistics, ratio=0.5)
    model = other()
    message = ("made for a model of another structure than this Sequential", "build the model as it was")
    with refused(model, ArtifactError, *message):
        vbpfx.apply_plan(model, plan)
    with refused(model, ArtifactError, *message):
        vbpfx.convert(vbpfx.capture(model, torch.randn(4, 8)), plan)


def test_the_pruned_model_is_another_model() -> None:
    model = Net()
    pruned = prune(model)
    small = pruned.apply_to(model)
    with refused(small, ArtifactError, "another structure than this Net"):
        vbpfx.apply_plan(small, pruned.plan)


def test_verify_catches_a_changed_network() -> None:
    model = Net()
    pruned = prune(model)
    with torch.no_grad():
        pruned.graph_module.get_parameter("first.3.bias")[0] += 0.1
    with refused(model, VerificationError, "differs from the substitution reference", r"\['first', 'second'\]"):
        vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan)
    with refused(model, VerificationError, r"returns shapes \[\(5, 4\)\], the dense one \[\(5, 8\)\]"):
        vbpfx.verify(pruned.captured, mlp(), pruned.plan)
