"""The benchmarks of fine-tuning, of calibration cost and of processes: small runs, and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import calibration_cost
import finetuning
import processes
import pytest
import small_networks
import torch

from vbpfx.demo.digits import accuracy, load_digits
from vbpfx.inputs import Inputs


def test_fine_tuning_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert finetuning.main(["swiglu", *where]) == 0
    results = json.loads((tmp_path / "found.json").read_text())
    assert list(results) == ["swiglu/vbp", "swiglu/auto"]
    found = results["swiglu/vbp"]
    split = load_digits()
    dense = accuracy(small_networks.load("swiglu"), split.test_images, split.test_labels)
    assert found["dense"] == pytest.approx(dense, abs=1e-12)
    before, after = (found[key]["figures"] for key in ("before", "after"))
    assert after["kept"] == pytest.approx(after["top1"] / dense, rel=1e-12)
    assert after["kl"] < before["kl"]
    assert found["epochs"] == 10
    page = (tmp_path / "results.md").read_text()
    assert f"| {before['kept']:.1%} ± {before['kept_se']:.1%} | {after['kept']:.1%} ± {after['kept_se']:.1%} |" in page
    assert finetuning.main(["--page", *where]) == 0
    assert (tmp_path / "results.md").read_text() == page
    assert torch.get_num_threads() == threads
    assert "swiglu/vbp: kept" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        finetuning.main(["resnet", *where])


def test_crops_keep_shape_and_range() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 224, 224)
    (cropped,) = finetuning.crops(Inputs((images,), {})).args
    assert cropped.shape == images.shape
    assert not torch.equal(cropped, images)
    assert float(cropped.min()) > -0.1
    assert float(cropped.max()) < 1.1


def test_calibration_cost_writes_what_it_measured(tmp_path: Path) -> None:
    given = ["test_vit", "--images", "20", "--batch", "10", "--ways", "variances,auto", "--threads", "1"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert calibration_cost.main([*given, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["test_vit"]
    assert list(found) == ["variances", "auto"]
    assert found["auto"]["images"] == 20
    assert 0.1 < found["auto"]["gib"] < 20
    assert f"| {found['auto']['ratio']:.2f}x |" in (tmp_path / "results.md").read_text()


def test_processes_write_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["test_vit", "--images", "8", "--batch", "2", "--rounds", "1", "--busy"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert processes.main([*given, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["test_vit"]
    assert found["speedup"] == pytest.approx(found["seconds"]["alone"][0] / found["seconds"]["together"][0], rel=1e-12)
    page = (tmp_path / "performance.md").read_text()
    assert f"| {found['speedup']:.2f}x | {found['machine']:.2f}x | {found['processor_speedup']:.2f}x |" in page
    assert f"{found['processor_speedup']:.2f}x by processor time" in capsys.readouterr().out
