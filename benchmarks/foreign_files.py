"""Prune ten ONNX files from other authors' packages with ``vbpfx.prune_onnx`` and its default options.

``python benchmarks/foreign_files.py`` downloads the packages by name and version (``foreign_packages.py``), makes separate
inputs for calibration and for testing (``foreign_inputs.py``), prunes each network, and writes ``docs/foreign_files.md`` and
``benchmarks/results/foreign_files.json``. ``foreign_networks.py`` defines for each network how the kept quality is measured.
Speed is the processor time of single samples in ONNX Runtime on one thread, with dense and pruned calls in turn. Needs
matplotlib, Pillow, scipy and transformers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from foreign_networks import NETWORKS, Array, Batch, Network
from foreign_packages import PACKAGES
from results_page import PAGE, machine_line, markdown_table

import vbpfx
from vbpfx.measurement.timing import Spread, alternating
from vbpfx.onnx_session.session import open_session
from vbpfx.storage.files import json_writer, text_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "foreign_files.json"
FOLDER = Path(__file__).resolve().parent.parent / "build" / "foreign"
RATIOS = (0.2, 0.4)
_MEMORY = 2.0  # GiB
_MEASURED = 0.005  # each timing lasts at least this many seconds


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on one thread."""
    return open_session(path, threads=1)


def outputs(network: Network, opened: onnxruntime.InferenceSession, batches: Sequence[Batch]) -> list[Array]:
    """Return the compared output for every batch."""
    found = [np.asarray(opened.run(None, batch)[network.output]) for batch in batches]
    return [output.argmax(-1) for output in found] if network.classes else found


def about(path: Path) -> dict[str, Any]:
    """Return the exporter and the opset that the file names."""
    model = onnx.load(path, load_external_data=False)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    return {"exporter": " ".join((model.producer_name, model.producer_version)).strip(), "opset": opset}


