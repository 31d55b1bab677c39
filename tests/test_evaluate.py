"""Evaluation against counts in NumPy, and confidence intervals against published figures and their nominal coverage."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_unchanged, state
from torch import Tensor, nn

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained
from vbpfx.errors import EvaluationError
from vbpfx.evaluation.intervals import PairedDifference, Share

CLASSES, SAMPLES = 7, 60


class Table(nn.Module):
    """A network that returns a row of a table for each sample, which is the number of the row."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.from_numpy(rows))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.rows[x]


class Named(Table):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"hidden": torch.zeros(len(x), 3), "logits": self.rows[x]}


def _rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SAMPLES, CLASSES)) * 2


@pytest.fixture
def three() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The logits of two networks that mostly agree, and labels that the first one mostly predicts."""
    dense = _rows(0)
    random = np.random.default_rng(2)
    labels = np.where(random.random(SAMPLES) < 0.7, dense.argmax(1), random.integers(0, CLASSES, SAMPLES))
    return dense, dense + _rows(1) * 0.4, labels


def _batches(labels: np.ndarray | None = None, size: int = 16) -> list[Any]:
    numbers = torch.arange(SAMPLES).split(size)
    if labels is None:
        return list(numbers)
    return list(zip(numbers, torch.from_numpy(labels).split(size), strict=True))


def _evaluate(*args: Any, **options: Any) -> vbpfx.Evaluation:
    return vbpfx.evaluate(*args, progress=False, **options)


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _kl(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    p, q = _probabilities(dense), _probabilities(pruned)
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("kind", [Table, Named])
def test_every_figure_is_what_counting_gives(three: tuple[np.ndarray, ...], kind: type[Table]) -> None:
    dense, pruned, labels = three
    found = _evaluate(kind(dense), kind(pruned), _batches(labels))
    right = [rows.argmax(1) == labels for rows in (dense, pruned)]
    among = [(np.argsort(-rows, 1)[:, :5] == labels[:, None]).any(1) for rows in (dense, pruned)]
    for accuracy_, one, five in zip((found.dense, found.pruned), right, among, strict=True):
        assert (accuracy_.top1.count, accuracy_.top5.count, accuracy_.top1.samples) == (one.sum(), five.sum(), SAMPLES)
    assert found.top1_change == PairedDifference(
        (right[0] & right[1]).sum(),
        (right[0] & ~right[1]).sum(),
        (~right[0] & right[1]).sum(),
        (~right[0] & ~right[1]).sum(),
    )
    assert found.top1_change.value == pytest.approx(right[1].mean() - right[0].mean())
    assert found.top5_change.value == pytest.approx(among[1].mean() - among[0].mean())
    assert found.agreement == pytest.approx((dense.argmax(1) == pruned.argmax(1)).mean(), rel=1e-12)
    assert found.kl == pytest.approx(_kl(dense, pruned).mean(), rel=1e-6)  # computed in float32
    assert found.retention == right[1].sum() / right[0].sum()
    for entry in found.classes:
        of = labels == entry.label
        assert (entry.samples, entry.dense, entry.pruned) == (of.sum(), right[0][of].sum(), right[1][of].sum())
    assert sorted(entry.label for entry in found.classes) == sorted(set(labels.tolist()))
    lost = [entry.dense - entry.pruned for entry in found.classes]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0 > lost[-1]


def test_one_sample_a_class() -> None:
    dense, labels = np.eye(2, CLASSES) * 10, np.array([0, 1])
    batches = [(torch.arange(2), torch.from_numpy(labels))]
    found = _evaluate(Table(dense), Table(dense[::-1].copy()), batches)
    assert "With 1 sample a class, what one class lost is mostly chance." in str(found)


def test_labels_in_a_mapping(three: tuple[np.ndarray, ...]) -> None:
    dense, pruned, labels = three
    pairs = _batches(labels)
    mappings = [{"x": x, "labels": y} for x, y in pairs]
    assert _evaluate(Table(dense), Table(pruned), mappings) == _evaluate(Table(dense), Table(pruned), pairs)
    apart = vbpfx.evaluate(Table(dense), Table(pruned), mappings, inputs=lambda b: ((b["x"],), {}), progress=False)
    assert apart.dense is None  # with inputs=, batches have no labels


def test_without_labels(three: tuple[np.ndarray, ...]) -> None:
    dense, pruned, labels = three
    found, labelled = (
        _evaluate(Table(dense), Table(pruned), _batches()),
        _evaluate(Table(dense), Table(pruned), _batches(labels)),
    )
    assert (found.dense, found.pruned, found.top1_change, found.classes) == (None, None, None, ())
    assert (found.agreement, found.kl) == (labelled.agreement, labelled.kl)
    assert "accuracy" not in str(found)
    assert "in brackets 95 % confidence intervals" in str(found)  # the interval is that of the agreement
    assert set(found.to_json()) == {"samples", "agreement", "kl"}


def test_one_network_alone(three: tuple[np.ndarray, ...]) -> None:
    dense, _, labels = three
    found = _evaluate(Table(dense), None, _batches(labels))
    assert found.dense.top1.count == (dense.argmax(1) == labels).sum()
    assert (found.pruned, found.agreement, found.kl, found.retention, found.classes) == (None, None, None, None, ())
    assert "pruned" not in str(found)
    with pytest.raises(EvaluationError, match=r"batch 1 .*: it has no labels, and there is no other network"):
        _evaluate(Table(dense), None, _batches())


def test_padding_does_not_count() -> None:
    """With logits at every position, figures average over a sample's own positions and then over samples."""
    random = np.random.default_rng(0)
    dense = random.normal(size=(3, 4, 5))
    pruned = dense + random.normal(size=dense.shape)
    lengths = (4, 1, 2)
    mask = torch.tensor([[1] * n + [0] * (4 - n) for n in lengths])
    batch = {"x": torch.arange(3), "attention_mask": mask}
    found = _evaluate(Table(dense), Table(pruned), [batch])
    same, kl = dense.argmax(-1) == pruned.argmax(-1), _kl(dense, pruned)
    assert found.agreement == pytest.approx(np.mean([same[b, :n].mean() for b, n in enumerate(lengths)]), rel=1e-12)
    assert found.kl == pytest.approx(np.mean([kl[b, :n].mean() for b, n in enumerate(lengths)]), rel=1e-6)
    assert "brackets" not in str(found)  # a mean over positions has no interval


