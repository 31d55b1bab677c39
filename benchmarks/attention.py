"""Measure what a trained vision transformer keeps when the MLPs, the queries and keys, and the values of attention are narrowed together.

``python benchmarks/attention.py`` prunes the ViT-Tiny of ``retention_networks.py`` with shares of every kind of block, and prints the
share of MACs that is left, the share of the dense network's top-1 accuracy that is kept, and the divergence of the logits. ``--only``
takes one row, such as ``25/60/10`` (percent removed of MLP / query-key / value-output).
"""

from __future__ import annotations

import argparse
import time

from retention_networks import NETWORKS
from rich.console import Console

import vbpfx

# Percent removed of the MLPs, of queries and keys, and of values.
ROWS = (
    "50/0/0", "30/25/25", "30/50/10", "25/60/10", "50/75/25", "50/50/50",
    "0/25/0", "0/50/0", "0/75/0", "0/0/25", "0/0/50", "0/0/75",
)  # fmt: skip
_KINDS = ("mlp", "query", "value")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=ROWS, help="rows, such as 25/60/10")
    parser.add_argument("--calibration", type=int, default=1000, help="calibration images")
    parser.add_argument("--method", default="auto", choices=("auto", "vbp"))
    options = parser.parse_args()
    console = Console()
    network = NETWORKS["vit_tiny"].load(options.calibration, None, console)
    batches = network.calibration(options.calibration)
    dense = network.output(network.model)
    console.print(
        f"method={options.method}, {options.calibration} calibration images, {network.test_samples} test images"
    )
    for row in options.only:
        ratio = {kind: int(share) / 100 for kind, share in zip(_KINDS, row.split("/"), strict=True) if share != "0"}
        began = time.perf_counter()
        pruned = vbpfx.prune(network.model, batches, ratio=ratio, method=options.method, progress=False)
        seconds = time.perf_counter() - began
        macs = [sum(macs) for macs in zip(pruned.report.macs, strict=True)]
        measured = network.judge(dense, network.output(pruned.graph_module))
        f = measured.figures
        error = pruned.verification.error if pruned.verification else float("nan")
        console.print(
            f"{row:>10}: MACs {macs[1] / macs[0]:.1%}, kept {f['kept']:.1%} +- {f['kept_se']:.1%}, KL {f['kl']:.3f}, "
            f"{seconds:.0f} s, error {error:.1e}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