def speed(
    dense: onnxruntime.InferenceSession, small: onnxruntime.InferenceSession, batch: Batch, rounds: int
) -> Spread:
    """Return the processor time per sample of the dense network divided by that of the pruned one.

    Both run in turn. Each timing covers as many calls as take some milliseconds.
    """
    start = time.process_time()
    dense.run(None, batch)
    calls = max(1, round(_MEASURED / max(1e-6, time.process_time() - start)))

    def repeated(opened: onnxruntime.InferenceSession) -> None:
        for _ in range(calls):
            opened.run(None, batch)

    runs = {"dense": partial(repeated, dense), "small": partial(repeated, small)}
    seconds = alternating(runs, rounds=rounds, clock=time.process_time)
    return Spread.of([a / b for a, b in zip(seconds["dense"], seconds["small"], strict=True)])


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one network at all ratios; a refusal is recorded as text."""
    network = NETWORKS[name]
    path = network.find(options.folder)
    data = network.data(options.folder, *(max(1, round(count * options.share)) for count in network.counts))
    opened = session(path)
    expected = outputs(network, opened, data.test)
    one = {key: array[:1] for key, array in data.test[0].items()}
    found: dict[str, Any] = about(path) | {"bytes": path.stat().st_size, "ratios": {}, "machine": machine_line()}
    found |= {"samples": [sum(len(next(iter(b.values()))) for b in part) for part in (data.calibration, data.test)]}
    for ratio in options.ratios:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            try:
                pruned = vbpfx.prune_onnx(
                    path, data.calibration, Path(folder) / "small.onnx", ratio=ratio, memory=_MEMORY, progress=False
                )
            except vbpfx.VbpfxError as error:
                found["ratios"][f"{ratio:g}"] = {"refused": f"{type(error).__name__}: {error}"}
                print(f"{name}, {ratio:g}: {found['ratios'][f'{ratio:g}']}", flush=True)
                continue
            seconds = time.process_time() - start
            small = session(pruned.path)
            kept, right = network.kept(expected, outputs(network, small, data.test), data.truth, path)
            found["ratios"][f"{ratio:g}"] = {
                "kept": kept,
                "right": right,
                "speed": vars(speed(opened, small, one, options.rounds)),
                "macs": pruned.report.macs,
                "params": pruned.report.params,
                "neurons": pruned.report.neurons,
                "blocks": len(pruned.analysis.blocks),
                "left_alone": dict(pruned.left_alone),
                "refused_axes": dict(Counter(r.reason for r in pruned.analysis.refusals).most_common(3)),
                "seconds": seconds,
            }
        print(f"{name}, {ratio:g}: {found['ratios'][f'{ratio:g}']}", flush=True)
    return found


def _row(name: str, found: Mapping[str, Any], ratio: str) -> list[str]:
    network, at = NETWORKS[name], found["ratios"][ratio]
    if "refused" in at:
        return [name, "", f"{float(ratio):.0%}", "refused", "", "", "", ""]
    right = "" if at["right"] is None else f"{at['right']:.1%}"
    spread = at["speed"]
    return [
        name,
        network.measure,
        f"{float(ratio):.0%}",
        f"{at['kept']:.1%}",
        right,
        f"{spread['median']:.2f}x ({spread['lower']:.2f}-{spread['upper']:.2f})",
        f"{at['macs'][1] / at['macs'][0]:.0%}",
        f"{at['params'][1] / at['params'][0]:.0%}",
    ]


def page(results: Mapping[str, Any]) -> str:
    """Return the text of the page for these results."""
    known = {name: results[name] for name in NETWORKS if name in results}
    files = [
        [
            name,
            f"{NETWORKS[name].package} {PACKAGES[NETWORKS[name].package]}",
            found["exporter"] or NETWORKS[name].written_by,
            str(found["opset"]),
            f"{found['bytes'] / 1e6:.1f}",
            f"{found['samples'][0]}, {found['samples'][1]}",
        ]
        for name, found in known.items()
    ]
    rows = [_row(name, found, ratio) for name, found in known.items() for ratio in found["ratios"]]
    refused = [
        f"- {name} at {float(ratio):.0%}: {at['refused']}"
        for name, found in known.items()
        for ratio, at in found["ratios"].items()
        if "refused" in at
    ]
    slower = [
        f"- {name} at {float(ratio):.0%}: {at['speed']['median']:.2f}x, with {at['macs'][1] / at['macs'][0]:.2%} of the MACs left. Most "
        f"layers cannot be narrowed: {next(iter(at['refused_axes']))} ({next(iter(at['refused_axes'].values()))} layers or axes)."
        for name, found in known.items()
        for ratio, at in found["ratios"].items()
        if "speed" in at and at["speed"]["median"] < 1
    ]
    machines = sorted({found["machine"] for found in known.values()})
    parts = [
        "# ONNX files of other people",
        "`python benchmarks/foreign_files.py`",
        "These networks ship in packages of other authors and were written by other exporters. `vbpfx.prune_onnx` prunes them with its default "
        "options (except `memory=2`), without the model, labels or training. The benchmark makes the inputs. The calibration "
        "inputs share no text, sentence or file with the test inputs. Text recognition reads rendered lines and pages of "
        "docstrings. Sentence encoders embed docstrings. Speech models rate speech of espeak-ng with telephone-like damage. "
        "File classifiers get files of the running Python's library, and the surface gets settings drawn at random. The command for each "
        "network is in `benchmarks/results/foreign_files.json`.",
        markdown_table(("network", "package", "exporter", "opset", "MB", "samples to calibrate on, tested"), files),
        "*Kept* compares the pruned network with the dense one: the share of the samples that the dense network gets right and the pruned one, too; "
        "the cosine between their embeddings; or the explained variance of the scores. *Dense* is the share that the dense network "
        "gets right. *Speed* is the processor time per sample in ONNX Runtime on one thread, dense divided by pruned, with both "
        "measured in turn: median and quartiles. The last two columns are the shares of MACs and parameters that are left.",
        markdown_table(("network", "what is kept", "removed", "kept", "dense", "speed", "MACs", "parameters"), rows),
    ]
    if missing := [name for name in NETWORKS if name not in results]:
        parts += [f"Not measured: {', '.join(missing)}."]
    if slower:
        parts += ["Not faster:", "\n".join(slower)]
    if refused:
        parts += ["Refused:", "\n".join(refused)]
    return "\n\n".join([*parts, "  ".join(machines)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/foreign_files.py", description="ONNX files of other people, pruned as they come."
    )
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", help=f"default all: {', '.join(NETWORKS)}")
    add("--ratios", type=float, nargs="+", default=list(RATIOS), help="default %(default)s")
    add("--share", type=float, default=1.0, help="of the samples; default %(default)s")
    add("--rounds", type=int, default=31, help="of the timing; default %(default)s")
    add("--folder", type=Path, default=FOLDER, help="where the packages go; default build/foreign")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/foreign_files.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of foreign_files.md; default docs")
    options = parser.parse_args(argv)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in () if options.page else options.networks or NETWORKS:
        found = measure(name, options)
        command = shlex.join(["python", "benchmarks/foreign_files.py", name])
        found["command"] = command if options.share == 1 else f"{command} --share {options.share:g}"
        results = json.loads(options.out.read_text()) if options.out.exists() else {}
        write_atomically({options.out: json_writer(results | {name: found})})
    results = json.loads(options.out.read_text())
    write_atomically({options.docs / "foreign_files.md": text_writer(page(results))})
    print(f"written: {options.docs / 'foreign_files.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
