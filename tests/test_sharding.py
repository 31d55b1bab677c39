"""Sharded fine-tuning gives the weights of an unsharded run with half of the memory per process.

The networks compute in float64. Sums over processes have another order than in one process. AdamW divides by the root of
small squares, after which the difference is below 1e-9.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import shard_jobs
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import vbpfx
from vbpfx.cli import app
from vbpfx.data.inputs import Inputs
from vbpfx.demo.digits import load_digits, load_trained
from vbpfx.errors import FinetuneError
from vbpfx.finetuning.units import find_units

ROUNDING = 1e-9
MODEL = "vbpfx.demo.digits:load_trained"


def _environment() -> dict[str, str]:
    return os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(vbpfx.__file__).parents[1]),
    }


def _two(*arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes of shard_jobs.py without torchrun, which would end one process when the other has ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, shard_jobs.__file__, *map(str, arguments)]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command,
            env=_environment() | meeting | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((tensor - other[name]).abs().max().item() for name, tensor in one.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("trained")
    for process in _two("train", folder):
        assert process.returncode == 0, process.stderr[-3000:]
    return folder


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the weights of a run, which must be the same in both processes."""
    one, other = (load_file(folder / f"{name} {rank}.safetensors") for rank in range(2))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    return one


@pytest.mark.parametrize("kind", ["", "graph"])
def test_a_sharded_run_is_the_run_that_is_not(trained: Path, kind: str) -> None:
    """This covers features, frozen parameters, an unused layer, gradient clipping, and a process without a batch."""
    sharded, whole = _weights(trained, f"sharded {kind}".strip()), _weights(trained, kind or "whole")
    student, teacher = shard_jobs.pair()
    start = student.state_dict()
    if kind:
        student, teacher = fx.symbolic_trace(student), fx.symbolic_trace(teacher)
    options = {"features": "blocks.?.fc2"} if kind else {}
    one = shard_jobs.finetune(student, teacher, accumulate=2, **options)
    assert _difference(sharded, whole) < ROUNDING
    assert _difference(sharded, one.model.state_dict()) < ROUNDING
    assert all((sharded[name] != start[name]).any() for name in ("blocks.1.fc1.weight", "head.weight", "scale"))
    assert all(torch.equal(sharded[name], start[name]) for name in {"unused.weight", "head.bias"} & sharded.keys())


def test_losses_are_those_over_all_samples(trained: Path) -> None:
    losses = json.loads((trained / "losses0.json").read_text())
    assert losses == json.loads((trained / "losses1.json").read_text())
    for sharded, whole in (("sharded", "whole"), ("sharded graph", "graph")):
        ours, theirs = ([loss for epoch in losses[name] for loss in epoch] for name in (sharded, whole))
        assert ours[0] is theirs[0] is None
        assert ours[1:] == pytest.approx(theirs[1:], rel=ROUNDING)
        assert len(ours) == 6


def test_each_process_holds_half(trained: Path) -> None:
    """Each process holds about half, or a little more because of odd numbers of rows, and nothing is missing."""
    sizes = [json.loads((trained / f"sizes{rank}.json").read_text()) for rank in range(2)]
    for kind in ("weights", "gradients", "moments"):
        (_, whole), *_ = ours = [sharded[kind] for _, sharded in sizes]
        assert all(not_sharded[kind] == [whole, whole] for not_sharded, _ in sizes)
        assert all(held < 0.6 * whole for held, _ in ours)
        assert sum(held for held, _ in ours) >= whole > 1000


def test_a_sharded_run_goes_on_bit_for_bit(trained: Path) -> None:
    """A run is interrupted in step six of eight; its last checkpoint is complete and also works for an unsharded run."""
    sharded = _weights(trained, "sharded")
    assert _difference(_weights(trained, "resumed"), sharded) == 0
    assert _difference(_weights(trained, "resumed whole"), sharded) == 0
    (file,) = (trained / "run").iterdir()
    assert load_file(file)["network.blocks.0.fc1.weight"].shape == (shard_jobs.HIDDEN, shard_jobs.FEATURES)
    losses = json.loads((trained / "losses0.json").read_text())
    assert losses["resumed"] == losses["sharded"] == losses["resumed whole"]


def test_half_precision_is_the_same_sharded(trained: Path) -> None:
    """The losses before one step are equal, and the step differs only by the rounding of a bfloat16 gradient."""
    losses = json.loads((trained / "losses0.json").read_text())
    assert losses["sharded half"][0] == losses["half"][0] != losses["single"][0]
    assert losses["sharded half"][1][0] == losses["half"][1][0]
    sharded, half = _weights(trained, "sharded half"), _weights(trained, "half")
    assert _difference(sharded, half) < 1e-6
    assert sharded["head.weight"].dtype == torch.float32


