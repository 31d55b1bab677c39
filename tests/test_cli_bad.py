"""Bad command lines give a one-line reason and the right exit status, and leave every file unchanged."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_networks
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import vbpfx
import vbpfx.data.sources
import vbpfx.models.names
import vbpfx.pipeline.calibration
import vbpfx.pipeline.in_memory
import vbpfx.pipeline.model
import vbpfx.pipeline.result
import vbpfx.pipeline.stages
import vbpfx.storage.files
from vbpfx.cli import app

MLP = "cli_networks:mlp"
PRUNE = ["prune", MLP, "--data", "good.npy", "--out", "out", "--ratio", "0.5"]


class _Code:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-has-run",)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with good and bad files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # keeps a boxed usage error on one line
    images = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    np.save("good.npy", images)
    np.save("narrow.npy", images[..., 1:])
    np.save("nan.npy", np.where(images > 2, np.nan, images))
    Path("cut.npy").write_bytes(Path("good.npy").read_bytes()[:300])
    Path("words.csv").write_text("a,b\n")
    Path("file").write_text("")
    for folder in ("empty", "no-images", "bad-image", "other"):
        Path(folder).mkdir()
    Path("no-images/notes.txt").write_text("nothing to see")
    Path("bad-image/one.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    Path("other/thesis.tex").write_text("years of work")
    save_file(cli_networks.mlp().state_dict(), "fits.safetensors")
    save_file({"0.weight": torch.zeros(2, 2)}, "other.safetensors")
    Path("cut.safetensors").write_bytes(Path("fits.safetensors").read_bytes()[:100])
    Path("code.pt").write_bytes(pickle.dumps(_Code()))
    return tmp_path


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _require_one_line(result: Result, status: int, reason: str) -> None:
    said = [line for line in result.stderr.splitlines() if line.startswith("vbpfx: ")]
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert reason in result.stderr
    assert len(said) == (0 if status == 2 else 1)
    if said:
        assert reason in said[0]
        assert result.stderr.endswith(f"{said[0]}\n")


def _prune(
    *others: str, model: str = MLP, data: str = "good.npy", out: str = "out", budget: str = "--ratio=0.5"
) -> list[str]:
    return ["prune", model, "--data", data, "--out", out, *budget.split(), *others]


# mistake -> (arguments, exit status, part of the message)
LINES: dict[str, tuple[list[str], int, str]] = {
    # data
    "data that is not there": (_prune(data="nowhere"), 1, "nowhere does not exist"),
    "data of no known kind": (_prune(data="words.csv"), 1, "words.csv: this kind of file is not supported"),
    "an array file that was cut off": (_prune(data="cut.npy"), 1, "cannot read cut.npy"),
    "arrays of another shape": (_prune(data="narrow.npy"), 1, "could not be traced with inputs (0: (4, 3, 8, 7)"),
    "arrays with NaN": (_prune(data="nan.npy"), 1, "NaN"),
    "an empty folder": (_prune("--shape", "3x8x8", data="empty"), 1, "empty"),
    "a folder without images": (_prune("--shape", "3x8x8", data="no-images"), 1, "no-images"),
    "an image that is damaged": (_prune("--shape", "3x8x8", data="bad-image"), 1, "one.png"),
    "no image left": (_prune("--shape", "3x8x8", "--bad-images", "skip", data="bad-image"), 1, "bad-image"),
    "images of no known size": (_prune(data="bad-image"), 1, "--shape"),
    "a mean that is not a number": (_prune("--mean", "grey", data="bad-image"), 2, "--mean grey"),
    "no data": (["prune", MLP, "--out", "out", "--ratio", "0.5"], 2, "--data"),
    # models
    "a model of no known form": (_prune(model="deit"), 1, "expected timm:NAME"),
    "a timm model that is unknown": (_prune(model="timm:vit_smallest"), 1, "timm knows no model 'vit_smallest'"),
    "a torchvision model that is unknown": (_prune(model="torchvision:resnet1"), 1, "torchvision knows no model"),
    "a folder that is not a hf model": (_prune(model="hf:empty"), 1, "transformers cannot load 'empty'"),
    "a module that is not there": (_prune(model="nowhere_at_all:build"), 1, "No module named 'nowhere_at_all'"),
    "a function that is not there": (_prune(model="cli_networks:nothing"), 1, "nothing"),
    "a function that raises": (_prune(model="cli_networks:raising"), 1, "out of layers"),
    "a function that makes no network": (_prune(model="cli_networks:text"), 1, "expected a torch.nn.Module"),
    "a network without hidden layers": (_prune(model="cli_networks:single"), 1, "no block"),
    "a network that cannot be traced": (["inspect", "cli_networks:branching", "--shape", "8"], 1, "could not be traced"),
    "a network without numbers": (_prune(model="cli_networks:hollow"), 1, "is on the meta device, where 1.weight has no numbers"),
    "no model": (["prune", "--data", "good.npy", "--out", "out", "--ratio", "0.5"], 2, "MODEL"),
    # weights
    "weights that are not there": (_prune("--weights", "nowhere.pt"), 1, "cannot read weights from nowhere.pt"),
    "weights that do not fit": (_prune("--weights", "other.safetensors"), 1, "other.safetensors does not fit Sequential"),
    "weights that were cut off": (_prune("--weights", "cut.safetensors"), 1, "cannot read weights from cut.safetensors"),
    "weights with code in them": (_prune("--weights", "code.pt"), 1, "code.pt cannot be read as a file of weights"),
    # budgets and options
    "no budget": (_prune(budget=""), 2, "found none"),
    "two budgets": (_prune(budget="--ratio 0.5 --macs 0.5"), 2, "found --ratio and --macs"),
    "a ratio above 1": (_prune(budget="--ratio 1.5"), 2, "1.5 is not between 0 and 1"),
    "a ratio that is not a number": (_prune(budget="--ratio half"), 2, "--ratio"),
    "a budget that the floors forbid": (_prune("--min-width", "15", budget="--params 0.1"), 1, "use params=0."),
    "a ratio that the floors forbid": (_prune("--min-width", "15", budget="--ratio 0.9"), 1, "use ratio=0."),
    "a pattern that matches nothing": (_prune("--include", "encoder.*"), 1, "encoder.*"),
    "a method that is unknown": (_prune("--method", "magic"), 2, "magic"),
    "a runtime that is unknown": (_prune("--runtime", "tensorrt"), 2, "tensorrt"),
    "a latency in no runtime": (_prune("--runtime", "none", budget="--latency 0.5"), 2, "none is not a runtime"),
    "an option that is unknown": (_prune("--speed"), 2, "--speed"),
    "a limit of nothing": (_prune("--limit", "0"), 2, "--limit"),
    "a device that is not there": (_prune("--device", "tpu"), 1, "--device tpu is not there"),
    "a checkpoint in the result": (_prune("--checkpoint", "out/checkpoint"), 2, "is inside --out"),
    # the result
    "a folder that holds something else": (_prune(out="other"), 1, "other holds thesis.tex and is not a pruned network"),
    "a result that is a file": (_prune(out="file"), 1, "file is a file"),
    "a result below a file": (_prune(out="file/below"), 1, "cannot write file/below"),
    # the other commands
    "a block that is unknown": (
        ["inspect", MLP, "--shape", "3x8x8", "--block", "1->4", "--graph", "g.svg"], 1, "near it: 1->3"
    ),
    "a block without a file": (["inspect", MLP, "--block", "1->3"], 2, "--block and --graph go together"),
    "a picture that cannot be written": (
        ["inspect", MLP, "--shape", "3x8x8", "--block", "1->3", "--graph", "file/g.svg"], 1, "cannot write file/g.svg"
    ),
    "a shape that is none": (["inspect", MLP, "--shape", "3x8xwide"], 2, "expected numbers such as 3x224x224"),
    "a shape of nothing": (["inspect", MLP, "--shape", "0x8x8"], 2, "sizes of 1 and more"),
    "a shape that is not said": (["inspect", MLP], 1, "pass --shape"),
    "nothing to compare with": (["bench", "out"], 2, "pass DIR and --dense MODEL"),
    "a folder without a network": (["bench", "empty", "--dense", MLP, "--shape", "3x8x8"], 1, "cannot read empty/graph.json"),
    "an ONNX file that is not there": (["onnx", "no.onnx", "--data", "good.npy", "--out", "o.onnx", "--ratio", "0.5"], 1, "no.onnx"),
    "a ratio of an ONNX file above 1": (["onnx", "no.onnx", "--data", "good.npy", "--out", "o.onnx", "--ratio", "1.5"], 2, "1.5 is not between 0 and 1"),
    "a method of an ONNX file that is unknown": (
        ["onnx", "no.onnx", "--data", "good.npy", "--out", "o.onnx", "--ratio", "0.5", "--method", "magic"], 2, "magic"
    ),
    "a command that is unknown": (["shrink"], 2, "shrink"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", LINES)
def test_a_bad_command_line_is_one_line_and_writes_nothing(wrong: str, place: Path) -> None:
    arguments, status, reason = LINES[wrong]
    before = _files(place)
    _require_one_line(_run(*arguments), status, reason)
    assert _files(place) == before


@pytest.mark.parametrize(("package", "model"), [("timm", "timm:x"), ("torchvision.models", "torchvision:x"),
                                                ("transformers", "hf:empty")])  # fmt: skip
def test_a_package_that_is_missing_is_named(
    package: str, model: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    _require_one_line(_run(*_prune(model=model)), 1, "pip install")


def test_a_folder_without_permission_is_refused_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is simulated, because root may write everywhere."""

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(vbpfx.storage.files.tempfile, "TemporaryFile", deny)
    _require_one_line(_run(*_prune(model="cli_networks:raising", out="a/b")), 1, "cannot write a/b: Permission denied")
    assert not Path("a").exists()


