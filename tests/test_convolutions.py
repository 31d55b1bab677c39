"""The benchmark on padded convolutions: equal MACs, errors and verdicts, and a small run of vbpfx alone."""

from __future__ import annotations

import json
from pathlib import Path

import convolutions
import pytest
import torch
from convolutions_methods import ImpossibleError, _at, _Narrowed, macs_of
from convolutions_page import Score, difference, verdict
from convolutions_subjects import subject

import vbpfx


def test_values_are_interpolated_between_the_networks_around_the_macs() -> None:
    network = subject("resnet")
    dense, wanted = macs_of(network.model, network.test_inputs[:1]), int(0.7 * 1_648_256)
    assert dense == 1_648_256  # counted by hand in the stages: 3x3 over c channels on s x s positions are 9 c^2 s^2
    labels = network.values(network.model(network.test_inputs))

    def prune(share: float) -> _Narrowed:
        """A tool whose MACs fall from 0.8 to 0.5 of the dense ones in one step: the network, then constant outputs."""
        if share < 0.25:
            return _Narrowed(network.model, int(0.8 * dense))
        return _Narrowed(lambda x: torch.zeros(len(x), 10), int(0.5 * dense))

    zeros = network.values(torch.zeros(len(network.test_inputs), 10))
    outcome = _at(0.7, network, prune)
    weight = (wanted - int(0.5 * dense)) / (int(0.8 * dense) - int(0.5 * dense))
    assert outcome.macs == wanted
    torch.testing.assert_close(outcome.values, weight * labels + (1 - weight) * zeros, rtol=1e-12, atol=0)
    with pytest.raises(ImpossibleError, match="80% of the MACs are left"):
        _at(0.7, network, lambda share: _Narrowed(network.model, int(0.8 * dense) + 1))


def test_layers_that_write_to_a_residual_stream_are_those_that_vbpfx_leaves_alone() -> None:
    network = subject("resnet")
    analysis = vbpfx.find_blocks(vbpfx.capture(network.model, network.test_inputs[:4]))
    narrowed = {producer.removesuffix(".weight") for block in analysis.blocks for producer in block.producers}
    layers = {name for name, m in network.model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert set(network.writes_stream) == layers - narrowed
    assert subject("unet").writes_stream == ()


def test_a_difference_has_the_error_of_images_and_draws() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 50, dtype=torch.float64)  # (draws, images)
    first, second = (Score("", x.mean(0), x.mean(1).tolist(), 1.0) for x in (a, b))
    gain, error = difference(first, second)
    assert gain == pytest.approx((a - b).mean().item(), rel=1e-12)
    images, draws = (a - b).mean(0), (a - b).mean(1)
    assert error**2 == pytest.approx((images.var() / 50 + draws.var() / 3).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (0.9, 0.895, "above all"),  # 5 of 1000 images: d = 0.005, SE = sqrt(0.005 * 0.995 / 999) = 0.0022
        (0.9, 0.897, "no"),  # 3 images: d = 0.003, SE = 0.0017
        (0.9, 0.91, "no"),
        (0.998, 0.999, "at the dense score"),  # 2 images below: 0.002, SE = 0.0014
        (0.995, 0.999, "no"),
    ],
)
def test_the_verdict_needs_two_standard_errors(ours: float, other: float, expected: str) -> None:
    def score(share: float) -> Score:
        values = (torch.arange(1000) < 1000 * share).double()
        return Score("", values, [values.mean().item()], 1.0)

    assert verdict(score(ours), score(1.0), [score(other)]) == expected


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_a_run_writes_what_it_measured(name: str, tmp_path: Path) -> None:
    given = ["--networks", name, "--methods", "vbp", "--shares", "0.7", "--draws", "2", "--calibration", "50"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert convolutions.main([*given, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())[name]
    figures = found["results"]["vbp"][""]["0.7"]
    assert len(figures["means"]) == 2
    assert 0.6 < figures["macs"] <= 0.7
    network = subject(name)
    pruned = vbpfx.prune(network.model, network.draw(50, 1).batches, macs=0.7, method="vbp", round_to=1, progress=False)
    with torch.no_grad():
        mean = network.values(pruned.graph_module(network.test_inputs)).mean().item()
    assert figures["means"][1] == pytest.approx(mean, rel=1e-12)
    page = (tmp_path / "convolutions.md").read_text()
    assert f"| vbp | {sum(figures['means']) / 2:.1%} ±" in page
    assert ("dB" in page) == (name == "unet")
    assert convolutions.main(["--page", *where]) == 0
    assert (tmp_path / "convolutions.md").read_text() == page


def test_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(package: str) -> str:
        raise convolutions.PackageNotFoundError(package)

    monkeypatch.setattr(convolutions, "version", missing)
    with pytest.raises(SystemExit):
        convolutions.main(["--methods", "Taylor"])
    assert "pip install torch-pruning==1.6.1 onnxsim==0.8.1" in capsys.readouterr().err
