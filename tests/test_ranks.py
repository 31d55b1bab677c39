"""Calibration on many processes gives the statistics and plans of one process, and if one process fails, all end.

The networks compute in float64. Sums over processes have another order than in one process. Each addition has a relative
rounding error of 1e-16, so a few dozen of them stay far below 1e-12.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_jobs
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import vbpfx
from vbpfx.distributed.ranks import ALONE, Ranks
from vbpfx.errors import ArtifactError, CalibrationError
from vbpfx.plans.files import load_plan

ROUNDING = 1e-12
# Each process is forked from one that has already imported everything.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["vbpfx.pipeline.model", "torch._dynamo", "torch.export"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(job: str, count: int, folder: Path, **options: Any) -> list[int | None]:
    """Run a job on ``count`` processes and return their exit codes."""
    port = _free_port()
    ranks = [
        _FORKS.Process(target=ranks_jobs.run_rank, args=(job, rank, count, port, folder, options))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    return [rank.exitcode for rank in ranks]


def _assert_equal(one: vbpfx.Statistics, other: vbpfx.Statistics) -> None:
    assert one.moments.keys() == other.moments.keys()
    for name, sources in one.moments.items():
        for mine, theirs in zip(sources, other.moments[name], strict=True):
            for part in (lambda m: m, lambda m: m.co, lambda m: m.held_out):
                a, b = part(mine), part(theirs)
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.count == b.count
                    assert (a.mean - b.mean).abs().max() <= ROUNDING * a.mean.abs().max()
                    assert (a.m2 - b.m2).abs().max() <= ROUNDING * a.m2.abs().max()


@pytest.fixture(scope="module")
def alone() -> dict[str, vbpfx.Pruned]:
    """Return the result of one process for each of the ``WAYS``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {way: ranks_jobs.pruned(**options) for way, options in ranks_jobs.WAYS.items()}
    torch.set_num_threads(threads)
    return made


@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_gather_and_decide_what_one_does(
    count: int, tmp_path: Path, alone: dict[str, vbpfx.Pruned]
) -> None:
    """This covers batches of different sizes, uneven and empty shares, padding, co-moments, gradients and reconstruction."""
    assert _run("prune", count, tmp_path) == [0] * count
    assert not list(tmp_path.glob("error*"))
    for way, one in alone.items():
        for rank in range(count):
            _assert_equal(one.statistics, vbpfx.Statistics.load(tmp_path / f"{way} statistics {rank}"))
            plan = load_plan(tmp_path / f"{way} plan {rank}")
            assert [entry.kept for entry in plan.blocks] == [entry.kept for entry in one.plan.blocks]
            assert plan.settings == one.plan.settings
            assert [c.layer for c in plan.corrections] == [c.layer for c in one.plan.corrections]
            for mine, theirs in zip(plan.corrections, one.plan.corrections, strict=True):
                # The plan stores float32, so values can differ by one rounding.
                torch.testing.assert_close(mine.weight, theirs.weight, rtol=2e-7, atol=1e-9)
                torch.testing.assert_close(mine.bias, theirs.bias, rtol=2e-7, atol=1e-9)
        first, *others = [(tmp_path / f"{way} plan {rank}" / "plan.safetensors").read_bytes() for rank in range(count)]
        assert all(other == first for other in others)
    assert any(entry.kept for entry in alone["auto"].plan.blocks)
    assert alone["auto"].plan.corrections
    # One process writes the files once, before any process continues.
    assert len({(tmp_path / f"written {rank}").read_text() for rank in range(count)}) == 1
    assert vbpfx.load(tmp_path / "artifact")(ranks_jobs.batches(1)[0]).shape == (3, 4)


def test_data_of_their_own_and_a_rank_alone(tmp_path: Path) -> None:
    assert _run("own", 2, tmp_path) == [0, 0]
    assert not list(tmp_path.glob("error*"))
    data = ranks_jobs.batches(4)
    (counted,) = {m.count for (m,) in ranks_jobs.prune(data).statistics.moments.values()}
    for rank in range(2):
        found = vbpfx.Statistics.load(tmp_path / f"own statistics {rank}")
        assert {m.count for (m,) in found.moments.values()} == {counted}
        expected = ranks_jobs.prune(data[rank : rank + 2]).statistics
        _assert_equal(expected, vbpfx.Statistics.load(tmp_path / f"alone statistics {rank}"))