def test_the_folder_is_looked_at_before_any_work(place: Path) -> None:
    """The folder is checked before the model is loaded and the data read, which take long."""
    _require_one_line(
        _run(*_prune(model="cli_networks:raising", data="nowhere", out="other")), 1, "other holds thesis.tex"
    )


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_the_old_result_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vbpfx.storage.files, "save_file", _full)
        before = _files(place)
        _require_one_line(_run(*PRUNE), 1, "No space left on device")
        assert _files(place) == before
    assert _run(*PRUNE).exit_code == 0
    before = _files(place)
    assert "out/model.onnx" in before
    monkeypatch.setattr(vbpfx.storage.files, "save_file", _full)
    _require_one_line(_run(*PRUNE, "--seed", "1"), 1, "No space left on device")
    assert _files(place) == before


STAGES = {
    "load_model": vbpfx.models.names, "open_data": vbpfx.data.sources, "capture_faithfully": vbpfx.pipeline.model,
    "find_blocks": vbpfx.pipeline.stages, "calibrate": vbpfx.pipeline.calibration, "make_plan": vbpfx.pipeline.in_memory,
    "reconstruct": vbpfx.pipeline.in_memory, "convert": vbpfx.pipeline.stages, "verify": vbpfx.pipeline.in_memory,
    "onnx_writer": vbpfx.pipeline.result, "save_network": vbpfx.pipeline.result, "save_file": vbpfx.storage.files,
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_line_and_leaves_nothing(stage: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STAGES[stage], stage, _stop)
    before = _files(place)
    _require_one_line(_run(*PRUNE), 130, "interrupted")
    assert _files(place) == before


def test_ctrl_c_in_a_terminal(place: Path) -> None:
    """A real process gets a real signal."""
    script = (
        "import os, signal, sys, time, vbpfx.pipeline.model, vbpfx.cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background processes ignore SIGINT
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.argv[1:] = {PRUNE}\n"
        "vbpfx.pipeline.model.capture_faithfully = lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "vbpfx.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines()[-1] == "vbpfx: interrupted"
    assert "Traceback" not in done.stderr
    assert not (place / "out").exists()


def test_training_is_not_lost_where_onnx_cannot_be_made(place: Path) -> None:
    model = "cli_networks:bessel"
    made = _run(*_prune("--method", "vbp", model=model))
    _require_one_line(made, 1, "out holds everything but model.onnx: torch.onnx cannot export the network: ")
    assert "\x1b" not in made.stderr
    tune = ["finetune", "out", "--dense", model, "--data", "good.npy", "--epochs", "1", "--out", "tuned"]
    Path("tuned").mkdir()
    for name in ("plan.json", "graph.json", "model.onnx"):  # files of an earlier result
        Path("tuned", name).write_text("")
    _require_one_line(_run(*tune), 1, "tuned holds everything but model.onnx")
    assert not Path("tuned/model.onnx").exists()
    assert isinstance(vbpfx.load("tuned", into=cli_networks.bessel()), nn.Module)


def test_what_cannot_become_onnx_is_saved_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the only error that leaves files: the complete result of a long run, without an earlier ONNX file."""
    assert _run(*PRUNE).exit_code == 0

    def refuse(*_: Any, **__: Any) -> None:
        raise vbpfx.ExportError("no operator for it")

    monkeypatch.setattr(vbpfx.pipeline.result, "onnx_writer", refuse)
    _require_one_line(_run(*PRUNE), 1, "out holds everything but model.onnx: no operator for it")
    assert not Path("out/model.onnx").exists()
    assert vbpfx.load("out")(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_expected_is_one_line_too(debug: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Callable[[], None]:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(vbpfx.pipeline.model, "capture_faithfully", fail)
    result = _run(*PRUNE, *(["--debug"] if debug else []))
    if debug:
        assert isinstance(result.exception, ZeroDivisionError)
    else:
        _require_one_line(result, 1, "ZeroDivisionError: by zero (--debug shows where)")
    assert not Path("out").exists()
