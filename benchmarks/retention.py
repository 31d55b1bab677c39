"""Measure retention: the accuracy that trained networks keep without any retraining, method by method.

``python benchmarks/retention.py`` prunes the networks of ``retention_networks.py`` by the methods of
``retention_methods.py`` at several shares p of the hidden neurons, and compares each pruned network with the dense one on
the same test samples (``retention_measures.py`` describes how). Networks whose data is missing are skipped with a message.

Every result is written to ``benchmarks/results/retention-NETWORK.json`` as soon as it is measured, so a run may be
interrupted. The next run keeps results that were measured with the same code of the package and the same method. With
``--resume`` it keeps all results; with ``--again`` it repeats all requested measurements. At the end, the section of
``docs/results.md`` and its pictures are made from those files (``retention_page.py``); ``--page`` does only that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results_page import PAGE, describe_machine
from retention_measures import pack
from retention_methods import METHODS, Study
from retention_networks import NETWORKS, Network
from retention_page import SWEEP_METHODS, SWEEP_RATIO, Record, Result, write_page
from rich.console import Console

import vbpfx

RESULTS = Path(__file__).resolve().parent / "results"
Key = tuple[str, float, int]  # method, ratio, calibration samples


def stamp(method: str) -> str:
    """Return a hash of the package's code and of the method's options, on which a result depends besides its data."""
    digest = hashlib.sha256(repr(METHODS[method]).encode())
    for file in sorted(Path(vbpfx.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The JSON file with the results of one network."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: Record = json.loads(path.read_text()) if path.exists() else {"results": []}

    def find(self, key: Key) -> Result | None:
        """Return the result with that key, if there is one."""
        return next((r for r in self.record["results"] if _key(r) == key), None)

    def put(self, result: Result) -> None:
        """Add a result or replace the existing one with the same key, and write the file."""
        others = [r for r in self.record["results"] if _key(r) != _key(result)]
        order = list(METHODS)
        others.append(result)
        self.record["results"] = sorted(others, key=lambda r: (r["calibration"], r["ratio"], order.index(r["method"])))
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.record, indent=1) + "\n")
        unfinished.replace(self.path)


def _key(result: Result) -> Key:
    return result["method"], result["ratio"], result["calibration"]


def wanted(name: str, options: argparse.Namespace) -> list[Key]:
    """Return the requested measurements of a network, those at several calibration sizes last."""
    subject = NETWORKS[name]
    count = _cut(options.calibration or subject.calibration, subject.most)
    keys = [(m, ratio, count) for ratio in options.ratios or subject.ratios for m in options.methods]
    sizes = dict.fromkeys(_cut(size, subject.most) for size in options.calibration_sizes)
    keys += [(m, SWEEP_RATIO, size) for size in sizes for m in SWEEP_METHODS]
    return list(dict.fromkeys(keys))


def _cut(count: int, most: int | None) -> int:
    return count if most is None else min(count, most)


def measure(name: str, options: argparse.Namespace, console: Console) -> str | None:
    """Measure what is requested and missing; return the reason if nothing could be measured."""
    subject, store = NETWORKS[name], Store(options.out / f"retention-{name}.json")
    reason = subject.missing()
    if reason is not None:
        return reason
    pending = [key for key in wanted(name, options) if options.again or not _settled(store, key, options.resume)]
    if not pending:
        console.print(f"{name}: everything asked for is there; --again measures it anew")
        return None
    network = subject.load(max(size for *_, size in pending), options.test, console)
    if store.record.get("test_samples", network.test_samples) != network.test_samples:
        return (
            f"{store.path.name} was measured on {store.record['test_samples']} test samples, this run has "
            f"{network.test_samples}; choose another --out, or delete that file"
        )
    if (most := max(size for *_, size in pending)) > network.samples:
        return f"there are {network.samples} {subject.units} to calibrate on, not {most}; use a smaller --calibration"
    dense = network.output(network.model)
    store.record |= {
        "network": name,
        "test_samples": network.test_samples,
        "versions": {
            "Python": platform.python_version(),
            **{package: version(package) for package in ("torch", subject.library)},
            "vbpfx": vbpfx.__version__,
        },
        "machine": describe_machine(),
    }
    for size in dict.fromkeys(size for *_, size in pending):
        study = Study(network, subject.kind, size)
        store.record["dense"] = _dense(network, study, dense)
        for method, ratio, _ in (key for key in pending if key[2] == size):
            result = {
                "method": method,
                "ratio": ratio,
                "calibration": size,
                "command": _command(name, options),
                "stamp": stamp(method),
            }
            store.put(result | _measured(network, study, method, ratio, dense))
            console.print(f"{name}, {method}, p = {ratio:g}, {size} samples: {_told(store, (method, ratio, size))}")
    return None


def _settled(store: Store, key: Key, resume: bool) -> bool:
    found = store.find(key)
    return found is not None and (resume or found["stamp"] == stamp(key[0]))


def _dense(network: Network, study: Study, output: Any) -> dict[str, Any]:
    """Return the figures of the dense network on the test samples."""
    measured = network.judge(output, output)
    analysis = study.analysis
    score = measured.figures.get("top1", measured.figures.get("recall"))
    return {
        "score": score,
        "neurons": analysis.neurons,
        "blocks": len(analysis.blocks),
        "params": sum(p.numel() for p in analysis.captured.graph_module.parameters()),
        "macs": sum(analysis.captured.macs.values()),
        "values": pack(measured.values),
    }


def _measured(network: Network, study: Study, method: str, ratio: float, dense: Any) -> Result:
    """Return the figures of one pruned network, or why there is none."""
    try:
        outcome = study.prune(METHODS[method], ratio)
    except vbpfx.BudgetError as error:
        return {"impossible": str(error)}
    report, judged = outcome.report, network.judge(dense, network.output(outcome.network))
    assert report.verification is not None
    return {
        "figures": judged.figures,
        "neurons": report.neurons[1],
        "params": report.params[1],
        "macs": report.macs[1],
        "widths": {block: after for block, (_, after) in report.widths.items()},
        "oracle_error": report.verification.error,
        "cost": outcome.seconds / study.forward_seconds,
        "values": pack(judged.values),
    }


def _told(store: Store, key: Key) -> str:
    result = store.find(key)
    assert result is not None
    if "impossible" in result:
        return f"impossible ({result['impossible']})"
    figures = ", ".join(f"{name} {value:.4f}" for name, value in result["figures"].items())
    return f"{figures}; cost {result['cost']:.1f}x"


def _separated(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def comma_separated(text: str) -> list[Any]:
        return list(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return comma_separated


def _of(table: Sequence[str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in table:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose from {', '.join(table)}")
        return text

    return name


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _at_least(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    def integer(text: str) -> int:
        number = int(text)
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not at least {lowest}")
        return number

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/retention.py",
        description="What trained networks keep when they are pruned without retraining, method against method.",
    )
    add = parser.add_argument
    networks, methods = list(NETWORKS), list(METHODS)
    add("--networks", type=_separated(_of(networks)), default=networks, help=f"of {', '.join(networks)}; default all")
    add("--methods", type=_separated(_of(methods)), default=methods, help=f"of {', '.join(methods)}; default all")
    add("--ratios", type=_separated(_ratio), help="shares to remove; default those of each network")
    add("--calibration", type=_at_least(8), help="number of calibration samples; default that of each network")
    add(
        "--calibration-sizes",
        type=_separated(_at_least(8)),
        default=[],
        metavar="N,N,...",
        help=f"also measure {' and '.join(SWEEP_METHODS)} at p = {SWEEP_RATIO:g} with these numbers of calibration samples",
    )
    add("--test", type=_at_least(8), help="test samples at most, for a trial; default all")
    add("--threads", type=_at_least(1), help="default: torch's choice")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--resume", action="store_true", help="keep existing results even if the code has changed")
    known.add_argument("--again", action="store_true", help="repeat measurements that have results")
    add("--page", action="store_true", help="measure nothing; write the page from the files that are there")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON files; default benchmarks/results")
    add("--docs", type=Path, default=PAGE.parent, help="folder of results.md and figures/; default docs")
    return parser


def _command(name: str, options: argparse.Namespace) -> str:
    """Return the command that repeats the measurement, with the options that differ from their defaults and matter."""
    words = ["--networks", name]
    lists = {"methods": options.methods if options.methods != list(METHODS) else None, "ratios": options.ratios}
    for option, values in {**lists, "calibration-sizes": options.calibration_sizes}.items():
        if values:
            words += [f"--{option}", ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    for option in ("calibration", "test"):
        if (count := getattr(options, option)) is not None:
            words += [f"--{option}", str(count)]
    return shlex.join(["python", "benchmarks/retention.py", *words])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in options.networks if not options.page else ():
        reason = measure(name, options, console)
        if reason is not None:
            print(f"{name}: not measured: {reason}")
    records = {name: Store(options.out / f"retention-{name}.json").record for name in NETWORKS}
    records = {name: record for name, record in records.items() if record["results"]}
    if not records:
        print(f"nothing measured: there is no retention-*.json in {options.out}")
        return 0
    write_page(records, options.docs)
    print(f"written: the section on retention in {options.docs / 'results.md'} ({', '.join(records)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
