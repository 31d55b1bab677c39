"""Fine-tuning: losses against computations by hand, unchanged inputs, and interrupted runs that resume.

Most tests use small networks with dropout and BatchNorm; one trains the heavily pruned digits transformer. Equalities up to
rounding are in float64, with a tolerance of 1e-9 because AdamW divides by the root of small squares.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_unchanged, state
from safetensors import safe_open
from safetensors.torch import load_file
from students import CLASSES, FEATURES, Plain, pair
from students import batches as make_batches
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, WeightedRandomSampler

import vbpfx
import vbpfx.finetuning.distillation as distillation
import vbpfx.finetuning.training_data as training_data_module
from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.demo.digits import accuracy, load_digits, load_trained
from vbpfx.errors import CalibrationError, CaptureError, FinetuneError
from vbpfx.finetuning.distillation import Distillation, choose_features, label_loss
from vbpfx.finetuning.recipes import RECIPES, Recipe, make_recipe
from vbpfx.outputs.divergence import divergence
from vbpfx.outputs.fields import result_paths
from vbpfx.outputs.watched import Signals

ROUNDING = 1e-9


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _difference(one: nn.Module, other: nn.Module) -> float:
    theirs = other.state_dict()
    return max((tensor - theirs[name]).abs().max().item() for name, tensor in one.state_dict().items())


def _finetune(*args: Any, **options: Any) -> vbpfx.FineTuned:
    return vbpfx.finetune(*args, **({"epochs": 2, "learning_rate": 1e-2, "progress": False} | options))


# the losses


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_kl_is_the_sum_written_out() -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    found = Distillation("kl", 2.5).output_loss(Inputs((), {}), Signals(student, {}), Signals(teacher, {}))
    p, q = _softmax(teacher.numpy() / 2.5), _softmax(student.numpy() / 2.5)
    expected = 2.5**2 * sum(p[b, c] * (math.log(p[b, c]) - math.log(q[b, c])) for b in range(3) for c in range(5)) / 3
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_padding_counts_in_no_loss() -> None:
    """Losses average over a sample's own positions and then over samples, computed here with loops."""
    lengths, mask = (4, 1), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    inputs = Inputs((), {"attention_mask": mask})
    found = Distillation("kl", 1.0).output_loss(inputs, Signals(student, {}), Signals(teacher, {}))
    p, q = _softmax(teacher.numpy()), _softmax(student.numpy())
    positions = (p * (np.log(p) - np.log(q))).sum(-1)
    assert found.item() == pytest.approx(np.mean([positions[b, :n].mean() for b, n in enumerate(lengths)]), rel=1e-12)

    measure = Distillation("mse", 1.0)
    measure.measure_scales([(inputs, Signals(teacher, {}))])
    rows = np.concatenate([teacher[b, :n].numpy() for b, n in enumerate(lengths)])
    scale = rows.var(0, ddof=1).mean()
    found = measure.output_loss(inputs, Signals(student, {}), Signals(teacher, {}))
    squares = (student - teacher).square().numpy()
    expected = np.mean([squares[b, :n].mean() for b, n in enumerate(lengths)]) / scale
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_features_are_relative_to_the_teachers_variance_over_all_batches() -> None:
    one, two = torch.randn(3, 7, 5, dtype=torch.float64), 4 + torch.randn(2, 7, 5, dtype=torch.float64)
    measure = Distillation("kl", 1.0, ("a", "b"))
    runs = [(Inputs((), {}), Signals(torch.zeros(1, 1), {"a": [t], "b": [3 * t, t]})) for t in (one, two)]
    measure.measure_scales(runs)
    rows = np.concatenate([one.reshape(-1, 5), two.reshape(-1, 5)])
    scale_a, scale_b = rows.var(0, ddof=1).mean(), np.concatenate([3 * rows, rows]).var(0, ddof=1).mean()
    ours = {"a": [one + 1], "b": [3 * one + 2, one]}
    found = measure.feature_loss(Inputs((), {}), Signals(one, ours), runs[0][1])
    assert found.item() == pytest.approx((1 / scale_a + 4 / scale_b + 0) / 3, rel=1e-12)


def test_label_loss_is_the_cross_entropy_over_labels_that_count() -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, 4, 0], [2, -100, -100]])
    logs = np.log(_softmax(logits.numpy()))
    expected = -np.mean([np.mean([logs[0, 0, 1], logs[0, 1, 4], logs[0, 2, 0]]), logs[1, 0, 2]])
    assert label_loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(FinetuneError, match="do not go with logits of shape"):
        label_loss(logits, labels[:, 0])