def test_a_network_is_itself() -> None:
    split, dense = load_digits(), nn.Sequential(load_trained(), nn.Dropout(0.5))
    batches = list(zip(split.test_images.split(100), split.test_labels.split(100), strict=True))
    before = state(dense.train())
    found = _evaluate(dense, dense, batches)
    assert_unchanged(dense, before)
    assert (found.agreement, found.kl, found.retention) == (1.0, 0.0, 1.0)
    assert found.dense.top1.value == accuracy(dense.eval(), split.test_images, split.test_labels)
    assert "no class lost samples" in str(found)
    low, high = found.top1_change.interval
    assert low < 0 < high


def test_what_is_printed(three: tuple[np.ndarray, ...]) -> None:
    dense, pruned, labels = three
    names = [f"kind {n}" for n in range(CLASSES)]
    found = _evaluate(Table(dense), Table(pruned), _batches(labels), classes=names)
    text = str(found)
    assert f"{found.dense.top1.value:.1%}" in text
    assert f"both choose the same class: {found.agreement:.1%} [" in text
    worst = found.classes[0]
    (line,) = [line for line in text.splitlines() if f"│ {worst.name} " in line]
    assert [int(cell) for cell in line.split("│")[2:5]] == [worst.samples, worst.dense, worst.pruned]
    assert "mostly chance" in text
    assert text.count("kind") > found.text(worst=1).count("kind") == 1
    assert "kind" not in found.text(worst=0)
    assert max(map(len, text.splitlines())) < 100
    assert json.loads(json.dumps(found.to_json()))["pruned"]["top1"]["count"] == found.pruned.top1.count
    split = load_digits()
    report = vbpfx.prune(load_trained(), [split.train_images[:64]], ratio=0.5, progress=False).report
    measured = report.measured(evaluation=found.for_report())
    assert measured.evaluation["top-1 accuracy"] == [found.dense.top1.value, found.pruned.top1.value]
    for name, change in (("top-1", found.top1_change), ("top-5", found.top5_change)):
        interval = measured.evaluation[f"95% confidence interval, {name}"]
        ends = [float(end) for end in interval.replace("\u2212", "-").removesuffix(" points").split(" to ")]
        assert ends == [pytest.approx(100 * end, abs=0.0051) for end in change.interval]
    assert measured.evaluation["KL divergence from the dense network"] == f"{found.kl:.4g} nats"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, p, b: (d, p, []), "nothing to evaluate on"),
        (
            lambda d, p, b: (d, Table(_rows(1)[:, :3]), b),
            r"batch 1 .*shape \(16, 3\) in the pruned network and \(16, 7\)",
        ),
        (lambda d, p, b: (d, Table(_rows(1) * math.nan), b), "the pruned network's output holds NaN"),
        (lambda d, p, b: (Table(_rows(1) * -math.inf), p, b), "the dense network's output holds infinite values"),
        (
            lambda d, p, b: (d, p, [b[0], (b[1][0], b[1][1] + 7)]),
            r"batch 2 .*label 1\d is not a class of a network with 7 outputs",
        ),
        (lambda d, p, b: (d, p, [b[0], b[1][0]]), "batch 2 .*this batch has no labels, those before had some"),
        (lambda d, p, b: (d, p, [b[0][0], b[1]]), "batch 2 .*this batch has labels, those before had none"),
        (lambda d, p, b: (d, p, [b[0][0] + 1000]), "batch 1 .*does not run through Table"),
    ],
)
def test_what_does_not_go_together(three: tuple[np.ndarray, ...], change: Any, message: str) -> None:
    dense, pruned, labels = three
    with pytest.raises(EvaluationError, match=message):
        _evaluate(*change(Table(dense), Table(pruned), _batches(labels)))


