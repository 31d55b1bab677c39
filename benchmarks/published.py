"""Reproduce the paper's sizes: parameters and MACs after Variance-Based Pruning at the published ratios.

The sizes of DeiT depend only on the ratio, because all its blocks are equally wide: random weights and one random image are
enough. The expected figures are from tables 1 and 2 of VBP, ICCV 2025 (arXiv 2507.12988). MACs here are those of matrix
products and convolutions, including attention's two products. The paper's counter also counts norms, which explains the
difference of 0.5 %.

    python benchmarks/published.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import timm
import torch
from results_page import PAGE, machine_line, markdown_table, write_section
from rich.console import Console
from rich.progress import track

import vbpfx


@dataclass(frozen=True)
class Published:
    """A published result: millions of parameters and billions of MACs after pruning, or None if not published."""

    model: str
    ratio: float
    neurons: int
    params: float | None = None
    macs: float | None = None


PUBLISHED = (
    Published("deit_tiny_patch16_224", 0.45, 9_216, 4.12, 0.94),
    Published("deit_small_patch16_224", 0.50, 18_432, 14.96, 3.21),
    Published("deit_base_patch16_224", 0.20, 36_864, 75.24, 15.35),
    Published("deit_base_patch16_224", 0.55, 36_864, 55.40, 11.44),
    Published("swin_small_patch4_window7_224", 0.50, 36_096),
    Published("convnext_tiny", 0.50, 26_496),
)


def prune_published(entry: Published) -> vbpfx.Pruned:
    """Prune with random weights on one random image and check with the substitution oracle."""
    torch.manual_seed(0)
    model = timm.create_model(entry.model)
    return vbpfx.prune(model, [torch.randn(1, 3, 224, 224)], ratio=entry.ratio, method="vbp", progress=False)


COLUMNS = ("model", "p", "neurons", "parameters", "published", "MACs", "published", "difference", "oracle")


def row(entry: Published) -> list[str]:
    """Return one line of the table: our figures beside the published ones."""
    pruned = prune_published(entry)
    params, macs = pruned.report.params[1] / 1e6, pruned.report.macs[1] / 1e9
    assert pruned.verification is not None
    return [
        entry.model,
        f"{entry.ratio:.0%}",
        f"{pruned.report.neurons[0]:,}",
        f"{params:.2f} M",
        f"{entry.params:.2f} M" if entry.params else "-",
        f"{macs:.3f} G",
        f"{entry.macs:.2f} G" if entry.macs else "-",
        f"{macs / entry.macs - 1:+.2%}" if entry.macs else "-",
        f"{pruned.verification.error:.0e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = markdown_table(COLUMNS, [row(entry) for entry in track(PUBLISHED, "pruning", console=Console(stderr=True))])
    print(table)
    write_section(
        PAGE,
        "published",
        "## The published sizes\n\n`python benchmarks/published.py`\n\nParameters and MACs after Variance-Based Pruning at the "
        "ratios of the paper (ICCV 2025, arXiv 2507.12988), random weights.\nMACs here are those of matrix products and "
        "convolutions, attention's two products included; the paper's counter\nadds norms. *Oracle* is the largest relative "
        f"error against the substitution reference in float32.\n\n{table}\n\n{machine_line()}\n",
    )


if __name__ == "__main__":
    main()
