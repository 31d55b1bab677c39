"""Killed runs: calibration resumes from its checkpoint bit for bit, and files are either the old or the new ones.

There is no tolerance, because the same batches go through the same operators in the same order.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_jobs
import torch
from test_ranks import _FORKS

import vbpfx
from vbpfx.display.progress import progress_bar
from vbpfx.errors import ArtifactError, CalibrationError
from vbpfx.plans.files import load_plan, plan_digest
from vbpfx.storage.files import settle

BATCHES = 9


class Stopping:
    """Batches that raise KeyboardInterrupt before one of them."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(ranks_jobs.batches(BATCHES)):
            if number == self.stop:
                raise KeyboardInterrupt
            yield batch


def _same(one: vbpfx.Pruned, other: vbpfx.Pruned) -> bool:
    def bits(statistics: vbpfx.Statistics) -> list[Any]:
        found = [m.to_tensors() for sources in statistics.moments.values() for m in sources]
        return [(counts, {k: t.numpy().tobytes() for k, t in tensors.items()}) for tensors, counts in found]

    return bits(one.statistics) == bits(other.statistics) and plan_digest(one.plan) == plan_digest(other.plan)


@pytest.mark.parametrize(
    "options",
    [{"method": "vbp"}, {"method": "vbp", "compensation": "ridge"}, {}, {"samples": 17}],
    ids=["vbp", "ridge", "auto", "auto on some"],
)
def test_a_run_that_is_broken_off_anywhere_ends_like_one_that_is_not(options: dict[str, Any], tmp_path: Path) -> None:
    whole = ranks_jobs.prune(ranks_jobs.batches(BATCHES), **options)
    kept: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every": 2} | options
    for stop in (1, 4, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            ranks_jobs.prune(Stopping(stop), **kept)
    assert _same(ranks_jobs.prune(ranks_jobs.batches(BATCHES), **kept), whole)
    again = ranks_jobs.prune(ranks_jobs.batches(BATCHES), **kept)  # resumes from the final checkpoint
    assert _same(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_batches_of_the_checkpoint_are_not_run_again(tmp_path: Path) -> None:
    captured = vbpfx.capture(ranks_jobs.network(), ranks_jobs.batches(1)[0])
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with pytest.raises(KeyboardInterrupt):
        vbpfx.calibrate(observed, Stopping(5), checkpoint=tmp_path, checkpoint_every=2)
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    vbpfx.calibrate(observed, ranks_jobs.batches(BATCHES), checkpoint=tmp_path, checkpoint_every=2)
    (first, *_) = [module for module in observed.children() if hasattr(module, "calls")]
    assert first.calls == BATCHES - 4


KILLS = 10


def test_a_process_that_is_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    """The process is killed ten times: while it starts, calibrates, resumes or saves.

    The artifact is always the old or the new one, with one of the two plans.
    """
    data = ranks_jobs.batches(BATCHES)
    whole, old = ranks_jobs.prune(data), ranks_jobs.prune(data, ratio=0.25, method="vbp")
    plans = {plan_digest(pruned.plan): pruned.graph_module for pruned in (whole, old)}
    chance, kills, finished = random.Random(0), 0, 0
    checkpoint, artifact = tmp_path / "checkpoint", tmp_path / "artifact"
    old.save(artifact)
    while kills < KILLS or not finished:
        process = _FORKS.Process(target=ranks_jobs.prune_slowly, args=(BATCHES, checkpoint, artifact))
        process.start()
        if kills % 2:  # let every other process resume from the last checkpoint for a while
            while process.is_alive() and not (checkpoint / "calibration.safetensors").exists():
                time.sleep(0.01)
        process.join(chance.uniform(0.0, 1.5) if kills < KILLS else 120)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        found = plan_digest(load_plan(artifact))
        with torch.no_grad():
            assert torch.equal(vbpfx.load(artifact)(data[1]), plans[found](data[1]))
        if process.exitcode == 0:
            assert found == plan_digest(whole.plan)
            resumed = ranks_jobs.prune(data, checkpoint=checkpoint, checkpoint_every=1)
            assert _same(resumed, whole)
            assert [path.name for path in checkpoint.iterdir()] == ["calibration.safetensors"]
            finished += 1
            old.save(artifact)
            (checkpoint / "calibration.safetensors").unlink()


@pytest.mark.parametrize("renames", [0, 1, 2, 6, 7])
def test_a_save_that_is_killed_leaves_the_old_artifact_or_the_new_one(renames: int, tmp_path: Path) -> None:
    """The process is killed after a number of renames; the first rename is that of the list of renames."""
    data = ranks_jobs.batches(2)
    old, new = (ranks_jobs.prune(data, ratio=ratio, method="vbp") for ratio in (0.25, 0.5))
    old.save(tmp_path)
    process = _FORKS.Process(target=ranks_jobs.save_killed, args=(renames, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if renames < 7 else 0)
    expected = new if renames else old
    with torch.no_grad():
        assert torch.equal(vbpfx.load(tmp_path)(data[1]), expected.graph_module(data[1]))
    assert plan_digest(load_plan(tmp_path)) == plan_digest(expected.plan)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(expected.report.to_json()))
    new.save(tmp_path)
    names = {"plan.json", "plan.safetensors", "model.safetensors", "graph.json", "report.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names  # no temporary files are left


def test_a_list_of_renames_reaches_no_other_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "artifact", tmp_path / "precious"
    folder.mkdir()
    outside.write_text("old")
    (folder / ".x.y").write_text("new")
    (folder / "...").mkdir()
    (folder / "..." / "precious.y").write_text("new")
    for renames in (
        {".x.y": "../precious"},
        {".../precious.y": "../precious"},
        {"./../precious": "x"},
        {".x.y": "z"},
        ["x"],
        {".x.y": 3},
    ):
        (folder / ".vbpfx-renames.json").write_text(json.dumps(renames))
        with pytest.raises(ArtifactError, match="is not a list of files to rename in"):
            settle(folder)
    (folder / ".vbpfx-renames.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        settle(folder)
    assert outside.read_text() == "old"
    assert (folder / ".x.y").read_text() == "new"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return the folder of a checkpoint after four batches."""
    with pytest.raises(KeyboardInterrupt):
        ranks_jobs.prune(Stopping(5), checkpoint=tmp_path, checkpoint_every=2)
    return tmp_path


def _flip(contents: bytes) -> bytes:
    return contents[:-20] + bytes([contents[-20] ^ 1]) + contents[-19:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-7], _flip, lambda c: b"", lambda c: b"nothing of ours"],
    ids=["short", "bit", "empty", "other"],
)
def test_a_damaged_checkpoint_is_refused(begun: Path, damage: Any) -> None:
    file = begun / "calibration.safetensors"
    contents = damage(file.read_bytes())
    file.write_bytes(contents)
    with pytest.raises(
        ArtifactError, match=r"not a checkpoint of calibration, or damaged .*; remove it, or pass another"
    ):
        ranks_jobs.prune(ranks_jobs.batches(BATCHES), checkpoint=begun)
    assert file.read_bytes() == contents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ratio": 0.4},
            "was written by another run: options was 'ratio=0.5' in that run and is 'ratio=0.4' now; remove it",
        ),
        ({"method": "vbp"}, "was written by another run: observers was"),
        ({"samples": 3}, "samples was .* in that run and is 3 now"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(begun: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        ranks_jobs.prune(ranks_jobs.batches(BATCHES), checkpoint=begun, **options)


def test_a_checkpoint_of_another_model_or_other_data_is_refused(begun: Path) -> None:
    data = ranks_jobs.batches(BATCHES)
    model = ranks_jobs.network()
    with torch.no_grad():
        model.head.bias += 1e-9
    with pytest.raises(ArtifactError, match="was written by another run: network was"):
        vbpfx.prune(model, data, ratio=0.5, checkpoint=begun, progress=False)
    with pytest.raises(ArtifactError, match="the first 4 batches passed now differ"):
        ranks_jobs.prune([data[1], data[0], *data[2:]], checkpoint=begun)
    with pytest.raises(ArtifactError, match="covers 4 batches, but the data has only 3"):
        ranks_jobs.prune(data[:3], checkpoint=begun)
    with pytest.raises(CalibrationError, match="checkpoint_every must be at least 1, found 0"):
        ranks_jobs.prune(data, checkpoint=begun, checkpoint_every=0)


def test_the_time_left_is_that_of_batches_that_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 batches were done by an earlier run and 10 now, in 40 s each, so the 40 remaining ones take 1600 s."""
    from rich.progress import Progress

    clock, bars = [0.0], []
    original = Progress.__init__

    def init(self: Progress, *args: Any, **options: Any) -> None:
        bars.append(self)
        original(self, *args, get_time=lambda: clock[0], **options)

    monkeypatch.setattr(Progress, "__init__", init)
    with progress_bar("x", 100, True, done=50) as advance:
        for _ in range(10):
            clock[0] += 40
            advance()
        (task,) = bars[0].tasks
        assert task.completed == 60
        assert task.time_remaining == pytest.approx(1600, abs=1)
