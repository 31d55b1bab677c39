"""Jobs for the processes of tests/test_sharding.py, which import only this file and not the tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import vbpfx
from vbpfx.cli import main
from vbpfx.data.inputs import Inputs
from vbpfx.finetuning.training import Training
from vbpfx.finetuning.training_state import TrainingState

FEATURES, HIDDEN, CLASSES, BLOCKS = 8, 31, 4, 3


class Block(nn.Module):
    """A residual block whose layers have odd numbers of rows, which two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(torch.nn.functional.gelu(self.fc1(self.norm(x)))))


class Net(nn.Module):
    """Blocks, a classifier, a scalar parameter, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.head, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.shift)) * self.scale


def pair() -> tuple[nn.Module, nn.Module]:
    """Return a student and its teacher in float64; the student is a perturbed copy."""
    torch.manual_seed(1)
    teacher, student = Net().double().eval(), Net().double().eval()
    with torch.no_grad():
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            ours.copy_(theirs + 0.3 * torch.randn_like(theirs))
    return student, teacher


def finetune(
    student: nn.Module, teacher: nn.Module, dtype: torch.dtype = torch.float64, **options: Any
) -> vbpfx.FineTuned:
    """Fine-tune for two epochs of seven batches of different sizes, with one more batch held out.

    On two processes, the last step of an epoch has a single batch.
    """
    torch.manual_seed(2)
    data = [torch.randn(4 + number % 3, FEATURES, dtype=dtype) for number in range(8)]
    given: dict[str, Any] = {
        "epochs": 2,
        "learning_rate": 1e-2,
        "mixing": 0.75,
        "features": "blocks.*",
        "trainable": ["blocks.*", "head.weight", "scale", *(["unused.*"] if hasattr(student, "unused") else [])],
        "progress": False,
    }
    return vbpfx.finetune(student, teacher, data, **(given | options))


def held(state: TrainingState) -> dict[str, list[int]]:
    """Return the bytes of weights, gradients and moments, in this process's memory and in total."""

    def size(tensors: list[Tensor]) -> list[int]:
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                  for t in (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)}  # fmt: skip
        return [sum(memory.values()), sum(tensor.numel() * tensor.element_size() for tensor in tensors)]

    weights = list(state.network.parameters())
    moments = [v for entry in state.optimizer.state_dict()["state"].values() for n, v in entry.items() if n != "step"]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return {"weights": size(weights), "gradients": size(gradients), "moments": size(moments)}


def train(rank: int, folder: Path) -> None:
    """Run sharded and unsharded fine-tuning and write weights, losses and sizes to the folder."""
    student, teacher = pair()
    before = [tensor.clone() for network in (student, teacher) for tensor in network.state_dict().values()]
    sizes: list[dict[str, list[int]]] = []
    record = TrainingState.record

    def measured(self: TrainingState, *losses: float | None) -> None:
        sizes.append(held(self))
        record(self, *losses)

    TrainingState.record = measured  # type: ignore[method-assign]
    done = {"whole": finetune(student, teacher)}
    done["sharded"] = finetune(student, teacher, shard=True)
    (folder / f"sizes{rank}.json").write_text(json.dumps([sizes[2], sizes[5]]))
    graphs = fx.symbolic_trace(student), fx.symbolic_trace(teacher)
    done["graph"] = finetune(*graphs, features="blocks.?.fc2")
    done["sharded graph"] = finetune(*graphs, features="blocks.?.fc2", shard=True)
    calls = 0

    def break_off(inputs: Inputs) -> Inputs:
        nonlocal calls
        calls += 1
        if calls == 6 - rank:  # step 6: the second process has a batch in only three of the four steps per epoch
            raise KeyboardInterrupt
        return inputs

    checkpoint: dict[str, Any] = {"checkpoint": folder / "run", "checkpoint_every": 1}
    with contextlib.suppress(KeyboardInterrupt):
        finetune(student, teacher, augment=break_off, shard=True, **checkpoint)
    assert calls == 6 - rank
    done["resumed"] = finetune(student, teacher, shard=True, **checkpoint)
    done["resumed whole"] = finetune(student, teacher, **checkpoint)  # from the final checkpoint
    for name, precision in (("single", "no"), ("half", "bf16"), ("sharded half", "bf16")):
        networks = (network.float() for network in pair())
        options: dict[str, Any] = {"mixed_precision": precision, "shard": name.startswith("sharded"), "epochs": 1}
        done[name] = finetune(*networks, dtype=torch.float32, accumulate=4, **options)
    for name, result in done.items():
        save_file(result.model.state_dict(), folder / f"{name} {rank}.safetensors")
    losses = {name: [[epoch.train_loss, epoch.held_out_loss] for epoch in one.history] for name, one in done.items()}
    (folder / f"losses{rank}.json").write_text(json.dumps(losses))
    assert type(done["sharded"].model) is Net
    after = [tensor for network in (student, teacher) for tensor in network.state_dict().values()]
    assert all(map(torch.equal, before, after))


def command_line(rank: int, arguments: list[str]) -> None:
    """Run the command line; kill rank 1 in its first forward pass after the second epoch's checkpoint."""
    save, run = Training._save, Inputs.run
    done = []

    def save_and_note(self: Training) -> None:
        save(self)
        done.append(self.state.position.epoch)

    def run_or_end(self: Inputs, network: nn.Module) -> Any:
        if rank and 2 in done:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, network)

    Training._save, Inputs.run = save_and_note, run_or_end  # type: ignore[method-assign]
    sys.argv = ["vbpfx", *arguments]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, *rest = sys.argv[1:]
    if job == "train":
        train(int(os.environ["RANK"]), Path(rest[0]))
    else:
        command_line(int(os.environ["RANK"]), rest)
