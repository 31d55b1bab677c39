"""Small runs of the benchmarks on fine-tuning, calibration cost, int8, deployment, processes and speed, and their pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import calibration_cost
import compiled_calibration
import deployment
import finetuning
import processes
import pytest
import quantized
import small_networks
import speed
import speed_page
import speed_scaling
import torch

from vbpfx.data.inputs import Inputs
from vbpfx.demo.digits import accuracy, load_digits


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


def test_the_page_on_compiled_calibration_shows_what_was_measured(tmp_path: Path) -> None:
    seconds = {"plain": [4.0, 4.5, 5.0], "compiled": [3.0, 3.25, 3.5]}
    found = {
        "seconds": seconds,
        "batch": 32,
        "speedup": 1.384,
        "compiling": 61.5,
        "from the cache": 5.0,
        "pays after": 1575,
        "difference": 2e-7,
    }
    slower = found | {"pays after": None}
    about = {"command": "c", "machine": "m"}
    (tmp_path / "found.json").write_text(json.dumps({"a": found | about, "b": slower | about}))
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert compiled_calibration.main(["--page", *where]) == 0
    page = (tmp_path / "performance.md").read_text()
    assert "| a | 32 | 3 | 4.50 s | 3.25 s | 1.38x | 62 s | 5 s | 1,575 samples | 2e-07 |" in page
    assert "| 62 s | 5 s | never | 2e-07 |" in page


def test_quantized_writes_what_it_measured(tmp_path: Path) -> None:
    given = ["digits_vit", "--ways", "onnxruntime", "--ratio", "0.9", "--images", "40", "--threads", "1"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert quantized.main([*given, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["digits_vit"]
    figures = {name: entry["figures"] for name, entry in found["ways"]["onnxruntime"].items()}
    assert list(figures) == list(quantized.VARIANTS)
    assert figures["dense"]["kept"] == 1  # the same float32 network, in another runtime
    assert figures["dense"]["agreement"] == 1
    assert 0.9 < figures["pruned + int8"]["agreement"] <= 1  # observed: 0.99 to 1
    page = (tmp_path / "compilers.md").read_text()
    both = figures["pruned + int8"]
    assert f"| {both['kept']:.1%} ± {both['kept_se']:.1%}, {both['agreement']:.1%} |" in page
    assert quantized.main(["--page", *where]) == 0
    assert (tmp_path / "compilers.md").read_text() == page
    with pytest.raises(SystemExit):
        quantized.main(["--ways", "tpu", *where])


def test_the_deployment_page_shows_rows_and_failures_as_they_were_measured(tmp_path: Path) -> None:
    spread = {"median": 1.25, "lower": 1.2, "upper": 1.3}

    def side(milliseconds: float, size: int) -> dict[str, object]:
        return {"seconds": {"median": milliseconds / 1e3}, "parity": 3e-7, "size": size, "failure": None}

    about = {"network": "MiniLM", "ratio": 0.5, "round_to": 1}
    results = {
        "a": about | {"runtime": "onnxruntime", "speedup": spread, "efficiency": 0.875, "versions": {"onnxruntime": "9"},
                      "dense": side(50, 4_000_000), "pruned": side(40, 3_000_000), "machine": "a machine"},
        "b": about | {"runtime": "tvm", "speedup": None, "dense": {"failure": "no int64"}, "pruned": {"failure": None}},
        "c": about | {"runtime": "executorch", "crash": "the process died without a message", "round_to": 32},
    }  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(results))
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert deployment.main(["--page", *where]) == 0
    page = (tmp_path / "deployment.md").read_text()
    cells = "50.0 -> 40.0 | 1.25 (1.20-1.30) | 0.88 | 3e-07, 3e-07 | 4.0 -> 3.0"
    assert f"| MiniLM | onnxruntime | 50% | {cells} |" in page
    assert "| MiniLM | executorch | 50% to 32 | failed |" in page
    assert "- MiniLM in tvm: *dense*: `no int64`; *pruned*: `runs`" in page
    assert "- MiniLM in executorch: *both*: `the process died without a message`" in page
    assert "onnxruntime: deit_small_patch16_224; " in page
    assert "- openvino: all" in page
    assert "a machine onnxruntime 9." in page
    with pytest.raises(SystemExit):
        deployment.main(["resnet", *where])


def test_processes_write_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["test_vit", "--images", "8", "--batch", "2", "--rounds", "1", "--busy"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert processes.main([*given, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["test_vit"]
    assert found["speedup"] == pytest.approx(found["seconds"]["alone"][0] / found["seconds"]["together"][0], rel=1e-12)
    page = (tmp_path / "performance.md").read_text()
    assert f"| {found['speedup']:.2f}x | {found['machine']:.2f}x | {found['processor_speedup']:.2f}x |" in page
    assert f"{found['processor_speedup']:.2f}x by processor time" in capsys.readouterr().out


def test_speed_writes_what_it_measured(tmp_path: Path) -> None:
    small = ["--observed", "test_convnext", "--batch", "2", "--threads", "1", "--rounds", "1"]
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    (tmp_path / "found.json").write_text(json.dumps({"gpu": {"command": "c", "machine": "another", "rows": None}}))
    assert speed.main(["--part", "observers", *small, *where]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (observers,) = found["observers"]["costs"]
    # (depth, channels c, side): the second layer of each MLP reads 4 c channels of 4 bytes for 2 images.
    stages = ((1, 24, 40), (2, 32, 20), (4, 48, 10), (2, 64, 5))
    assert observers["bytes"] == 2 * sum(depth * 4 * 4 * c * side**2 for depth, c, side in stages)
    text = (tmp_path / "performance.md").read_text()
    assert f"| {observers['ratio']:.3f}x | {observers['within_ratio']:.3f}x | {observers['limit']:.3f}x |" in text
    assert (
        "`python benchmarks/speed.py --part observers --rounds 1 --observed test_convnext --batch 2 --threads 1`"
        in text
    )
    assert "`c`  \nanother" in text  # results of another run are kept


def test_the_speed_page_shows_growth_and_gpus(tmp_path: Path) -> None:
    cubic = {"sizes": [2, 4, 8], "seconds": [0.5 * n**3 for n in (2, 4, 8)]}
    grown = cubic | {"exponent": speed_scaling.exponent(cubic["sizes"], cubic["seconds"])}
    large = {"parameters": 10**9, "nodes": 1000, "blocks": 40, "capture": 1.5, "analysis": 0.25}
    row = {
        "network": "n",
        "ratio": 0.5,
        "batch": 64,
        "precision": "bf16",
        "runtime": "eager",
        "dense": 3.0,
        "pruned": 2.0,
    }
    growth = {"scaling": {"analysis": {"depth": grown}, "calibration": {"depth": grown}}, "largest": {"big": large}}
    found = {"gpu": {"rows": [row]}, "growth": growth}
    speed_page.write_page({part: one | {"command": "c", "machine": "m"} for part, one in found.items()}, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "| analysis | depth | 2 to 8 | 4.000 s | 256.000 s | 3.00 |" in text
    assert "| big | 1,000 M | 1000 | 40 | 1.50 s | 0.25 s | 250 us |" in text
    assert "| n | 50% | 64 | bf16 | eager | 3.00 ms | 2.00 ms | 1.50x |" in text
    assert (tmp_path / "figures" / "speed-scaling.png").stat().st_size > 1000


def test_torch_pruning_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SystemExit, match="pip install torch-pruning"):
        speed.main(["--rounds", "1"])
