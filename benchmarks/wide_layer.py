"""Measure ``method="auto"`` on one wide hidden layer: wall-clock and processor seconds of the whole call.

OMP_NUM_THREADS=2 python benchmarks/wide_layer.py 1024 2048 4096
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import vbpfx

_STREAM, _BATCH, _BATCHES = 256, 256, 32


def measure(width: int) -> tuple[float, float]:
    """Return wall-clock and processor seconds for pruning a layer of that width by half on 8,192 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(_STREAM, width), nn.GELU(), nn.Linear(width, _STREAM)).eval()
    data = [torch.randn(_BATCH, _STREAM) for _ in range(_BATCHES)]
    wall, processor = time.perf_counter(), time.process_time()
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    assert list(pruned.plan.widths.values()) == [width // 2]
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("widths", nargs="*", type=int, default=[1024, 2048, 4096])
    measure(64)  # warm-up: imports, and what PyTorch sets up once
    for number in parser.parse_args().widths:
        seconds, spent = measure(number)
        print(f"width {number}: {seconds:.1f} s, {spent:.1f} s of processor time on {torch.get_num_threads()} threads")