def test_recorded_losses_are_those_of_the_networks() -> None:
    """The losses at start and end on held-out data and the loss of the first step equal those computed in NumPy."""
    student, teacher = pair(Plain)
    data, validation = make_batches(1), make_batches(3, size=5)
    done = _finetune(student, teacher, data, validation=validation, temperature=2.0, feature_weight=0.0, epochs=1)

    def kl(network: nn.Module, batches: list[Tensor]) -> float:
        with torch.no_grad():
            p, q = (_softmax(torch.cat([n(b) for b in batches]).numpy() / 2) for n in (teacher, network))
        return 4 * float((p * np.log(p / q)).sum(-1).mean())

    assert done.history[0].held_out_loss == pytest.approx(kl(student, validation), rel=1e-12)
    assert done.history[1].held_out_loss == pytest.approx(kl(done.model, validation), rel=1e-12)
    assert done.history[1].train_loss == pytest.approx(kl(student, data), rel=1e-12)


# recipes


def rates_of(schedule: LRScheduler, steps: int) -> Iterator[float]:
    for _ in range(steps):
        yield schedule.optimizer.param_groups[0]["lr"]
        schedule.optimizer.step()
        schedule.step()


def scheduled(recipe: Recipe, steps: int) -> list[float]:
    """The learning rates of a whole run."""
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "initial_lr": recipe.learning_rate}]
    return list(rates_of(recipe.schedule(torch.optim.SGD(parameters, lr=recipe.learning_rate), 0, steps), steps))


def test_the_papers_recipe() -> None:
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.learning_rate, paper.weight_decay) == (10, 1.5e-5, 0.01)
    assert (paper.temperature, paper.feature_weight, paper.max_norm, paper.patience) == (1.0, 0.0, None, None)
    rates = scheduled(paper, 100)
    assert [rates[step] for step in (0, 50)] == [1.5e-5, pytest.approx(0.75e-5)]
    assert 0 < rates[99] < 1e-8


def test_warm_up_rises_then_the_cosine_falls() -> None:
    recipe = make_recipe("paper", learning_rate=8.0)
    recipe = Recipe(**{**vars(recipe), "warmup": 0.4})
    rates = scheduled(recipe, 10)
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[7] == pytest.approx(4.0)


def test_a_warm_up_may_take_every_step() -> None:
    recipe = Recipe(**{**vars(make_recipe("paper", learning_rate=8.0)), "warmup": 0.99})
    assert scheduled(recipe, 4) == [2.0, 4.0, 6.0, 8.0]


def test_every_step_has_its_learning_rate(tmp_path: Path) -> None:
    """Torch's own LinearLR and CosineAnnealingLR, which compute every rate from the one before, say what the rates are."""
    student, teacher = pair(Plain)
    rates: list[float] = []
    options: dict[str, Any] = {
        "warmup": 0.25,
        "epochs": 4,
        "learning_rate": 1e-2,
        "max_norm": None,
        "checkpoint": tmp_path,
    }
    recipe = Recipe(**{**vars(RECIPES["paper"]), **{name: options.pop(name) for name in ("warmup", "max_norm")}})
    noting = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        _finetune(student, teacher, make_batches(5), recipe=recipe, held_out=0, max_seconds=0, **options)
        begun = len(rates)
        _finetune(student, teacher, make_batches(5), recipe=recipe, held_out=0, **options)
    finally:
        noting.remove()
    steps, rise = 20, 5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    parts = [LinearLR(optimizer, 1 / rise, total_iters=rise - 1), CosineAnnealingLR(optimizer, steps - rise)]
    expected = list(rates_of(SequentialLR(optimizer, parts, [rise]), steps))
    assert 0 < begun < steps  # the rest goes on from a checkpoint
    assert rates == pytest.approx(expected, rel=0, abs=1e-12)