def test_the_command_line_ends_with_a_killed_process_and_goes_on_without(tmp_path: Path) -> None:
    """The second of two processes is killed after the second of three epochs on the demo's network."""
    images = load_digits().train_images[:200]
    pruned = vbpfx.prune(load_trained(), [images], ratio=0.9, method="vbp", progress=False)
    pruned.save(tmp_path / "pruned", onnx=False)
    np.save(tmp_path / "train.npy", images.numpy())
    common = [
        "finetune", tmp_path / "pruned", "--dense", MODEL, "--data", tmp_path / "train.npy", "--epochs", 3,
        "--held-out", 0, "--no-onnx",
    ]  # fmt: skip
    sharded = [*common, "--batch", 50, "--shard", "--checkpoint", tmp_path / "run", "--out", tmp_path / "sharded"]

    left, killed = _two("command line", *sharded)
    assert killed.returncode == -9
    assert left.returncode == 1
    assert left.stderr.count("vbpfx: rank 0: another rank cannot be reached") == 1
    assert "Traceback" not in left.stderr
    assert not (tmp_path / "sharded").exists()
    assert (tmp_path / "run" / "finetune.safetensors").exists()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vbpfx"]
    done = subprocess.run([*map(str, [*torchrun, *sharded])], env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    one = CliRunner().invoke(app, [str(argument) for argument in [*common, "--batch", 100, "--out", tmp_path / "one"]])
    assert one.exit_code == 0, one.output
    before, ours, theirs = (
        vbpfx.load(tmp_path / name, into=load_trained()).state_dict() for name in ("pruned", "sharded", "one")
    )
    assert ours.keys() == theirs.keys()

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(sum((one[name] - tensor).double().square().sum() for name, tensor in other.items()) ** 0.5)

    # AdamW's first steps follow the sign of a gradient, which another order of summation can flip if it is nearly zero.
    assert distance(ours, theirs) < 0.02 * distance(before, theirs)


# where a network can be divided


class Reading(nn.Module):
    """Attention reads the weight of a layer without calling it; the network reads the weight of a layer that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.fc(y) + y @ self.fc.weight


class Tied(nn.Module):
    """One weight is shared by two layers, and another by a layer and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Linear(8, 8, bias=False), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head, self.spare = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.head.weight, self.spare.weight = self.embedding.weight, self.middle[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)))


class Folding(nn.Module):
    """A module that returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).transpose(0, 1)


class Writing(nn.Module):
    """Two modules return views, and the first view is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Folding(), Folding()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += 1
        return self.second(y) + 1


@dataclass
class Opaque:
    value: object


class Hiding(nn.Module):
    """The parent of the first layer returns an object that hides its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Inner(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x).value)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(self.fc(x + self.bias[:8]))


class Caching(nn.Module):
    """A module that returns a hidden object beside a tensor, like a decoder's cache; its inner module does, too, and so is not a unit."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.inner = Caching(depth - 1) if depth else nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.inner(x)
        y = y["logits"] if isinstance(y, dict) else y
        return {"logits": y + self.bias[:8], "cache": Opaque(y)}


@pytest.mark.parametrize(
    ("kind", "units"),
    [(Reading, ["attention"]), (Tied, ["middle.1"]), (Writing, ["second"]), (Hiding, ["inner.fc", "fc"]),
     (Caching, ["inner.inner"])],
)  # fmt: skip
def test_units_are_whole_while_they_run(kind: type[nn.Module], units: list[str]) -> None:
    network = kind()
    found = find_units(network, Inputs((torch.randn(2, 3, 8),), {}), trained=True)
    assert found == units
    assert network.training


def test_blocks_are_units_and_graphs_go_layer_by_layer() -> None:
    """Of 1,696 parameters, a norm has 16, too few for its own exchange, and a block has 567, more than an eighth."""
    network, inputs = shard_jobs.pair()[0], Inputs((torch.randn(2, 8, dtype=torch.float64),), {})
    layers = [f"blocks.{block}.fc{layer}" for block in range(shard_jobs.BLOCKS) for layer in (1, 2)]
    assert find_units(network, inputs, trained=True) == [*layers, "blocks", "head"]  # the norms form one unit
    assert find_units(fx.symbolic_trace(network), inputs, trained=True) == [*layers, "head"]
    deep = nn.Sequential(*[shard_jobs.Block() for _ in range(9)])
    assert find_units(deep, Inputs((torch.randn(2, 8),), {}), trained=True) == [str(number) for number in range(9)]
    exported = torch.export.export(network, inputs.args).module()
    assert find_units(exported, inputs, trained=False) == []


def test_what_cannot_be_sharded_is_said() -> None:
    student, teacher = shard_jobs.pair()
    with pytest.raises(FinetuneError, match=r"there is only one process\. Start several with torchrun"):
        shard_jobs.finetune(student, teacher, shard=True)
    with pytest.raises(
        FinetuneError, match="Inner cannot be sharded: FSDP2 does not find the tensors in what this network returns"
    ):
        find_units(Inner(), Inputs((torch.randn(2, 8),), {}), trained=True)
    with pytest.raises(FinetuneError, match="a batch does not run through Net on cpu, before it is sharded"):
        find_units(student, Inputs((torch.randn(2, 7),), {}), trained=True)
