"""``memory=`` bounds the tensors alive at once: batches run in parts that give the statistics of whole batches."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_files import Net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vbpfx
from vbpfx.calibration.observer import Observer

MIB = 2**-10  # one MiB in GiB, the unit of memory=
SIZE, STREAM, HIDDEN = 16, 8, 32
# Observers sum at most 4096 rows in float32 at a time; this is the bound on the relative error of such a sum.
ROUNDING = 4096 * 2.0**-24


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(STREAM, HIDDEN, 1), nn.Conv2d(HIDDEN, STREAM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def _network() -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(STREAM, 5))
    return nn.Sequential(nn.Conv2d(3, STREAM, 3, padding=1), _Residual(), _Residual(), *head).eval()


def _images(*samples: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, SIZE, SIZE) for n in samples]


class _Live(TorchDispatchMode):
    """Track the current and the largest number of bytes of all live tensors made in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.seen = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.device.type == "cpu":
                self._note(leaf.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "auto", "reconstruct": False}, {"method": "vbp"}])
def test_no_more_tensors_live_than_the_memory_that_was_asked_for(options: dict[str, Any]) -> None:
    model, data, memory = _network(), _images(64, 16), 4 * MIB
    with _Live() as live:
        vbpfx.prune(model, data, ratio=0.5, memory=memory, progress=False, **options)
    assert 0.1 * memory < live.most / 2**30 < 1.1 * memory


def _largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of samples of every value that an observer sees, in the returned list."""
    seen, forward = [], Observer.forward

    def noting(self: Observer, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append(x.shape[0])
        return forward(self, x, mask)

    monkeypatch.setattr(Observer, "forward", noting)
    return seen


def _require_alike(found: vbpfx.Statistics, expected: vbpfx.Statistics) -> None:
    """Assert that statistics are equal up to the rounding of float32 sums, relative to the variance."""
    assert found.moments.keys() == expected.moments.keys()
    for name, own in found.moments.items():
        for ours, theirs in zip(own, expected.moments[name], strict=True):
            assert ours.count == theirs.count
            spread = theirs.variance.sqrt().max()
            assert (ours.mean - theirs.mean).abs().max() <= ROUNDING * spread
            torch.testing.assert_close(ours.variance, theirs.variance, rtol=ROUNDING, atol=0)
            for part, other in ((ours.co, theirs.co), (ours.held_out, theirs.held_out)):
                assert (part is None) == (other is None)
                if part is not None and other is not None:
                    assert part.count == other.count
                    torch.testing.assert_close(part.m2, other.m2, rtol=0, atol=1e-5 * float(other.m2.max()))


@pytest.mark.parametrize("method", ["auto", "vbp"])
def test_batches_that_are_larger_run_in_parts_with_the_same_statistics(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = _network(), _images(50, 30, 3)
    options: dict[str, Any] = {"ratio": 0.5, "method": method, "reconstruct": False, "progress": False}
    whole = vbpfx.prune(model, data, **options)
    seen = _largest(monkeypatch)
    parts = vbpfx.prune(model, data, memory=6 * MIB, **options)
    a_sample = 4 * HIDDEN * SIZE**2
    assert 1 < max(seen) <= 6 * 2**20 / 4 / a_sample  # a quarter of the memory, for one feature map
    _require_alike(parts.statistics, whole.statistics)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        hidden = torch.relu(exact[1].up(exact[0](torch.cat(data).double()))).movedim(1, -1).flatten(0, 2)
    (moments,) = next(iter(parts.statistics.moments.values()))
    torch.testing.assert_close(moments.mean, hidden.mean(0), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(moments.variance, hidden.var(0), rtol=ROUNDING, atol=0)
    if method == "vbp":
        assert [e.kept for e in parts.plan.blocks] == [e.kept for e in whole.plan.blocks]


def test_padding_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            kept = attention_mask.unsqueeze(-1).to(x.dtype)
            return (self.down(torch.relu(self.up(x))) * kept).sum(1) / kept.sum(1)

    torch.manual_seed(0)
    model = Tokens().eval()
    lengths = torch.randint(1, 13, (40, 1))
    data = [{"x": torch.randn(40, 12, 8), "attention_mask": (torch.arange(12) < lengths).long()}]
    options: dict[str, Any] = {"ratio": 0.5, "method": "auto", "reconstruct": False, "progress": False}
    whole = vbpfx.prune(model, data, **options)
    seen = _largest(monkeypatch)
    parts = vbpfx.prune(model, data, memory=0.25 * MIB, **options)
    assert 1 < max(seen) < 40
    assert next(iter(parts.statistics.moments.values()))[0].count == int(lengths.sum())
    _require_alike(parts.statistics, whole.statistics)


def test_a_batch_whose_samples_influence_one_another_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x - x.mean(0))))

    torch.manual_seed(0)
    model, data = Coupled().eval(), [torch.randn(96, 8)]
    seen = _largest(monkeypatch)
    pruned = vbpfx.prune(model, data, ratio=0.5, method="vbp", memory=0.1 * MIB, progress=False)
    assert max(seen) == 96
    with torch.no_grad():
        hidden = torch.relu(model.up(data[0] - data[0].mean(0)).double())
    (moments,) = next(iter(pruned.statistics.moments.values()))
    torch.testing.assert_close(moments.variance, hidden.var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["auto", "vbp"])
def test_a_foreign_file_is_run_in_parts_from_the_first_batch_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, net, stream = tmp_path / "dense.onnx", Net(), "x"
    for i in range(2):
        up, down = net.weight(f"{i}.up", HIDDEN, 3, 1, 1), net.weight(f"{i}.down", 3, HIDDEN, 1, 1)
        net.add("Conv", [stream, up], f"{i}.u")
        net.add("Relu", [f"{i}.u"], f"{i}.h")
        net.add("Conv", [f"{i}.h", down], f"{i}.d")
        net.add("Add", [stream, f"{i}.d"], "y" if i else "s")
        stream = "s"
    onnx.save(net.model(["n", 3, SIZE, SIZE], ["n", 3, SIZE, SIZE]), path)
    data = [batch.numpy() for batch in _images(60, 20)]
    options: dict[str, Any] = {"ratio": 0.5, "method": method, "progress": False}
    whole = vbpfx.prune_onnx(path, data, tmp_path / "whole.onnx", **options)
    fed, run = [], onnxruntime.InferenceSession.run

    def noting(self: Any, names: Any, feeds: dict[str, np.ndarray[Any, Any]], *rest: Any) -> Any:
        fed.extend(array.shape[0] for array in feeds.values())
        return run(self, names, feeds, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", noting)
    seen = _largest(monkeypatch)
    parts = vbpfx.prune_onnx(path, data, tmp_path / "parts.onnx", memory=6 * MIB, **options)
    # A quarter of the memory, because the inputs of both blocks are kept at once.
    assert 1 < max(seen) <= 6 * 2**20 / 4 / (4 * HIDDEN * SIZE**2 * (2 if method == "vbp" else 1))
    assert max(fed) <= max(4, *seen)
    _require_alike(parts.statistics, whole.statistics)