def test_names_must_be_those_of_the_outputs(three: tuple[np.ndarray, ...]) -> None:
    """Folders for ten of a thousand classes would be numbered 0 to 9, which would make every figure wrong."""
    dense, pruned, labels = three
    with pytest.raises(EvaluationError, match="the data has 3 classes, and the network has 7 outputs"):
        _evaluate(Table(dense), Table(pruned), _batches(labels % 3), classes=["a", "b", "c"])


def test_names_are_compared_with_the_outputs_before_hours_of_work(three: tuple[np.ndarray, ...]) -> None:
    dense, pruned, labels = three
    batches = iter(_batches(labels % 3))
    with pytest.raises(EvaluationError, match="the data has 3 classes"):
        _evaluate(Table(dense), Table(pruned), batches, classes=["a", "b", "c"])
    assert len(list(batches)) == len(_batches()) - 1


class Moved(Table):
    """A network with two inputs, the second of which is an integer per sample."""

    def forward(self, x: Tensor, by: Tensor) -> Tensor:  # type: ignore[override]
        return self.rows[(x + by) % SAMPLES]


@pytest.mark.parametrize("inputs", [None, lambda batch: ((), {"x": batch[0], "by": batch[1]})])
def test_what_the_network_takes_is_no_label(three: tuple[np.ndarray, ...], inputs: Any) -> None:
    dense, pruned, labels = three
    found = _evaluate(Moved(dense), Moved(pruned), _batches(labels), inputs=inputs)
    assert found.dense is None
    moved = (np.arange(SAMPLES) + labels) % SAMPLES
    assert found.agreement == pytest.approx((dense.argmax(1) == pruned.argmax(1))[moved].mean())


# intervals


