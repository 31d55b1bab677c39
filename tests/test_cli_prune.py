"""The command prune writes the same as the library and passes its options on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import cli_networks
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner, Result

import vbpfx
from vbpfx.cli import app, choices
from vbpfx.cli.data_options import LabelledReading, ModelReading, Reading
from vbpfx.cli.plan_options import ModelPlanning, Planning
from vbpfx.finetuning.distillation import Loss
from vbpfx.finetuning.processes import Precision
from vbpfx.finetuning.recipes import RECIPES
from vbpfx.graph.capture import Frontend
from vbpfx.outputs.watched import OutputKind
from vbpfx.planning.allocation import ALLOCATIONS
from vbpfx.planning.compensate import COMPENSATIONS
from vbpfx.planning.options import METHODS, PlanArguments
from vbpfx.planning.scores import CRITERIA
from vbpfx.plans.files import load_plan
from vbpfx.runtimes.adapters import NAMES

MLP = "cli_networks:mlp"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Write 24 samples into a new working directory and return them."""
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    np.save("data.npy", samples)
    return torch.from_numpy(samples)


def _prune(*options: str, model: str = MLP) -> Result:
    result = CliRunner().invoke(app, ["prune", model, "--data", "data.npy", "--out", "out", "--no-onnx", *options])
    assert result.exit_code == 0, result.output
    return result


def test_the_files_are_what_the_library_makes(data: torch.Tensor) -> None:
    result = CliRunner().invoke(
        app, ["prune", MLP, "--data", "data.npy", "--ratio", "0.5", "--batch", "8", "--out", "out"]
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("out").iterdir()} == {
        "plan.json", "plan.safetensors", "model.safetensors", "graph.json", "report.json", "report.html", "model.onnx",
    }  # fmt: skip
    model = cli_networks.mlp().eval()
    expected = vbpfx.prune(model, data.split(8), ratio=0.5, runtime="onnxruntime", progress=False)
    assert [entry.kept for entry in load_plan("out").blocks] == [entry.kept for entry in expected.plan.blocks]
    assert set(load_plan("out").widths.values()) == {16, 8}  # ONNX Runtime is fast at multiples of 8
    with torch.no_grad():
        wanted = expected.graph_module(data)
        assert torch.equal(vbpfx.load("out")(data), wanted)
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()
    assert str(expected) in result.stdout
    assert result.stdout.endswith("written to out\n")
    report = json.loads(Path("out/report.json").read_text())
    assert report["params"] == list(expected.report.params)


def test_json_is_the_report_and_nothing_else(data: torch.Tensor) -> None:
    result = _prune("--ratio", "0.5", "--json")
    assert json.loads(result.stdout)["widths"] == json.loads(Path("out/report.json").read_text())["widths"]


@pytest.mark.parametrize("command", ["prune", "eval", "finetune"])
def test_a_model_that_nobody_trained_is_told(command: str, data: torch.Tensor) -> None:
    """Without this message, somebody who forgets --weights would not notice that the weights are random."""
    np.save("images.npy", np.random.default_rng(0).standard_normal((3, 3, 160, 160)).astype(np.float32))
    save_file(timm.create_model("test_vit").state_dict(), "trained.safetensors")
    given = ["--data", "images.npy", "--batch", "3"]
    made = ["prune", "timm:test_vit", "--ratio", "0.5", "--method", "vbp", "--out", "small", "--no-onnx", *given]
    rest = {
        "prune": made,
        "eval": ["eval", "small", "--dense", "timm:test_vit", *given],
        "finetune": ["finetune", "small", "--dense", "timm:test_vit", "--out", "tuned", "--epochs", "1", "--held-out", "0",
                     "--no-onnx", *given],
    }  # fmt: skip
    trained = ["--weights", "trained.safetensors"]
    if command != "prune":
        assert CliRunner().invoke(app, [*made, *trained]).exit_code == 0
    line = "timm:test_vit has random weights: for trained ones pass --weights FILE\n"
    for weights in ([], trained):
        result = CliRunner().invoke(app, [*rest[command], *weights])
        assert result.exit_code == 0, result.output
        assert (line in result.stderr) == (not weights)


def test_options_arrive(data: torch.Tensor) -> None:
    for exact in (["--method", "vbp"], ["--round-to", "1"], ["--runtime", "none"]):
        _prune("--ratio", "0.3", *exact)
        assert load_plan("out").removed == round(0.3 * 48)
    assert load_plan("out").settings["method"] == "auto"
    _prune("--ratio", "0.3", "--method", "vbp", "--runtime", "openvino", "--include", "1")
    assert load_plan("out").settings["method"] == "vbp"
    assert load_plan("out").widths == {"1->3": 16}  # OpenVINO is fast at multiples of 16
    _prune("--ratio", "0.25", "--include", "1", "--include", "5", "--round-to", "1")
    assert load_plan("out").removed == 12
    _prune("--ratio", "0.25", "--exclude", "1", "--exclude", "1->3", "--round-to", "1")
    assert load_plan("out").widths == {"3->5": 12}
    _prune("--macs", "0.5", "--round-to", "1")
    assert load_plan("out").settings["budget"] == {"macs": 0.5}


def test_data_are_limited_and_weights_loaded(data: torch.Tensor) -> None:
    torch.manual_seed(5)
    other = cli_networks.mlp()
    nn.init.normal_(other[1].weight)
    save_file(other.state_dict(), "weights.safetensors")
    _prune("--ratio", "0.5", "--weights", "weights.safetensors", "--limit", "6", "--method", "vbp")
    plan = load_plan("out")
    assert plan.settings["samples"] == 6
    entry = plan.blocks[0]
    rows = [name for name, tensor in vbpfx.load("out").named_parameters() if tensor.shape == (len(entry.kept), 192)]
    kept = vbpfx.load("out").get_parameter(rows[0])
    assert torch.equal(kept, other[1].weight[list(entry.kept)])


