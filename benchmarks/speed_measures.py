"""Two parts of ``speed.py``: our pass beside Torch-Pruning's, and the cost of observers."""

from __future__ import annotations

import copy
import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vbpfx
from vbpfx.calibration.moments import Moments
from vbpfx.calibration.observer import Observer
from vbpfx.measurement.timing import alternating

COMPARED = ("deit_small_patch16_224", "convnext_tiny")
LARGE = "deit_base_patch16_224"
OBSERVED = ("deit_small_patch16_224", "convnext_tiny", "mixer_b16_224")
_BANDWIDTH_BYTES = 1 << 28


def torch_pruning() -> Any:
    """Import Torch-Pruning, which our pass is compared with.

    Raises:
        SystemExit: Torch-Pruning is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise SystemExit(
            "this benchmark compares with Torch-Pruning, which is not installed: pip install torch-pruning"
        ) from None


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return the network with random weights, and one random image."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def invented(analysis: vbpfx.Analysis) -> vbpfx.Statistics:
    """Return random statistics, because gathering real ones is measured separately."""
    return vbpfx.Statistics(
        {
            b.name: tuple(Moments(100, torch.randn(b.width).double(), torch.rand(b.width).double()) for _ in b.sources)
            for b in analysis.blocks
        }
    )


def our_pass(model: nn.Module, image: Tensor) -> nn.Module:
    """Run our pass: remove half of every MLP's hidden neurons and return the narrowed graph."""
    captured = vbpfx.capture(model, image)
    analysis = vbpfx.find_blocks(captured)
    plan = vbpfx.make_plan(analysis, invented(analysis), ratio=0.5, method="vbp", allocation="equal")
    return vbpfx.convert(captured, plan)


def their_pass(model: nn.Module, image: Tensor) -> nn.Module:
    """Run Torch-Pruning's pass: build the dependency graph and remove half of every MLP by magnitude, in place."""
    tp = torch_pruning()
    halved = {module: 0.5 for name, module in model.named_modules() if name.endswith("mlp.fc1")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            image,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.0,
            pruning_ratio_dict=halved,
            root_module_types=[nn.Linear],
        )
        pruner.step()
    return model


PASSES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {"vbpfx": our_pass, "torch-pruning": their_pass}


def pass_times(name: str, rounds: int) -> dict[str, Any]:
    """Return the processor seconds of both passes, in alternating rounds.

    Copying the model that Torch-Pruning changes is not timed.
    """
    model, image = network(name)
    seconds: dict[str, list[float]] = {way: [] for way in PASSES}
    left = {}
    for number in range(rounds + 1):
        for way in reversed(PASSES) if number % 2 else PASSES:
            given = copy.deepcopy(model) if way == "torch-pruning" else model
            gc.collect()
            start = time.process_time()
            small = PASSES[way](given, image)
            taken = time.process_time() - start
            left[way] = sum(p.numel() for p in small.parameters())
            if number:  # the first round is a warm-up
                seconds[way].append(taken)
    if len(set(left.values())) > 1:
        raise RuntimeError(f"{name}: the two did not remove the same: {left} parameters are left")
    return {"seconds": seconds, "parameters": left["vbpfx"]}


def first_pass(name: str, way: str) -> dict[str, float]:
    """Return processor seconds and memory of the first pass in a process. Call this in a new process."""
    torch.set_num_threads(1)
    model, image = network(name)
    torch_pruning()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.inference_mode():
        model(image)  # memory that forward passes need should not count
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of resident memory
    before, start = _memory("VmRSS"), time.process_time()
    small = PASSES[way](model, image)
    found = {"seconds": time.process_time() - start, "peak": _memory("VmHWM") - before, "weights": weights}
    del small
    return found


def _memory(entry: str) -> int:
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(entry))
    return 1024 * int(line.split()[1])


def observer_cost(name: str, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Measure plain forward passes and prepared ones in turn, and the time spent within the observers.

    Times are processor time on one thread and wall-clock time on several.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    model, image = network(name)
    analysis = vbpfx.find_blocks(vbpfx.capture(model, image))
    captured, images = analysis.captured, torch.randn(batch, *image.shape[1:])
    observed = vbpfx.prepare(captured, analysis, covariance=False)
    within: list[float] = []
    passes = {
        "plain": lambda: _forward(captured.graph_module, images),
        "observed": lambda: within.append(_within_observers(observed, images, clock)),
    }
    seconds = alternating(passes, rounds=rounds, warmup=1, clock=clock)
    inner = within[-rounds:]
    hidden = sum(_bytes(captured, source) for block in analysis.blocks for source in block.sources) * batch
    ratios = [o / p for o, p in zip(seconds["observed"], seconds["plain"], strict=True)]
    shares = [i / (o - i) for o, i in zip(seconds["observed"], inner, strict=True)]
    plain = statistics.median(seconds["plain"])
    return {
        "batch": batch,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall clock",
        "seconds": seconds,
        "within": inner,
        "ratio": statistics.median(ratios),
        "within_ratio": 1 + statistics.median(shares),
        "bytes": hidden,
        "limit": 1 + hidden / bandwidth(clock) / plain,
    }


def _forward(graph_module: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        graph_module(images)


def _within_observers(observed: nn.Module, images: Tensor, clock: Callable[[], float]) -> float:
    """Run a prepared forward pass and return the seconds spent within the observers."""
    original, spent = Observer.forward, 0.0

    def clocked(self: Observer, x: Tensor, mask: Tensor | None = None) -> Tensor:
        nonlocal spent
        start = clock()
        value = original(self, x, mask)
        spent += clock() - start
        return value

    Observer.forward = clocked  # type: ignore[method-assign]
    try:
        _forward(observed, images)
    finally:
        Observer.forward = original  # type: ignore[method-assign]
    return spent


def _bytes(captured: vbpfx.Captured, source: Any) -> int:
    """Return the size in bytes of the source's value for one sample."""
    value = captured.nodes[source.node].meta["val"]
    return int(value.numel() // value.shape[0] * value.element_size())


def bandwidth(clock: Callable[[], float]) -> float:
    """Return the bytes per second at which a sum reads memory that no cache holds."""
    values = torch.ones(_BANDWIDTH_BYTES // 4)
    (seconds,) = alternating({"sum": values.sum}, rounds=9, warmup=2, clock=clock).values()
    return _BANDWIDTH_BYTES / statistics.median(seconds)