@pytest.mark.parametrize(("bad", "how"), [(1, "raise"), (0, "raise"), (1, "kill"), (0, "kill")])
def test_all_end_where_one_fails(bad: int, how: str, tmp_path: Path) -> None:
    codes = _run("fail", 3, tmp_path, bad=bad, how=how)
    assert codes[bad] != 0
    for rank in {0, 1, 2} - {bad}:
        assert codes[rank] == 0
        message = (tmp_path / f"error{rank}").read_text()
        assert message.startswith("RankError")
        if how == "raise":
            assert f"rank {bad} failed: ValueError: no such file" in message
        elif bad == 1:
            assert "rank 1 failed: it has not responded for 4 s: it was killed" in message
    assert not (tmp_path / "artifact").exists()


def test_ranks_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    """After one process is killed, the same number of ranks resumes, and another number is refused."""
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "checkpoint"), "checkpoint_every": 1}
    _run("fail", 2, tmp_path, bad=1, how="kill", **options)
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"calibration.safetensors", "calibration.1.safetensors"}
    _run("save", 2, tmp_path / "checkpoint", name=str(tmp_path / "resumed"), **options)
    (tmp_path / "fresh").mkdir()
    _run("save", 2, tmp_path / "fresh", name=str(tmp_path / "whole"))
    resumed, whole = ((tmp_path / name / "plan.safetensors").read_bytes() for name in ("resumed", "whole"))
    assert resumed == whole
    with pytest.raises(ArtifactError, match="number of ranks was 2 in that run and is 1 now"):
        ranks_jobs.prune(ranks_jobs.batches(12), **options)


def test_ranks_that_do_not_do_the_same_are_told(tmp_path: Path) -> None:
    assert _run("differ", 2, tmp_path) == [0, 0]
    for rank in range(2):
        weights, ratio, stage = (tmp_path / f"differ{rank}").read_text().splitlines()
        assert f"ranks {1 - rank} and {rank} were given different values for: model" in weights
        assert f"ranks {1 - rank} and {rank} were given different values for: choice of options" in ratio
        assert "all ranks must make the same vbpfx calls in the same order" in stage


def test_a_script_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of docs/many_processes.md runs under torchrun and in one process."""
    page = Path(__file__).parent.parent / "docs" / "many_processes.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"calibration.safetensors", "calibration.1.safetensors"}
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    exec(compile(code, "example", "exec"), {})
    two, one = load_plan(tmp_path / "pruned"), load_plan(tmp_path / "alone" / "pruned")
    assert [entry.kept for entry in two.blocks] == [entry.kept for entry in one.blocks]


def test_one_process_is_alone() -> None:
    """Without torch.distributed nothing waits or is exchanged, and values are returned unchanged."""
    tensor = torch.randn(3)
    assert ALONE.sum([tensor])[0] is tensor
    assert ALONE.sums([1, 2.5]) == [1, 2.5]
    assert ALONE.of_first(lambda: 3) == 3
    assert ranks_jobs.prune(ranks_jobs.batches(2), method="vbp").ranks is ALONE


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(CalibrationError, match="ranks='both' is unknown"):
        ranks_jobs.prune(ranks_jobs.batches(2), ranks="both")
    dataset = TensorDataset(torch.cat(ranks_jobs.batches(4)))
    loader = DataLoader(dataset, sampler=DistributedSampler(dataset, 2, 0))
    captured = vbpfx.capture(ranks_jobs.network(), ranks_jobs.batches(1)[0])
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with pytest.raises(CalibrationError, match="pass the loader without it, or ranks='own'"):
        vbpfx.calibrate(observed, loader, ranks=Ranks(0, 2))
    with pytest.raises(CalibrationError, match="pass the loader without it, or ranks='own'"):
        ranks_jobs.prune(loader, ranks=Ranks(0, 2))
    with pytest.raises(CalibrationError, match="calibration is one Tensor"):
        ranks_jobs.prune(torch.cat(ranks_jobs.batches(2)), example_inputs=ranks_jobs.batches(1)[0])