def test_the_paper_is_adamw_on_the_kl() -> None:
    """Three steps equal those of torch.optim.AdamW on the KL divergence of the logits, in the order of the data."""
    student, teacher = pair(Plain)
    (batch,) = make_batches(1)
    done = vbpfx.finetune(
        student, teacher, [batch], recipe="paper", epochs=3, learning_rate=0.01, held_out=0, progress=False
    )
    expected = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.01)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 3))
        p = teacher(batch).detach().softmax(-1)
        loss = (p * (p.log() - expected(batch).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert _difference(done.model, expected) < ROUNDING
    assert done.stopped == "epochs"
    assert done.best is done.history[3]


# unchanged objects and the returned model


def test_teacher_student_and_generators_stay_as_they_were() -> None:
    student, teacher = pair()
    student.head.weight.requires_grad_(False)
    teacher.train()
    teacher.blocks[0].eval()
    data, before = make_batches(), (state(student), state(teacher))
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    done = _finetune(student, teacher, data)
    assert_unchanged(student, before[0])
    assert_unchanged(teacher, before[1])
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert not done.model.training
    assert not any(m._forward_hooks for m in done.model.modules())
    assert all(p.grad is None for p in done.model.parameters())
    assert not done.model.head.weight.requires_grad
    assert done.model.head.bias.requires_grad
    assert not _same(done.model, student)
    assert torch.equal(done.model.head.weight, student.head.weight)


def test_the_best_epoch_is_returned() -> None:
    """The learning rate overshoots, so that losses rise and fall; the weights of the epoch with the lowest are returned."""
    student, teacher = pair()
    validation = make_batches(2)
    done = _finetune(
        student,
        teacher,
        make_batches(),
        validation=validation,
        epochs=8,
        learning_rate=0.3,
        patience=8,
        feature_weight=0.0,
    )
    losses = [epoch.held_out_loss for epoch in done.history]
    assert done.best.held_out_loss == min(losses)
    assert done.best is not done.history[-1]
    measured = Distillation("kl", RECIPES["default"].temperature)
    with torch.no_grad():
        found = [
            measured.output_loss(Inputs((), {}), Signals(done.model(b), {}), Signals(teacher(b), {}))
            for b in validation
        ]
    assert np.mean(found) == pytest.approx(done.best.held_out_loss, rel=1e-12)
    assert "best" in str(done)


def test_training_that_only_hurts_returns_the_start() -> None:
    student, teacher = pair()
    done = _finetune(student, teacher, make_batches(), learning_rate=100.0, epochs=10, patience=2)
    assert _same(done.model, student)
    assert done.best is done.history[0]
    assert done.stopped == "patience"
    assert len(done.history) == 3


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_mixing_goes_a_part_of_the_way(alpha: float) -> None:
    """The result is a mixture of start and trained weights, while training continues from the trained weights."""
    student, teacher = pair()
    options = {"held_out": 0, "epochs": 3}
    whole = _finetune(student, teacher, make_batches(), **options).model.state_dict()
    part = _finetune(student, teacher, make_batches(), mixing=alpha, **options).model.state_dict()
    for name, start in student.state_dict().items():
        if start.is_floating_point():
            expected = start + alpha * (whole[name] - start)
            torch.testing.assert_close(part[name], expected, rtol=1e-12, atol=1e-14)


def test_what_is_held_out_is_measured_on_the_mixture(tmp_path: Path) -> None:
    student, teacher = pair()
    validation = make_batches(2)
    options = {"validation": validation, "epochs": 4, "mixing": 0.3, "feature_weight": 0.0}
    done = _finetune(student, teacher, make_batches(), **options)
    again = _finetune(done.model, teacher, make_batches(), **(options | {"epochs": 1, "learning_rate": 1e-9}))
    assert done.best is not done.history[0]
    assert again.history[0].held_out_loss == pytest.approx(done.best.held_out_loss, rel=1e-12)
    # A run that is interrupted after an epoch and resumed still mixes with the original start.
    first = _finetune(student, teacher, make_batches(), checkpoint=tmp_path, max_seconds=0.0, **options)
    assert first.stopped == "time"
    resumed = _finetune(student, teacher, make_batches(), checkpoint=tmp_path, **options)
    assert _same(resumed.model, done.model)


def test_trainable_chooses_parameters() -> None:
    student, teacher = pair(Plain)
    done = _finetune(student, teacher, make_batches(), trainable="fc1.*")
    assert torch.equal(done.model.fc2.weight, student.fc2.weight)
    assert not torch.equal(done.model.fc1.weight, student.fc1.weight)
    assert done.model.fc2.weight.requires_grad


class Writing(nn.Module):
    """A network that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mul_(2))


def test_a_model_that_writes_into_its_input_changes_no_data() -> None:
    data = make_batches()
    _finetune(*pair(Writing), data)
    assert all(map(torch.equal, data, make_batches()))


def test_a_graph_module_trains() -> None:
    model = pair(Plain)[1]
    pruned = vbpfx.prune(model, make_batches(), ratio=0.5, progress=False)
    with torch.no_grad():
        pruned.graph_module.fc2.weight *= 2
    done = _finetune(pruned.graph_module, model, make_batches(), feature_weight=0.0)
    assert done.best.held_out_loss < done.history[0].held_out_loss
    assert isinstance(done.model, torch.fx.GraphModule)


# held-out data


class Rows(Dataset[tuple[Tensor, int]]):
    """A data set whose features are the number of the sample, and which records the samples read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, set[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.add(index)
        return torch.full((FEATURES,), float(index), dtype=torch.float64), index % CLASSES


class Stream:
    """An iterable of batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Noting(nn.Module):
    """A network that records the numbers of the samples it was trained on and of those it was measured on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(FEATURES, CLASSES).double()
        self.notes: dict[bool, list[list[int]]] = {True: [], False: []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
        twin = Noting()
        twin.load_state_dict(self.state_dict())
        twin.notes = self.notes
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.notes[self.training].append([int(number) for number in x[:, 0]])
        return self.fc(x / 40)


def _numbered(count: int, size: int) -> list[Tensor]:
    numbers = torch.arange(count, dtype=torch.float64)[:, None].expand(-1, FEATURES)
    return list(torch.split(numbers, size))


@pytest.mark.parametrize("kind", ["list", "stream", "loader", "shuffled", "weighted"])
def test_held_out_samples_are_never_trained_on(kind: str) -> None:
    rows = Rows(40)
    data: Any = {
        "list": _numbered(40, 4),
        "stream": Stream(_numbered(40, 4)),
        "loader": DataLoader(rows, batch_size=4),
        "shuffled": DataLoader(rows, batch_size=4, shuffle=True),
        "weighted": DataLoader(rows, batch_size=4, sampler=list(range(40))),
    }[kind]
    student = Noting()
    _finetune(student, Plain().double(), data, epochs=3, held_out=0.2, feature_weight=0.0)
    trained, measured = (sorted({n for batch in student.notes[mode] for n in batch}) for mode in (True, False))
    assert len(measured) == 8
    assert len(trained) == 32
    assert set(trained) | set(measured) == set(range(40))
    epochs = [[n for batch in student.notes[True][i : i + 8] for n in batch] for i in (0, 8, 16)]
    assert all(sorted(epoch) == trained for epoch in epochs)
    assert (epochs[0] != epochs[1]) == (kind in ("list", "shuffled"))  # an order chosen by the caller is kept


def test_a_stream_that_changes_is_refused() -> None:
    data = DataLoader(Rows(40), batch_size=4, sampler=WeightedRandomSampler(torch.ones(40), 40))
    with pytest.raises(FinetuneError, match=r"would be trained on\. Pass validation="):
        _finetune(Plain().double(), Plain().double(), data)
    _finetune(Plain().double(), Plain().double(), data, validation=_numbered(8, 4))


def test_the_split_and_the_order_are_the_seeds() -> None:
    def notes(seed: int) -> dict[bool, list[list[int]]]:
        student = Noting()
        _finetune(student, Plain().double(), _numbered(40, 4), seed=seed, epochs=1, feature_weight=0.0)
        return student.notes

    first, again, other = notes(0), notes(0), notes(1)
    assert first == again
    assert first[True] != other[True]
    assert first[False] != other[False]


# labels


def test_labels_count_only_if_asked() -> None:
    student, teacher = pair(Plain)
    rows = make_batches(4)
    one, two = ([(b, torch.full((6,), label)) for b in rows] for label in (0, 3))
    without = [_finetune(student, teacher, data).model for data in (one, two, rows)]
    assert _same(without[0], without[1])
    assert _same(without[0], without[2])
    told = [_finetune(student, teacher, data, labels=True, held_out=0, epochs=20).model for data in (one, two)]
    with torch.no_grad():
        means = [model(torch.cat(rows)).softmax(-1).mean(0) for model in told]
    assert means[0][0] > means[1][0] + 0.2
    assert means[1][3] > means[0][3] + 0.2
    with pytest.raises(FinetuneError, match="has none"):
        _finetune(student, teacher, rows, labels=True)


# steps


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_two_half_batches_are_one_step_of_the_whole(kind: Any) -> None:
    """This also holds for unequal halves, because the loss is averaged over samples and not over batches."""
    student, teacher = pair(Plain)
    whole = make_batches(2, size=9)
    halves = [half for batch in whole for half in (batch[:5], batch[5:])]
    options: dict[str, Any] = {"loss": kind, "validation": make_batches(2), "features": "fc2", "epochs": 3}
    # There is one batch per epoch, so that shuffling pairs the two halves of one batch.
    for batch, parts in zip(whole, (halves[:2], halves[2:]), strict=True):
        one = _finetune(student, teacher, [batch], **options)
        two = _finetune(student, teacher, parts, accumulate=2, **options)
        assert one.best.step == two.best.step == 3
        assert _difference(one.model, two.model) < ROUNDING
        assert _difference(one.model, student) > 1e-3


def test_augmentation_reaches_training_alone_and_repeats() -> None:
    seen: list[int] = []

    def augment(inputs: Inputs) -> Inputs:
        seen.append(int(inputs.tensors[0][0, 0]))
        return inputs.map(lambda t: t + torch.randn_like(t))

    student, teacher = Noting(), Plain().double()
    runs = [_finetune(student, teacher, _numbered(20, 4), augment=augment, feature_weight=0.0) for _ in range(2)]
    assert _same(runs[0].model, runs[1].model)
    assert len(seen) == 2 * 2 * 4
    held_out = {batch[0] for batch in student.notes[False]}
    assert not held_out & set(seen)


# interrupted runs


def test_a_run_that_is_broken_off_at_every_step_ends_like_one_that_is_not(tmp_path: Path) -> None:
    """The result is equal bit for bit, with dropout, BatchNorm, features, augmentation and an incomplete last step."""
    student, teacher = pair()
    options: dict[str, Any] = {
        "epochs": 3,
        "accumulate": 2,
        "held_out": 0.3,
        "augment": lambda inputs: inputs.map(lambda t: t + 0.1 * torch.randn_like(t)),
    }
    whole = _finetune(student, teacher, make_batches(), **options)
    runs = []
    while not runs or (runs[-1].stopped == "time" and len(runs) < 12):
        torch.manual_seed(len(runs))  # the caller's random generator has no effect
        runs.append(_finetune(student, teacher, make_batches(), checkpoint=tmp_path, max_seconds=0, **options))
    assert len(runs) == 9
    assert [run.history[-1].step for run in runs] == list(range(1, 10))
    assert runs[-1].history == whole.history
    assert _same(runs[-1].model, whole.model)
    assert not _same(whole.model, student)
    assert runs[-1].stopped == whole.stopped == "epochs"
    again = _finetune(student, teacher, make_batches(), checkpoint=tmp_path, **options)
    assert _same(again.model, whole.model)


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    student, teacher = pair()
    data, whole = make_batches(), _finetune(*pair(), make_batches(), epochs=3)
    calls = 0

    def break_off(inputs: Inputs) -> Inputs:
        nonlocal calls
        calls += 1
        if calls == 11:  # an epoch has 7 steps
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        _finetune(student, teacher, data, epochs=3, checkpoint=tmp_path, checkpoint_every=2, augment=break_off)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["vbpfx.finetune"])["data"]["position"]["step"] == 10
    done = _finetune(student, teacher, data, epochs=3, checkpoint=tmp_path, checkpoint_every=2)
    assert done.history == whole.history
    assert _same(done.model, whole.model)
    assert load_file(file)["network.head.weight"].shape == (CLASSES, FEATURES)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    _finetune(student, teacher, make_batches(), checkpoint=tmp_path)
    with pytest.raises(FinetuneError, match=r"seed was 0 in that run and is 1 now.*resume=False"):
        _finetune(student, teacher, make_batches(), checkpoint=tmp_path, seed=1)
    with pytest.raises(FinetuneError, match="student was"):
        _finetune(teacher, teacher, make_batches(), checkpoint=tmp_path)
    fresh = _finetune(student, teacher, make_batches(), checkpoint=tmp_path, seed=1, resume=False)
    assert fresh.history[-1].epoch == 2
    (tmp_path / "finetune.safetensors").write_bytes(b"damaged")
    with pytest.raises(FinetuneError, match="not a checkpoint of finetune, or damaged"):
        _finetune(student, teacher, make_batches(), checkpoint=tmp_path)


# many processes

_SCRIPT = """
import sys, torch, vbpfx
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, {tests!r})
from students import Plain, batches, pair
torch.set_num_threads(1)
student, teacher = pair(Plain)
done = vbpfx.finetune(student, teacher, batches(9, 5), epochs=2, learning_rate=1e-2, features="fc2", progress=False,
                      checkpoint={folder!r})
rank = int(__import__("os").environ["RANK"])
save_file(done.model.state_dict(), {folder!r} + f"/{{rank}}.safetensors")
"""


def test_two_processes_are_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    """Of nine batches one is held out; both runs take the others in the same order, two per step."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    student, teacher = pair(Plain)
    one = _finetune(student, teacher, make_batches(9, 5), features="fc2", accumulate=2)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())
    found = Plain().double()
    found.load_state_dict(ranks[0])
    assert _difference(found, one.model) < ROUNDING
    assert _difference(found, student) > 1e-3
    assert (tmp_path / "finetune.safetensors").exists()


# precision


def test_half_precision_computes_in_half_and_keeps_whole_weights() -> None:
    student, teacher = (network.float() for network in pair())
    data = [batch.float() for batch in make_batches()]
    done = _finetune(student, teacher, data, mixed_precision="bf16")
    plain = _finetune(student, teacher, data)
    assert all(p.dtype == torch.float32 for p in done.model.parameters())
    assert done.best.held_out_loss < done.history[0].held_out_loss
    assert done.history[0].held_out_loss != plain.history[0].held_out_loss
    assert done.history[0].held_out_loss == pytest.approx(plain.history[0].held_out_loss, rel=0.1)
    with pytest.raises(FinetuneError, match="too coarse for small steps"):
        _finetune(student.bfloat16(), teacher, data)


# embeddings and features


class Encoder(nn.Module):
    """A network that returns the outputs of a Hugging Face encoder, and a loss if it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return {"last_hidden_state": x} if labels is None else {"loss": x.mean(), "last_hidden_state": x}


def test_embeddings_of_padded_text() -> None:
    """Values at padded positions have no effect."""
    student, teacher = pair(Encoder)
    mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).long()
    torch.manual_seed(0)
    rows = [torch.randn(3, 5, FEATURES, dtype=torch.float64) for _ in range(4)]
    clean, dirty = (
        [{"x": x + noise * 100 * (1 - mask[..., None]), "attention_mask": mask, "labels": mask} for x in rows]
        for noise in (0, 1)
    )
    runs = [_finetune(student, teacher, data, loss="mse", epochs=8) for data in (clean, dirty)]
    assert runs[0].features == ("layers.0", "layers.1", "layers.2")
    assert _difference(runs[0].model, runs[1].model) < ROUNDING
    assert runs[0].best.held_out_loss < 0.8 * runs[0].history[0].held_out_loss
    with pytest.raises(FinetuneError, match="with last_hidden_state, holds no logits"):
        _finetune(student, teacher, clean)


def test_features_pull_inner_values_to_the_teachers() -> None:
    student, teacher = pair()
    runs = [_finetune(student, teacher, make_batches(), feature_weight=weight, epochs=4) for weight in (1e-9, 10.0)]
    rows = torch.cat(make_batches())
    assert runs[0].features == ("blocks.0", "blocks.1")
    with torch.no_grad():
        errors = [(run.model.blocks[0](rows) - teacher.blocks[0](rows)).square().mean().item() for run in runs]
    assert errors[1] < 0.8 * errors[0]


def test_features_that_cannot_be_compared_are_refused() -> None:
    model = pair(Plain)[1]
    pruned = vbpfx.prune(model, make_batches(), ratio=0.5, progress=False)
    example = Inputs((make_batches()[0],), {})
    assert choose_features(pruned.graph_module, model, example, "fc2", "kl") == ("fc2",)
    with pytest.raises(FinetuneError, match=r"fc1 cannot be compared: shapes \[\(6, 8\)\] in the student"):
        _finetune(pruned.graph_module, model, make_batches(), features="fc*")
    with pytest.raises(FinetuneError, match=r"features pattern 'fc3' matches none .* near it are fc"):
        _finetune(pruned.graph_module, model, make_batches(), features="fc3")
    assert distillation._repeated_blocks(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))) == []


