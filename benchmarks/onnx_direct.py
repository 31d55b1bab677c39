"""Check that pruning an ONNX file gives the same neurons and outputs as pruning the PyTorch model.

Each network is exported by both exporters of torch. ``vbpfx.prune_onnx`` prunes each file with ``method="vbp"`` on the same
data as ``vbpfx.prune``. The benchmark compares the kept neurons, block by block, and the outputs of the two narrowed ONNX
files on unseen data. The vision networks have random weights; MiniLM's are trained.

    python benchmarks/onnx_direct.py [network ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentences
import timm
import torch
from results_page import PAGE, machine_line, markdown_table, write_section
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import relative_error

RATIO = 0.5
_SEED = 0
_BATCHES = 3
COLUMNS = ("network", "exporter", "blocks", "neurons", "kept elsewhere", "output", "effect", "statistics by", "seconds")


@dataclass(frozen=True)
class Network:
    """A model, its calibration batches by input name, and a test batch that neither way sees."""

    model: nn.Module
    data: list[dict[str, Tensor]]
    test: dict[str, Tensor]


def image_network(name: str) -> Network:
    torch.manual_seed(_SEED)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():  # an initialisation with zeros hides any difference
            parameter.normal_(0, 0.05)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):  # layer scales of 1e-6 would hide any difference behind them
                parameter.fill_(0.5)
    batches = [{"x": torch.randn(2, 3, 224, 224)} for _ in range(_BATCHES + 1)]
    return Network(model, batches[:-1], batches[-1])


def text_network() -> Network:
    model, tokenizer = sentences.load_encoder()
    texts, _ = sentences.docstrings(12 * (_BATCHES + 1), 0)
    batches = [tokenizer(texts[12 * i : 12 * (i + 1)]) for i in range(_BATCHES + 1)]
    return Network(model, batches[:-1], batches[-1])


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "deit_tiny_patch16_224": lambda: image_network("deit_tiny_patch16_224"),
    "convnext_atto": lambda: image_network("convnext_atto"),
    "mixer_s32_224": lambda: image_network("mixer_s32_224"),
    "all-MiniLM-L6-v2": text_network,
}


def export(network: Network, path: Path, *, dynamo: bool) -> None:
    """Export by one of torch's two exporters, with dynamic batch size and sequence length."""
    example = network.data[0]
    open_axes = {n: {0: "batch"} if t.is_floating_point() else {0: "batch", 1: "length"} for n, t in example.items()}
    given: dict[str, Any] = {"input_names": list(example), "output_names": ["y"], "dynamo": dynamo}
    if dynamo:
        dims = {name: torch.export.Dim(name) for axes in open_axes.values() for name in axes.values()}
        given["dynamic_shapes"] = tuple({i: dims[n] for i, n in axes.items()} for axes in open_axes.values())
        given |= {"external_data": False, "verbose": False}
    else:
        given |= {"dynamic_axes": open_axes, "opset_version": 17}
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(network.model, tuple(example.values()), str(path), **given)
    finally:
        logging.disable(logging.NOTSET)


def outputs(path: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    return run_session(open_session(path), Inputs(tuple(batch.values()), {}))


def compare(name: str, network: Network, folder: Path) -> list[dict[str, Any]]:
    """Return one result per exporter."""
    batches = [tuple(batch.values()) for batch in network.data]
    through = vbpfx.prune(network.model, batches, ratio=RATIO, method="vbp", progress=False, inputs=lambda b: (b, {}))
    through.to_onnx(folder / "through.onnx")
    expected = outputs(folder / "through.onnx", network.test)
    found = []
    for exporter, dynamo in (("dynamo", True), ("TorchScript", False)):
        export(network, folder / "dense.onnx", dynamo=dynamo)
        began = time.perf_counter()
        direct = vbpfx.prune_onnx(
            folder / "dense.onnx", network.data, folder / "direct.onnx", ratio=RATIO, method="vbp", progress=False
        )
        seconds = time.perf_counter() - began
        kept = [{e.block.name: set(e.kept) for e in plan.blocks} for plan in (direct.plan, through.plan)]
        elsewhere = sum(len(a - b) for a, b in zip(*(k.values() for k in kept), strict=True))
        found.append(
            {
                "network": name,
                "exporter": exporter,
                "blocks": len(direct.analysis.blocks),
                "same_blocks": [b.width for b in direct.analysis.blocks] == [b.width for b in through.analysis.blocks],
                "neurons": direct.analysis.neurons,
                "elsewhere": elsewhere,
                "error": relative_error(outputs(folder / "direct.onnx", network.test), expected),
                "effect": direct.verification.effect if direct.verification else float("nan"),
                "observed_by": direct.observed_by,
                "seconds": seconds,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table goes")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results = []
    for name in track(chosen.networks or list(NETWORKS), "pruning", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:
            results += compare(name, NETWORKS[name](), Path(folder))
    rows = [
        [
            r["network"], r["exporter"], f"{r['blocks']}", f"{r['neurons']:,}", f"{r['elsewhere']}", f"{r['error']:.1e}",
            f"{r['effect']:.1e}", r["observed_by"], f"{r['seconds']:.1f}",
        ]
        for r in results
    ]  # fmt: skip
    table = markdown_table(COLUMNS, rows)
    print(table)
    if not chosen.networks:
        write_section(
            chosen.page,
            "onnx_direct",
            "## ONNX in, ONNX out\n\n`python benchmarks/onnx_direct.py`\n\nEach file pruned by `vbpfx.prune_onnx`, against "
            f'`vbpfx.prune` on the PyTorch model and its ONNX file,\n`method="vbp"`, {RATIO:.0%} of the neurons, the same '
            "data. *Kept elsewhere* counts neurons that only one of the two keeps; *output*\nis the largest relative "
            "difference of the two narrowed files on other data, in ONNX Runtime; *effect* that between what the\nplan says "
            f"and the dense network.\n\n{table}\n\n{machine_line()}\n",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
