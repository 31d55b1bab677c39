"""Compare methods on trained networks with padded 3x3 convolutions, without any training, for docs/convolutions.md.

The networks are those of ``small_convolutional.py``. Each is narrowed to the same multiply-accumulates by vbpfx,
Torch-Pruning and onnxsim (``convolutions_methods.py``), from the same calibration images. These are drawn several times from
the training images. Scores are measured on the test images, which no method has seen.

    pip install torch-pruning==1.6.1 onnxsim==0.8.1
    python benchmarks/convolutions.py

The figures go to ``benchmarks/results/convolutions.json`` after every method of a network, and from there to the page;
``--page`` does only that. ``--methods`` measures some methods anew and keeps the results of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from convolutions_methods import INSTALL, METHODS, ImpossibleError, Method, macs_of
from convolutions_page import PAGE, write_page
from convolutions_subjects import Subject, subject
from results_page import machine_line
from retention_measures import pack
from small_networks import CONVOLUTIONAL

from vbpfx.display.quiet import quiet_warnings
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "convolutions.json"
SHARES = (0.7, 0.5, 0.3)
_PACKAGES = ("torch", "timm", "torch-pruning", "onnxsim", "onnxruntime")


def _measure(method: Method, network: Subject, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return variant -> share of the MACs -> figures."""
    dense = macs_of(network.model, network.test_inputs[:1])
    draws = [network.draw(options.calibration, seed) for seed in range(options.draws)]
    found: dict[str, dict[str, Any]] = {}
    for variant, prune in method.variants(network).items():
        found[variant] = {}
        for share in options.shares:
            try:
                outcomes = [prune(network, draw, share) for draw in (draws if method.uses_data else draws[:1])]
            except ImpossibleError as error:
                found[variant][f"{share:g}"] = {"impossible": str(error)}
                continue
            if not method.uses_data:
                outcomes *= len(draws)
            found[variant][f"{share:g}"] = {
                "means": [outcome.values.mean().item() for outcome in outcomes],
                "macs": max(outcome.macs for outcome in outcomes) / dense,
                "values": pack(torch.stack([outcome.values for outcome in outcomes]).mean(0)),
            }
    return found


def _dense(network: Subject) -> dict[str, Any]:
    with torch.no_grad():
        values = network.values(network.model(network.test_inputs))
    return {
        "macs": macs_of(network.model, network.test_inputs[:1]),
        "params": sum(p.numel() for p in network.model.parameters()),
        "mean": values.mean().item(),
        "values": pack(values),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/convolutions.py", description="Padded convolutions: vbpfx beside other tools."
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=CONVOLUTIONAL, default=CONVOLUTIONAL, help="default: all")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--shares", nargs="+", type=float, default=SHARES, help="shares of the MACs to keep; default: %(default)s")
    add("--draws", type=int, default=10, help="how often calibration images are drawn; default: %(default)s")
    add("--calibration", type=int, default=600, help="images of a draw; default: %(default)s")
    add("--page", action="store_true", help="measure nothing; write the page from the figures that are there")
    add("--out", type=Path, default=RESULTS, help="file of the figures; default: benchmarks/results/convolutions.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of convolutions.md; default: docs")
    options = parser.parse_args(argv)
    missing = [p for p in ("torch-pruning", "onnxsim") if p not in _versions()]
    if not options.page and missing and any(not METHODS[name].ours for name in options.methods):
        parser.error(f"{' and '.join(missing)} not found; install: {INSTALL}, or choose --methods")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _options(argv)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    settings = {"calibration": options.calibration, "draws": options.draws, "shares": list(options.shares)}
    for name in options.networks if not options.page else ():
        network = subject(name)
        record = results.get(name, {})
        if record.get("settings") != settings:  # figures of other draws cannot be compared
            record = {"settings": settings, "results": {}}
        record |= {"dense": _dense(network), "test": len(network.test_inputs), "noise_psnr": network.noise_psnr}
        record |= {"versions": _versions(), "machine": machine_line()}
        results[name] = record
        for method in options.methods:
            with quiet_warnings():
                record["results"][method] = _measure(METHODS[method], network, options)
            write_atomically({options.out: json_writer(results)})
            print(f"{name}, {method}: measured", flush=True)
    write_page(results, options.docs / PAGE.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
