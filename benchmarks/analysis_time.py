"""Time of the dependency analysis against the number of nodes, on networks whose weights are never allocated.

Models are built on the meta device and traced on fake tensors. Vision transformers of growing depth give the trend, the
largest models of timm the sizes that people have. Times are processor seconds, medians over interleaved rounds.

    python benchmarks/analysis_time.py [--rounds N]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
from results_page import PAGE, machine_line, markdown_table, write_section
from rich.console import Console
from rich.progress import track
from torch import nn

import vbpfx

DEPTHS = (8, 16, 32, 64, 96, 128, 160)
LARGEST = (
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    "eva_giant_patch14_224",
    "convnext_xxlarge",
    "swin_large_patch4_window12_384",
    "swinv2_large_window12_192",
)


def _vit(depth: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=depth)


def _captured(make: Callable[[], nn.Module]) -> vbpfx.Captured:
    with torch.device("meta"):
        model = make()
    size = model.pretrained_cfg["input_size"]
    return vbpfx.capture(model, torch.empty(2, *size, device="meta"))


def _seconds(captured: vbpfx.Captured) -> float:
    start = time.process_time()
    vbpfx.find_blocks(captured)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], nn.Module]] = {f"ViT of depth {d}": lambda d=d: _vit(d) for d in DEPTHS}
    makers |= {name: lambda name=name: timm.create_model(name) for name in LARGEST}
    console = Console(stderr=True)
    graphs = {name: _captured(make) for name, make in track(list(makers.items()), "tracing", console=console)}
    gc.collect()
    gc.freeze()  # the collector should not walk the other networks' graphs while one is timed
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in track(range(rounds), "analysing", console=console):
        for name, captured in graphs.items():
            times[name].append(_seconds(captured))
    nodes = {name: len(captured.graph_module.graph.nodes) for name, captured in graphs.items()}
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    trend = [name for name in graphs if name.startswith("ViT of")]
    x, y = np.array([nodes[n] for n in trend]), np.array([medians[n] for n in trend])
    slope, start = np.polyfit(x, y, 1)
    residual = 1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    rows = [
        [
            name,
            f"{sum(p.numel() for p in graphs[name].reference.parameters()) / 1e6:,.0f} M",
            str(nodes[name]),
            str(len(vbpfx.find_blocks(graphs[name]).blocks)),
            f"{medians[name]:.3f} s",
            f"{1e6 * medians[name] / nodes[name]:.0f} us",
        ]
        for name in graphs
    ]
    table = markdown_table(("network", "parameters", "nodes", "blocks", "analysis", "per node"), rows)
    fit = (
        f"Fit over the depths: {1e6 * slope:.0f} microseconds per node, {1e3 * start:+.1f} ms (R^2 = {residual:.4f}); at 5,000 "
        f"nodes {slope * 5000 + start:.2f} s."
    )
    print(table, fit, sep="\n\n")
    write_section(
        PAGE,
        "analysis",
        "## Time of the analysis\n\n`python benchmarks/analysis_time.py`\n\nProcessor seconds of `find_blocks` on networks "
        f"whose weights are never allocated (meta device, fake tensors).\n\n{table}\n\n{fit}\n\n{machine_line()}\n",
    )


if __name__ == "__main__":
    main()