# errors


def _loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(10, FEATURES).double()), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "papers"}, "there is no recipe 'papers'; choose one of 'paper', 'default', 'few'"),
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"loss": "l1"}, "loss must be 'kl' or 'mse'"),
        ({"loss": "mse", "labels": True}, "loss must be 'kl' or 'mse', and 'kl' with labels"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1"),
        ({"trainable": "fc7.*"}, "trainable pattern 'fc7.*' matches none"),
        ({"validation": []}, "validation is empty"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is unknown"),
        ({"data": []}, "data is empty"),
        ({"data": torch.randn(3, FEATURES)}, "data is one Tensor"),
        ({"data": iter([torch.randn(3, FEATURES)])}, "cannot be iterated over once per epoch"),
        ({"data": [torch.randn(3, FEATURES)]}, "held_out=0.1 of 1 batch leaves nothing to train on"),
        (
            {"data": [torch.randn(3, 2).double()] * 2},
            r"does not run through Plain: .*\n  the batch: 0: \(3, 2\) float64",
        ),
        ({"data": _loader(sampler=DistributedSampler(range(10), 2, 0))}, "pass the loader without it"),
        ({"data": _loader(batch_size=16, drop_last=True)}, "pass drop_last=False"),
        ({"teacher": nn.Linear(FEATURES, 3).double()}, r"shape \(6, 4\) in the student and \(6, 3\) in the teacher"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    student, teacher = pair(Plain)
    given = {"student": student, "teacher": teacher, "data": make_batches(), "feature_weight": 0.0} | options
    with pytest.raises(FinetuneError, match=message):
        _finetune(**given)


def test_other_errors_are_those_of_the_stages() -> None:
    student, teacher = pair(Plain)
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module"):
        _finetune(student, lambda x: x, make_batches())
    with pytest.raises(CalibrationError, match=r"must return \(args, kwargs\)"):
        _finetune(student, teacher, make_batches(), inputs=lambda batch: batch)
    frozen = student.requires_grad_(False)
    with pytest.raises(FinetuneError, match="no parameter of the student requires gradients"):
        _finetune(frozen, teacher, make_batches())


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    student, teacher = pair(Plain)
    data = make_batches()
    calls = iter(range(100))

    def break_third(inputs: Inputs) -> Inputs:
        return inputs.map(lambda t: t * (math.nan if next(calls) == 2 else 1))

    with pytest.raises(FinetuneError, match=r"step 3 \(epoch 1, learning rate 0\.0\d+\)\. Lower learning_rate"):
        _finetune(student, teacher, data, augment=break_third)
    with pytest.raises(FinetuneError, match="held-out data is nan before any step"):
        _finetune(student, teacher, data, validation=[data[0] * math.nan])


def test_accelerate_is_imported_only_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, vbpfx; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(FinetuneError, match="pip install accelerate"):
        _finetune(*pair(Plain), make_batches())


def test_the_bar_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    _finetune(*pair(Plain), make_batches(), progress=True)
    assert capfd.readouterr().out == ""


# a real transformer


def test_a_transformer_pruned_hard_recovers_without_labels() -> None:
    """After the paper's method removed 97 % of the hidden neurons, four epochs recover most of the lost accuracy."""
    split, dense = load_digits(), load_trained()
    batches = list(torch.split(split.train_images, 50))
    pruned = vbpfx.prune(dense, batches[:12], ratio=0.97, method="vbp", progress=False, verify=False)
    student = pruned.apply_to(dense)
    done = vbpfx.finetune(student, dense, batches, epochs=4, progress=False)
    scores = [accuracy(model, split.test_images, split.test_labels) for model in (dense, student, done.model)]
    assert scores[1] < scores[0] - 0.03
    assert scores[2] > scores[0] - 0.012
    assert done.best.held_out_loss < 0.2 * done.history[0].held_out_loss


# several outputs


class Several(nn.Module):
    """A network that returns logits, boxes with numbers a hundred times as large, one score per sample, and more logits."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU())
        self.heads, self.form = nn.ModuleList(nn.Linear(32, n) for n in (CLASSES, 5, 1, 3)), form

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        logits, boxes, score, kind = (head(h) for head in self.heads)
        found = {"logits": logits, "boxes": 100 * boxes, "score": score[:, 0], "more": {"kind_logits": kind}}
        return found if self.form == "dict" else (logits, 100 * boxes, score[:, 0])


def test_every_output_counts_by_its_spread() -> None:
    """The loss sums the KL divergences of both logits and the errors of boxes and score relative to their variances."""
    student, teacher = pair(Several)
    data = [torch.randn(40, FEATURES, dtype=torch.float64)]
    found = _finetune(
        student, teacher, data, epochs=1, learning_rate=1e-9, temperature=2.0, validation=data, feature_weight=0.0
    )
    with torch.no_grad():
        ours, theirs = student(data[0]), teacher(data[0])

    def kl(one: Tensor, other: Tensor) -> float:
        p, q = _softmax(other.numpy() / 2), _softmax(one.numpy() / 2)
        return 4 * float((p * (np.log(p) - np.log(q))).sum(-1).mean())

    def relative(one: Tensor, other: Tensor) -> float:
        wide = other.numpy().reshape(40, -1)
        return float(np.square(one.numpy() - other.numpy()).mean() / wide.var(0, ddof=1).mean())

    expected = kl(ours["logits"], theirs["logits"]) + kl(ours["more"]["kind_logits"], theirs["more"]["kind_logits"])
    expected += relative(ours["boxes"], theirs["boxes"]) + relative(ours["score"], theirs["score"])
    assert found.history[0].held_out_loss == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_no_output_gets_worse(form: str) -> None:
    torch.manual_seed(3)
    teacher = Several(form).eval()
    student = vbpfx.prune(teacher, [torch.randn(64, FEATURES)], ratio=0.6, method="vbp", progress=False).apply_to(
        teacher
    )
    data, test = [torch.randn(64, FEATURES) for _ in range(8)], torch.randn(256, FEATURES)
    tuned = vbpfx.finetune(student, teacher, data, epochs=4, learning_rate=3e-3, progress=False).model

    def apart(network: nn.Module) -> list[float]:
        """Return an error per output: KL divergence of logits, squared error of others."""
        with torch.no_grad():
            mine, dense = ([t for _, t in result_paths(n(test))] for n in (network.eval(), teacher))
        errors = [float((a - b).square().mean()) for a, b in zip(mine, dense, strict=True)]
        return [float(divergence(mine[0], dense[0]).mean()), *errors[1:3]]

    before, after = apart(student), apart(tuned)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True)), (before, after)


def test_outputs_are_chosen_by_name() -> None:
    student, teacher = pair(Several)
    data = [torch.randn(8, FEATURES, dtype=torch.float64) for _ in range(4)]
    losses = [
        _finetune(student, teacher, data, epochs=1, outputs=chosen).history[0].held_out_loss
        for chosen in ((), "boxes", ["boxes", "more.*"], None)
    ]
    assert sorted(losses) == losses
    assert len(set(losses)) == 4
    with pytest.raises(FinetuneError, match="outputs pattern 'bowes' matches none of 3 names; near it are boxes"):
        _finetune(student, teacher, data, outputs="bowes")


# labels of an encoder and a decoder


def _translator(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    special = {"pad_token_id": 1, "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    ids = torch.randint(3, 30, (6, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 8, "vocab_size": 30}
    if kind == "BART":
        config = transformers.BartConfig(**layers, **widths, **special, max_position_embeddings=16, dropout=0.0)
        return transformers.BartForConditionalGeneration(config).eval(), batch
    if kind == "T5":
        config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=24, num_layers=1, num_heads=2, **special)
        return transformers.T5ForConditionalGeneration(config).eval(), batch
    config = transformers.WhisperConfig(
        **layers, **widths, **special, num_mel_bins=4, max_source_positions=8, max_target_positions=16, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval(), {"input_features": torch.randn(6, 4, 16)}


@pytest.mark.parametrize("kind", ["BART", "T5", "Whisper"])
def test_decoders_read_the_labels_one_place_later(kind: str) -> None:
    """Logits equal those of the model with its labels at every counted label, and tokens equal those made by hand."""
    model, batch = _translator(kind)
    labels = torch.randint(3, 30, (6, 7))
    labels[0, 4:] = -100
    inputs = as_inputs(batch | {"labels": labels}, model)
    wanted = [[2, *(1 if token == -100 else token for token in row[:-1])] for row in labels.tolist()]
    assert inputs.kwargs["decoder_input_ids"].tolist() == wanted
    assert torch.equal(inputs.kwargs["decoder_attention_mask"].bool(), labels != -100)
    assert "labels" not in inputs.kwargs
    with torch.no_grad():
        ours, own = model(**inputs.kwargs).logits, model(**batch, labels=labels).logits
    torch.testing.assert_close(ours[labels != -100], own[labels != -100], rtol=1e-5, atol=1e-6)
    given = batch | {"labels": labels, "decoder_input_ids": labels.clamp(min=3)}
    assert as_inputs(given, model).kwargs.keys() == given.keys() - {"labels"}


def test_decoders_are_calibrated_and_tuned_on_the_answers() -> None:
    model, batch = _translator("BART")
    labels = torch.randint(3, 30, (6, 7))
    labels[0, 4:] = -100
    batch |= {"labels": labels}
    pruned = vbpfx.prune(model, [batch], ratio=0.3, method="vbp", progress=False)
    seen: list[Tensor] = []
    decoder = model.get_submodule("model.decoder.layers.0.fc2")
    handle = decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    rows = seen[0][labels != -100].double()
    (name,) = (block.name for block in pruned.analysis.usual if "decoder" in block.name)
    moments = pruned.statistics.moments[name][0]
    assert moments.count == len(rows) == 6 * 7 - 3
    torch.testing.assert_close(moments.mean.cpu(), rows.mean(0), rtol=1e-6, atol=1e-8)
    options = {"epochs": 1, "learning_rate": 1e-4, "labels": True}
    for student in (pruned.apply_to(model), pruned.graph_module):
        assert _finetune(student, model, [batch, batch], **options).history[-1].held_out_loss < 1


def test_a_model_that_does_not_say_how_labels_are_read_is_an_error() -> None:
    class Silent(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True, pad_token_id=1, decoder_start_token_id=None)

        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Any = None) -> Tensor:
            return input_ids

    batch = {"input_ids": torch.randint(3, 30, (6, 9)), "labels": torch.randint(3, 30, (6, 7))}
    with pytest.raises(
        CalibrationError, match=r"has labels and no decoder_input_ids.*put decoder_input_ids into the batches"
    ):
        as_inputs(batch, Silent())
    assert as_inputs(batch | {"labels": torch.arange(6)}, Silent()).kwargs.keys() == {"input_ids"}  # labels of classes


# number of passes over the data


def test_streams_are_read_once_an_epoch_and_their_split_is_looked_up() -> None:
    """60 batches are read to count them, to keep those held out, and once per epoch.

    The list of held-out numbers is traversed only once.
    """
    reads, lookups = [], []

    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            for number in range(60):
                reads.append(number)
                yield torch.full((4, FEATURES), float(number), dtype=torch.float64)

    class Numbers(list[int]):
        def __iter__(self) -> Iterator[int]:
            lookups.append(len(self))
            return super().__iter__()

    original = training_data_module._set_aside
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data_module, "_set_aside", lambda *given: tuple(map(Numbers, original(*given))))
        made = training_data_module.training_data(Stream(), 0.5, None, 0)
        assert (len(reads), len(lookups)) == (2 * 60, 1)  # read to count and to keep; one set of numbers
    for epoch in range(2):
        assert len(list(made.read(made.order(epoch)))) == 30
    assert len(reads) == 4 * 60
    assert len(list(made.held_out(0, 1))) == 30
    assert len(reads) == 4 * 60