def test_names_are_those_of_the_library() -> None:
    """Those that the command line writes down a second time, and those that are names of files."""
    bad_images = get_type_hints(vbpfx.open_data)["bad_images"]
    of_literals = {
        choices.FRONTENDS: Frontend, choices.BAD_IMAGES: bad_images, choices.OUTPUT_KINDS: OutputKind,
        choices.LOSSES: Loss, choices.PRECISIONS: Precision,
    }  # fmt: skip
    for names, literal in of_literals.items():
        assert names == get_args(literal)
    assert set(choices.METHODS) == set(METHODS)
    assert set(choices.RECIPES) == set(RECIPES)
    assert list(choices.ALLOCATIONS) == list(ALLOCATIONS)
    assert list(choices.COMPENSATIONS) == list(COMPENSATIONS)
    options = {parameter.name: parameter for parameter in get_command(app).commands["onnx"].params}  # type: ignore[attr-defined]
    assert options["runtime"].metavar == f"<{'|'.join(NAMES)}|none>"
    assert options["criterion"].metavar == f"<{'|'.join(CRITERIA)}>"


@pytest.mark.parametrize(
    ("command", "functions"),
    [
        ("prune", [vbpfx.prune, vbpfx.open_data]),
        ("onnx", [vbpfx.prune_onnx, vbpfx.open_data]),
        ("eval", [vbpfx.open_data]),
        ("finetune", [vbpfx.open_data]),
    ],
)
def test_options_of_groups_have_the_names_of_arguments(command: str, functions: list[Any]) -> None:
    """So that an option is declared once, and handed on by name."""
    groups = {"prune": (ModelPlanning, ModelReading), "onnx": (Planning, Reading)}.get(command, (LabelledReading,))
    given = {field.name for group in groups for field in fields(group)}
    taken = {name for function in functions for name in signature(function).parameters}
    assert given <= taken | PlanArguments.__annotations__.keys()
    shown = {parameter.name for parameter in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert given <= shown


def test_parts_of_a_method_are_chosen_by_themselves(data: torch.Tensor) -> None:
    chosen = {"criterion": "magnitude", "allocation": "global", "compensation": "none"}
    _prune("--ratio", "0.5", *(word for name, value in chosen.items() for word in (f"--{name}", value)))
    settings = load_plan("out").settings
    assert {name: settings[name] for name in chosen} == chosen


def test_an_earlier_result_is_replaced_and_its_onnx_file_goes(data: torch.Tensor) -> None:
    CliRunner().invoke(app, ["prune", MLP, "--data", "data.npy", "--ratio", "0.5", "--out", "out"])
    assert Path("out/model.onnx").exists()
    _prune("--ratio", "0.3", "--round-to", "1")
    assert not Path("out/model.onnx").exists()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    np.save(folder / "data.npy", np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32))
    return folder


def _torchrun(folder: Path, model: str, out: str, data: str = "data.npy") -> subprocess.CompletedProcess[str]:
    tests, root = Path(__file__).parent, Path(vbpfx.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(tests)]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vbpfx"]
    line = ["prune", model, "--data", data, "--ratio", "0.5", "--batch", "4", "--no-onnx", "--out", out]
    return subprocess.run([*run, *line], capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def test_two_processes_write_what_one_does(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = _torchrun(elsewhere, MLP, "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to two") == 1
    monkeypatch.chdir(elsewhere)
    one = ["prune", MLP, "--data", "data.npy", "--ratio", "0.5", "--batch", "4", "--no-onnx", "--out", "one"]
    assert CliRunner().invoke(app, one).exit_code == 0
    alone, together = load_plan("one"), load_plan("two")
    assert [entry.kept for entry in alone.blocks] == [entry.kept for entry in together.blocks]


@pytest.mark.parametrize(
    ("model", "data", "line"),
    [
        ("cli_networks:failing_in_rank_1", "data.npy", "vbpfx: rank 1: model 'cli_networks:failing_in_rank_1'"),
        (MLP, "nowhere.npy", ": nowhere.npy does not exist"),  # every kind of model reports missing data
    ],
)
def test_what_fails_in_one_process_is_said_once(model: str, data: str, line: str, elsewhere: Path) -> None:
    done = _torchrun(elsewhere, model, "never", data)
    assert done.returncode != 0
    said = [found for found in done.stderr.splitlines() if found.startswith("vbpfx: ")]
    assert len(said) == 1
    assert line in said[0]
    assert not (elsewhere / "never").exists()


def test_a_mask_is_named_with_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 9, (8, 6))
    np.savez("data.npz", tokens=tokens, pad=np.arange(6) >= np.arange(8)[:, None] % 5 + 2)
    command = ["prune", "cli_networks:padded", "--data", "data.npz", "--ratio", "0.5", "--method", "vbp", "--no-onnx"]
    for mask in ("pad", "pad:padding"):
        result = CliRunner().invoke(app, [*command, "--out", "out", "--mask", mask])
        assert result.exit_code == 0, result.output
        wanted = sum(min(n % 5 + 2, 6) for n in range(8))
        assert load_plan("out").settings["samples"] == wanted
    result = CliRunner().invoke(app, [*command, "--out", "other", "--mask", "pad:tokens"])
    assert result.exit_code == 1
    assert "its nonzero entries are tokens, and they are padding" in result.output
    result = CliRunner().invoke(app, [*command, "--out", "other", "--mask", "pad:words"])
    assert result.exit_code == 2
    assert "expected NAME, NAME:tokens or NAME:padding" in " ".join(result.output.split())
