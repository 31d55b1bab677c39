"""Compare the peak resident memory of a prune with its `memory=` limit plus the size of the model.

A convolutional network with feature maps much larger than its weights is pruned by half under `auto`. The same network is
pruned as an ONNX file under `auto` and `vbp`. Each prune runs in a process of its own, on batches that are generated on
demand. The table shows by how much the largest resident memory of the process (`ru_maxrss`) exceeds its memory at the start
of the call. A tiny network is pruned first, so that everything is already imported and set up.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--memory 0.5 1.0] [--batch 128] [--batches 2]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from own_process import in_a_process
from rich.console import Console
from torch import nn

import vbpfx

_GIB, _SIZE, _STREAM, _HIDDEN, _BLOCKS, _CLASSES = 2**30, 128, 32, 128, 3, 10


class Residual(nn.Module):
    """x + W2 relu(W1 (d * x)): a depthwise 3x3 convolution d and two 1x1 convolutions."""

    def __init__(self, stream: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(stream, stream, 3, padding=1, groups=stream)
        self.up, self.down = nn.Conv2d(stream, hidden, 1), nn.Conv2d(hidden, stream, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return x + self.down(torch.relu(self.up(self.mix(x))))


def network(stream: int = _STREAM, hidden: int = _HIDDEN, blocks: int = _BLOCKS) -> nn.Module:
    """Build residual blocks at full image resolution and a classifier on their average-pooled output."""
    torch.manual_seed(0)
    trunk = [Residual(stream, hidden) for _ in range(blocks)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stream, _CLASSES))
    return nn.Sequential(nn.Conv2d(3, stream, 3, padding=1), *trunk, *head).eval()


def as_file(model: nn.Module, size: int, path: Path) -> None:
    """Export the network to an ONNX file for any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter used here is deprecated, but needs no further package
        torch.onnx.export(
            model, (torch.randn(2, 3, size, size),), path, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
        )


def prune(how: str, method: str, memory: float, folder: Path, size: int, batch: int, batches: int, *tiny: int) -> None:
    """Prune once."""
    random = np.random.default_rng(0)

    def data() -> Iterator[np.ndarray]:
        for _ in range(batches):
            yield random.standard_normal((batch, 3, size, size), dtype=np.float32)

    if how == "torch":
        images = (torch.from_numpy(array) for array in data())
        vbpfx.prune(network(*tiny), images, ratio=0.5, method=method, memory=memory, progress=False)
    else:
        path = folder / f"{size}.onnx"
        vbpfx.prune_onnx(path, data(), folder / "out.onnx", ratio=0.5, method=method, memory=memory, progress=False)


def measure(how: str, method: str, memory: float, folder: Path, batch: int, batches: int) -> float:
    """Return the peak memory in GiB above what the process held before the call."""
    prune(how, method, memory, folder, 8, 4, 2, 4, 8, 2)
    begun = resident()
    prune(how, method, memory, folder, _SIZE, batch, batches)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB - begun


def resident() -> float:
    """Return the resident memory of the process in GiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / _GIB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, nargs="+", default=[0.5, 1.0], help="GiB")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--only", help="one of torch-auto, onnx-auto, onnx-vbp")
    asked = parser.parse_args(arguments)
    model = sum(p.numel() * p.element_size() for p in network().parameters()) / _GIB
    console = Console(highlight=False)
    console.print(
        "| network | method | memory | peak | peak / (memory + model) |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    with tempfile.TemporaryDirectory() as name:
        as_file(network(), _SIZE, Path(name) / f"{_SIZE}.onnx")
        as_file(network(4, 8, 2), 8, Path(name) / "8.onnx")
        for how, method in (("torch", "auto"), ("onnx", "auto"), ("onnx", "vbp")):
            for memory in asked.memory:
                if asked.only in (None, f"{how}-{method}"):
                    peak = in_a_process(measure, how, method, memory, Path(name), asked.batch, asked.batches)
                    console.print(
                        f"| {how} | {method} | {memory:g} GiB | {peak:.2f} GiB | {peak / (memory + model):.2f} |"
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
