"""Tests of ``vbpfx eval`` and ``vbpfx finetune`` on the demo's network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import vbpfx
import vbpfx.models.names
from vbpfx.cli import app
from vbpfx.demo.digits import accuracy, load_digits, load_trained

MODEL = "vbpfx.demo.digits:load_trained"
RATIO = 0.97


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a heavily pruned network, samples to train on, and labelled samples."""
    folder = tmp_path_factory.mktemp("files")
    split = load_digits()
    pruned = vbpfx.prune(load_trained(), [split.train_images[:200]], ratio=RATIO, method="vbp", progress=False)
    pruned.save(folder / "pruned")
    np.savez(folder / "test.npz", x=split.test_images.numpy(), labels=split.test_labels.numpy())
    np.save(folder / "train.npy", split.train_images[:400].numpy())
    return folder


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _figures(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _eval(folder: Path, files: Path) -> Any:
    return _figures(_run("eval", folder, "--dense", MODEL, "--data", files / "test.npz", "--json"))


def test_eval_counts_what_both_get_right(files: Path) -> None:
    split = load_digits()
    found = _eval(files / "pruned", files)
    for name, network in (("dense", load_trained()), ("pruned", vbpfx.load(files / "pruned"))):
        assert found[name]["top1"]["share"] == accuracy(network, split.test_images, split.test_labels)
    assert found["samples"] == len(split.test_labels)
    assert found["skipped"] == []
    alone = _figures(_run("eval", MODEL, "--data", files / "test.npz", "--json"))
    assert alone["dense"] == found["dense"]
    assert "pruned" not in alone


def test_eval_reads_images_in_folders_of_classes(files: Path, tmp_path: Path) -> None:
    """The digits are stored as 8-bit images, which keep all of their 17 values."""
    split = load_digits()
    low, high = split.test_images.min().item(), split.test_images.max().item()
    for number, (image, label) in enumerate(zip(split.test_images[:120], split.test_labels[:120], strict=True)):
        path = tmp_path / "images" / f"{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((image[0] - low) / (high - low) * 255).round().numpy().astype(np.uint8)).save(path)
    mean, std = -low / (high - low), 1 / (high - low)
    result = _run(
        "eval", files / "pruned", "--dense", MODEL, "--data", tmp_path / "images",
        "--shape", "1x8x8", "--mean", mean, "--std", std, "--crop", 1, "--json",
    )  # fmt: skip
    found = _figures(result)
    images, labels = split.test_images[:120], split.test_labels[:120]
    assert found["dense"]["top1"]["share"] == accuracy(load_trained(), images, labels)
    assert found["pruned"]["top1"]["share"] == pytest.approx(
        accuracy(vbpfx.load(files / "pruned"), images, labels), abs=0.02
    )
    assert "120 images from" in result.stderr
    assert "bilinear, shorter side to 8, the central 8x8, mean 0.305, std 0.376" in result.stderr


def test_eval_prints_tables(files: Path) -> None:
    result = _run("eval", files / "pruned", "--dense", MODEL, "--data", files / "test.npz", "--worst", 2)
    assert result.exit_code == 0
    assert "top-5" in result.stdout
    assert "597 samples; in brackets 95 % confidence intervals" in result.stdout
    assert "597 samples from" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["eval", "{}/pruned", "--data", "{}/test.npz"], 2, "say what to compare it with"),
        (["eval", "{}/no", "--dense", MODEL, "--data", "{}/test.npz"], 1, "expected timm:NAME"),
        (["eval", MODEL, "--data", "{}/train.npy"], 1, "it has no labels, and there is no other network"),
        (["eval", MODEL, "--data", "{}/nothing"], 1, "nothing does not exist"),
        (["eval", MODEL, "--data", "{}", "--shape", "3xa"], 2, "expected numbers such as 3x224x224"),
        (["finetune", "{}/no", "--dense", MODEL, "--data", "{}/train.npy", "--out", "{}/o"], 1, "no/plan.json"),
        (["finetune", "{}/pruned", "--dense", "timm:test_vit", "--data", "{}/train.npy", "--out", "{}/o"], 1, "of another structure"),
        (["finetune", "{}/pruned", "--dense", MODEL, "--data", "{}/train.npy", "--out", "{}"], 1, "is not a pruned network"),
        (["finetune", "{}/pruned", "--dense", MODEL, "--data", "{}/train.npy", "--out", "{}/o", "--checkpoint", "{}/o/c"], 2, "pass another folder"),
    ],
)  # fmt: skip
def test_failures_are_one_line(files: Path, arguments: list[str], status: int, message: str) -> None:
    result = _run(*(argument.format(files) for argument in arguments))
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (files / "o").exists()


def test_finetune_writes_an_artifact_of_the_tuned_weights(files: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (files / "pruned").iterdir()}
    result = _run(
        "finetune", files / "pruned", "--dense", MODEL, "--data", files / "train.npy", "--out", tmp_path / "tuned",
        "--epochs", 3, "--batch", 50, "--json",
    )  # fmt: skip
    figures = _figures(result)
    assert {path.name: path.read_bytes() for path in (files / "pruned").iterdir()} == before
    losses = [epoch["held_out_loss"] for epoch in figures["history"]]
    assert losses[figures["best"]] == min(losses) < 0.5 * losses[0]
    graph, own = vbpfx.load(tmp_path / "tuned"), vbpfx.load(tmp_path / "tuned", into=load_trained())
    split = load_digits()
    scores = [accuracy(network, split.test_images, split.test_labels) for network in (graph, own)]
    assert scores[0] == scores[1] == _eval(tmp_path / "tuned", files)["pruned"]["top1"]["share"]
    assert scores[0] > accuracy(vbpfx.load(files / "pruned"), split.test_images, split.test_labels) + 0.02
    with torch.no_grad():
        torch.testing.assert_close(graph(split.test_images), own(split.test_images), rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "tuned" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: split.test_images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), graph(split.test_images), rtol=1e-4, atol=1e-4)
    report = vbpfx.Report.load(tmp_path / "tuned")
    assert report.verification is None
    assert "400 samples, recipe default, 3 epochs" in report.tuning
    assert report.evaluation["top-1 accuracy"][1] == scores[0]  # eval has added to it
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "Fine-tuned: 400 samples" in page
    assert "top-1 accuracy" in page.lower()


