"""The command line, tested on a short version of the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

import vbpfx
from vbpfx.cli import app
from vbpfx.demo import run
from vbpfx.demo.digits import accuracy, load_digits, load_trained
from vbpfx.report.report import Report


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "out[b]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "RATIOS", (0.5, 0.9))
        result = CliRunner().invoke(app, ["demo", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_demo_leaves_files_that_work(demo: tuple[Path, str]) -> None:
    folder, output = demo
    names = {path.name for path in folder.iterdir()}
    assert {"digits.onnx", "digits-dense.onnx", "accuracy.png", "demo.json", "plan.json", "model.safetensors"} <= names
    for name in ("digits.onnx", "report.html"):  # not wrapped or interpreted as markup
        assert str(folder / name) in output
    session = onnxruntime.InferenceSession(folder / "digits.onnx", providers=["CPUExecutionProvider"])
    split = load_digits()
    (logits,) = session.run(None, {session.get_inputs()[0].name: split.test_images.numpy()})
    scored = (torch.from_numpy(logits).argmax(-1) == split.test_labels).double().mean().item()
    figures = json.loads((folder / "demo.json").read_text())
    assert scored == figures["onnx_accuracy"]
    assert sum(i.dims[0] for i in onnx.load(folder / "digits.onnx").graph.initializer if "fc1.bias" in i.name) == 768


def test_the_figures_of_the_demo_are_those_of_its_networks(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    figures = json.loads((folder / "demo.json").read_text())
    split = load_digits()
    assert figures["dense_accuracy"] == accuracy(load_trained(), split.test_images, split.test_labels) > 0.98
    loaded = vbpfx.load(folder)
    assert accuracy(loaded, split.test_images, split.test_labels) == figures["onnx_accuracy"]
    report = Report.load(folder)
    assert report.evaluation is not None
    assert report.evaluation["test accuracy"] == [figures["dense_accuracy"], figures["onnx_accuracy"]]
    assert report.bench == figures["bench"]
    found = {(p["criterion"], p["ratio"]): p["accuracy"] for p in figures["points"]}
    # On 597 images, removing half of the neurons has no visible cost, and at 90 % the ranking matters.
    assert found["variance", 0.5] > figures["dense_accuracy"] - 0.01
    assert found["variance", 0.9] > found["random", 0.9]


def test_a_failure_is_one_line_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.output


def test_wrong_usage_is_status_2() -> None:
    assert CliRunner().invoke(app, ["demo", "--no-such-option"]).exit_code == 2


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "vbpfx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == vbpfx.__version__