@pytest.mark.parametrize(
    ("count", "samples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_published(count: int, samples: int, low: float, high: float) -> None:
    """The figures are from Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    assert Share(count, samples).interval == pytest.approx((low, high), abs=5e-5)


def test_the_paired_interval_as_published() -> None:
    """Newcombe's interval for airway hyper-responsiveness in Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014)."""
    assert PairedDifference(1, 1, 7, 12).interval == pytest.approx((0.026, 0.507), abs=5e-4)
    low, high = PairedDifference(1, 7, 1, 12).interval
    assert (low, high) == pytest.approx((-0.507, -0.026), abs=5e-4)


def test_intervals_hold_as_often_as_they_promise() -> None:
    """In 20 000 draws of 150 pairs, a coverage of 95 % has a standard error of 0.15 %; Newcombe found 94 to 96.5 %."""
    chances = (0.70, 0.10, 0.05, 0.15)
    draws = np.random.default_rng(0).multinomial(150, chances, 20_000).tolist()
    truth, held, narrow = chances[2] - chances[1], 0, 0
    for draw in draws:
        change = PairedDifference(*draw)
        low, high = change.interval
        held += low <= truth <= high
        narrow += high - low < 0.25
    assert 0.94 < held / len(draws) < 0.97
    assert narrow == len(draws)


def test_intervals_at_the_ends() -> None:
    assert Share(20, 20).interval == pytest.approx((1 - 0.16113, 1.0), abs=1e-4)
    low, high = PairedDifference(10, 0, 0, 0).interval
    assert -0.5 < low < 0 < high < 0.5
    low, high = PairedDifference(0, 10, 0, 0).interval
    assert low == -1.0
    assert high < -0.5


class Encoder(Table):
    """A network with four positions per sample, some of which are masked."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"last_hidden_state": self.rows[x], "pooler_output": torch.zeros(len(x), 3)}


@pytest.mark.parametrize("size", [7, SAMPLES])
def test_embeddings_are_compared_by_their_cosine(size: int) -> None:
    random = np.random.default_rng(3)
    dense = random.normal(size=(SAMPLES, 4, 5))
    pruned = dense + 0.3 * random.normal(size=dense.shape)
    mask = np.arange(4) < random.integers(1, 5, SAMPLES)[:, None]
    batches = [
        {"x": x, "attention_mask": m}
        for x, m in zip(torch.arange(SAMPLES).split(size), torch.from_numpy(mask.astype(int)).split(size), strict=True)
    ]
    found = _evaluate(Encoder(dense), Encoder(pruned), batches)
    cosines = (dense * pruned).sum(-1) / np.linalg.norm(dense, axis=-1) / np.linalg.norm(pruned, axis=-1)
    each = (cosines * mask).sum(1) / mask.sum(1)
    assert found.cosine is not None
    # The tables are cast to float32 before they are compared.
    assert found.cosine.value == pytest.approx(each.mean(), rel=1e-7)
    assert found.cosine.error == pytest.approx(each.std(ddof=1) / math.sqrt(SAMPLES), rel=1e-5)
    error = math.sqrt((((pruned - dense) ** 2)[mask]).sum() / (dense[mask] ** 2).sum())
    assert found.relative_error == pytest.approx(error, rel=1e-6)
    assert (found.agreement, found.kl, found.dense, found.classes) == (None, None, None, ())
    low, high = each.mean() - 1.959964 * found.cosine.error, each.mean() + 1.959964 * found.cosine.error
    line = f"cosine with the dense network's output: {each.mean():.4f} [{low:.4f}, {high:.4f}]"
    assert line in str(found)
    assert "choose the same class" not in str(found)
    assert json.loads(json.dumps(found.to_json()))["cosine"]["mean"] == found.cosine.value
    assert found.for_report()["cosine with the dense network's output"] in line


def test_what_outputs_are_can_be_said(three: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    dense, pruned, labels = three
    tables = Table(dense), Table(pruned)
    assert _evaluate(*tables, _batches()).cosine is None  # a single tensor is assumed to be logits
    values = _evaluate(*tables, _batches(labels), compare="values")  # labels do not apply to embeddings
    assert values.cosine is not None
    assert (values.agreement, values.dense) == (None, None)
    with pytest.raises(EvaluationError, match="holds no logits"):
        _evaluate(Encoder(_rows(0)), Encoder(_rows(1)), _batches(), compare="logits")
    with pytest.raises(EvaluationError, match="compare='cosine' is unknown; use one of logits, values"):
        _evaluate(*tables, _batches(), compare="cosine")
    with pytest.raises(EvaluationError, match="no other network"):
        _evaluate(tables[0], None, _batches(labels), compare="values")


def test_classes_that_both_networks_rule_out(three: tuple[np.ndarray, ...]) -> None:
    """A mask sets the logits of some classes to -inf; the figures are those of the remaining classes."""
    dense, pruned, labels = three
    labels = np.minimum(labels, CLASSES - 3)
    masked = [rows.copy() for rows in (dense, pruned)]
    for rows in masked:
        rows[:, -2:] = -np.inf
    found = _evaluate(Table(masked[0]), Table(masked[1]), _batches(labels))
    left = _evaluate(Table(dense[:, :-2]), Table(pruned[:, :-2]), _batches(labels))
    assert found.kl == pytest.approx(_kl(dense[:, :-2], pruned[:, :-2]).mean(), rel=1e-6)
    assert (found.agreement, found.dense.top1, found.pruned.top1) == (left.agreement, left.dense.top1, left.pruned.top1)
    with pytest.raises(EvaluationError, match="the pruned network's output holds infinite values"):
        _evaluate(Table(dense), Table(masked[1]), _batches(labels))