def test_finetune_is_what_python_does(files: Path, tmp_path: Path) -> None:
    """The weights equal those of vbpfx.finetune on the same loader, and a tuned network can be tuned again."""
    options = ["--recipe", "few", "--epochs", 1, "--batch", 64, "--no-onnx", "--seed", 3]
    common = ["--dense", MODEL, "--data", files / "train.npy", *options]
    assert _run("finetune", files / "pruned", *common, "--out", tmp_path / "a").exit_code == 0
    dense = load_trained()
    student = vbpfx.load(files / "pruned", into=dense)
    data = vbpfx.open_data(files / "train.npy", dense, batch=64)
    done = vbpfx.finetune(student, dense, data.loader(shuffle=True), recipe="few", epochs=1, seed=3, progress=False)
    assert done.best.epoch == 1
    loaded = vbpfx.load(tmp_path / "a", into=dense).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in done.model.state_dict().items())
    assert not (tmp_path / "a" / "model.onnx").exists()
    again = _run("finetune", tmp_path / "a", *common, "--out", tmp_path / "a")
    assert again.exit_code == 0
    assert any(not torch.equal(t, loaded[n]) for n, t in vbpfx.load(tmp_path / "a", into=dense).state_dict().items())


def test_training_that_only_hurts_leaves_the_weights_and_says_so(files: Path, tmp_path: Path) -> None:
    result = _run(
        "finetune", files / "pruned", "--dense", MODEL, "--data", files / "train.npy", "--out", tmp_path / "tuned",
        "--epochs", 1, "--batch", 64, "--learning-rate", 1, "--no-onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no epoch was better on the held-out samples" in result.stderr
    before, after = (vbpfx.load(folder).state_dict() for folder in (files / "pruned", tmp_path / "tuned"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_finetune_goes_on_from_its_checkpoint(files: Path, tmp_path: Path) -> None:
    common = ["finetune", files / "pruned", "--dense", MODEL, "--data", files / "train.npy", "--epochs", 2, "--batch", 64,
              "--no-onnx"]  # fmt: skip
    assert _run(*common, "--out", tmp_path / "whole").exit_code == 0
    broken = [*common, "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "parts"]
    first = _run(*broken, "--max-seconds", 0.001)
    assert "stopped by time" in first.stdout
    assert "stopped by epochs" in _run(*broken).stdout
    whole, parts = (vbpfx.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_two_processes_train_together(files: Path, tmp_path: Path) -> None:
    """Two processes with half the batch size take the steps of one process, up to the order of summation."""
    env = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(vbpfx.__file__).parents[1]),
    }
    common = [
        "-m", "vbpfx", "finetune", files / "pruned", "--dense", MODEL, "--data", files / "train.npy", "--epochs", "1",
        "--recipe", "few", "--held-out", "0", "--no-onnx",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*map(str, [*torchrun, *common, "--batch", "50", "--out", tmp_path / "two"])],
        env=env,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("written to") == 1
    one = _run(*common[2:], "--batch", 100, "--out", tmp_path / "one")
    assert one.exit_code == 0, one.output
    before, two, one = (
        vbpfx.load(folder, into=load_trained()).state_dict()
        for folder in (files / "pruned", tmp_path / "two", tmp_path / "one")
    )

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[name] - tensor).double().square().sum() for name, tensor in b.items()) ** 0.5)

    # AdamW's first steps follow the sign of a gradient, which another order of summation can flip if it is nearly zero.
    assert distance(one, two) < 0.02 * distance(before, two)


def test_a_graph_is_trained_where_the_class_cannot_hold_the_plan(tmp_path: Path) -> None:
    """The code states the hidden width as a number, so that the class cannot run narrowed."""
    module = tmp_path / "stated.py"
    module.write_text(
        "import torch\n"
        "class Stated(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.fc1, self.fc2 = torch.nn.Linear(8, 32), torch.nn.Linear(32, 3)\n"
        "    def forward(self, x):\n"
        "        return self.fc2(torch.relu(self.fc1(x)).view(-1, 32))\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        dense = vbpfx.models.names.load_model("stated:Stated")
        data = vbpfx.open_data(tmp_path / "x.npy", dense)
        vbpfx.prune(dense, data, ratio=0.5, progress=False).save(tmp_path / "pruned")
        result = _run(
            "finetune", tmp_path / "pruned", "--dense", "stated:Stated", "--data", tmp_path / "x.npy", "--out", tmp_path / "tuned",
            "--epochs", 1, "--batch", 8,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        "trained as a graph, without dropout: block fc1->fc2: the model's code states the hidden width 32"
        in result.stderr
    )
    assert vbpfx.load(tmp_path / "tuned")(torch.zeros(2, 8)).shape == (2, 3)
