"""Jobs for the processes of tests/test_ranks.py, which import only this file and not the tests."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vbpfx
import vbpfx.distributed.meeting
from vbpfx.errors import VbpfxError
from vbpfx.plans.files import plan_files
from vbpfx.storage.files import write_atomically

WIDTH, TOKENS = 6, 5


class Block(nn.Module):
    """A residual block over tokens, preceded by token mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.fc1, self.fc2 = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 24),
            nn.Linear(24, WIDTH),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.mix(x)
        if mask is not None:
            y = y * mask[..., None]
        x = x + self.norm(y + y.mean(1, keepdim=True))
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


class Net(nn.Module):
    """Two blocks and a classifier of the mean over tokens.

    It computes in float64, so that the order of summation only affects the last digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        if attention_mask is None:
            return self.head(x.mean(1))
        weight = attention_mask[..., None]
        return self.head((x * weight).sum(1) / weight.sum(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def batches(count: int, masked: bool = False) -> list[Any]:
    """Return batches of different sizes and contents."""
    generator = torch.Generator().manual_seed(1)
    made: list[Any] = []
    for number in range(count):
        size = 3 + number % 4
        x = torch.randn(size, TOKENS, WIDTH, dtype=torch.float64, generator=generator) + 3
        if masked:
            lengths = torch.randint(1, TOKENS + 1, (size, 1), generator=generator)
            made.append({"x": x, "attention_mask": (torch.arange(TOKENS) < lengths).double()})
        else:
            made.append(x)
    return made


def prune(data: Any, **options: Any) -> vbpfx.Pruned:
    given: dict[str, Any] = {"ratio": 0.5, "progress": False} | options
    return vbpfx.prune(network(), data, **given)


def run_rank(job: str, rank: int, count: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """Run one process of a job and write the error to a file if vbpfx raised one."""
    torch.set_num_threads(1)
    vbpfx.distributed.meeting.SILENCE, vbpfx.distributed.meeting.BEAT = 4.0, 0.2
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        globals()[f"job_{job}"](rank, folder, **options)
    except VbpfxError as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
    else:
        dist.destroy_process_group()


# Options for pruning on several processes and on one. One entry has fewer batches than processes.
WAYS: dict[str, dict[str, Any]] = {
    "vbp": {"number": 7, "method": "vbp"},
    "ridge": {"number": 6, "method": "vbp", "compensation": "ridge"},
    "compiled": {"number": 7, "method": "vbp", "compile": {"backend": "aot_eager"}},
    "auto": {"number": 7},
    "cut": {"number": 7, "samples": 14},
    "masked": {"number": 5, "masked": True},
    "empty shards": {"number": 1},
}


def pruned(number: int, masked: bool = False, **options: Any) -> vbpfx.Pruned:
    """Prune in one of the ``WAYS``."""
    return prune(batches(number, masked), **options)


def job_prune(rank: int, folder: Path) -> None:
    for way, options in WAYS.items():
        result = pruned(**options)
        result.statistics.save(folder / f"{way} statistics {rank}")
        write_atomically(plan_files(result.plan, folder / f"{way} plan {rank}"))
    written = (result.save(folder / "artifact") / "model.safetensors").stat()
    (folder / f"written {rank}").write_text(f"{written.st_ino} {written.st_mtime_ns}")


def job_own(rank: int, folder: Path) -> None:
    """Give each rank its own data, of which the second has none, and let each rank prune alone."""
    data = batches(4)
    shares = [data, []]
    result = prune(shares[rank], ranks="own", example_inputs=data[0])
    result.statistics.save(folder / f"own statistics {rank}")
    alone = prune(data[rank : rank + 2], ranks="alone")
    alone.statistics.save(folder / f"alone statistics {rank}")


def job_differ(rank: int, folder: Path) -> None:
    """Let the ranks differ in their weights, in the ratio, and in the called function."""
    said = []

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except VbpfxError as error:
            said.append(str(error))

    model = network()
    with torch.no_grad():
        model.head.bias += rank
    attempt(lambda: vbpfx.prune(model, batches(2), ratio=0.5, progress=False))
    attempt(lambda: prune(batches(2), ratio=0.5 + rank / 10))
    captured = vbpfx.capture(network(), batches(1)[0])
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    attempt(lambda: prune(batches(2)) if rank else vbpfx.calibrate(observed, batches(2)))
    (folder / f"differ{rank}").write_text("\n".join(said))


class Failing:
    """Data that raises or kills the process at a given batch on one rank."""

    def __init__(self, rank: int, bad_rank: int, at: int, how: str) -> None:
        self.bad, self.at, self.how = rank == bad_rank, at, how

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(batches(12)):
            if self.bad and number == self.at:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("no such file")
            yield batch


def job_save(rank: int, folder: Path, name: str, **options: Any) -> None:
    prune(batches(12), **options).save(name)


def job_fail(rank: int, folder: Path, bad: int, how: str, **options: Any) -> None:
    prune(Failing(rank, bad, 5, how), **options).save(folder / "artifact")


def prune_slowly(number: int, checkpoint: Path, artifact: Path) -> None:
    """Prune with slow batches and a checkpoint after each, and save the result."""
    torch.set_num_threads(1)

    def data() -> Iterator[Any]:
        for batch in batches(number):
            time.sleep(0.1)
            yield batch

    prune(data(), checkpoint=checkpoint, checkpoint_every=1).save(artifact)


def save_killed(renames: int, folder: Path) -> None:
    """Save a network; the process is killed after ``renames`` renames, just before the next one."""
    torch.set_num_threads(1)
    result, original, made = prune(batches(2), ratio=0.5, method="vbp"), Path.replace, itertools.count()

    def replace(self: Path, target: Path) -> Path:
        if next(made) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign,assignment]
    result.save(folder)
