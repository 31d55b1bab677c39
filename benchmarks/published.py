"""The paper's sizes: parameters and MACs after Variance-Based Pruning at the published ratios.

DeiT's sizes follow from the ratio alone, because every block is as wide: random weights and one random image are
enough. Expected figures: VBP, ICCV 2025 (arXiv 2507.12988), tables 1 and 2. MACs here are those of matrix products and
convolutions, attention's two products included; the paper's counter adds norms, hence the 0.5 %.

    python benchmarks/published.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import timm
import torch
from rich.console import Console
from rich.table import Table

import vbpfx


@dataclass(frozen=True)
class Published:
    """A published result: millions of parameters and billions of MACs after pruning; None where not given."""

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
    """Prune with random weights on one random image; the substitution oracle is on."""
    torch.manual_seed(0)
    model = timm.create_model(entry.model)
    return vbpfx.prune(model, [torch.randn(1, 3, 224, 224)], ratio=entry.ratio, method="vbp", progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = Table(title="After VBP, random weights")
    for column in ("model", "p", "neurons", "params", "published", "MACs", "published", "difference", "oracle"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for entry in PUBLISHED:
        pruned = prune_published(entry)
        params, macs = pruned.report.params[1] / 1e6, pruned.report.macs[1] / 1e9
        assert pruned.verification is not None
        table.add_row(
            entry.model,
            f"{entry.ratio:.0%}",
            f"{pruned.report.neurons[0]:,}",
            f"{params:.2f} M",
            f"{entry.params:.2f} M" if entry.params else "-",
            f"{macs:.3f} G",
            f"{entry.macs:.2f} G" if entry.macs else "-",
            f"{macs / entry.macs - 1:+.2%}" if entry.macs else "-",
            f"{pruned.verification.error:.0e}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
