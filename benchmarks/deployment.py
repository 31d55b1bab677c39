"""Compare dense and pruned networks in the deployment runtimes: latency, parity and efficiency.

``python benchmarks/deployment.py`` measures every network in every runtime at p = 0.5, each in a process of its own, and
writes every result to ``results/deployment.json`` at once. Existing results are not measured again without ``--again``.
Neurons are removed by variance, the same share of every block, from a few random inputs: the latency does not depend on
which neurons are removed. Times are processor time on one thread, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from deployment_networks import NETWORKS
from own_process import in_a_process
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.runtimes.adapters import NAMES
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "deployment.json"


# It does not matter here which neurons are removed. ``method="auto"`` is given for its default rounding of widths.
_WIDTHS = {"method": "auto", "criterion": "variance", "allocation": "equal", "compensation": "mean", "min_width": 1}


def _measure(
    network: str, runtimes: Sequence[str], ratio: float, round_to: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Return one row for each runtime. Call this in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = NETWORKS[network]()
    pruned = vbpfx.prune(
        model,
        [(inputs.args, inputs.kwargs)],
        ratio=ratio,
        **_WIDTHS,
        round_to=round_to or None,
        progress=False,
    )
    result = vbpfx.bench(
        model,
        pruned.graph_module,
        (inputs.args, inputs.kwargs),
        runtimes=runtimes,
        batches=[batch],
        rounds=rounds,
        memory=False,
        clock=time.process_time,
    )
    found = result.to_json()
    about = {
        "network": network,
        "ratio": ratio,
        "round_to": round_to,
        "macs": found["macs"],
        "rounds": rounds,
        "versions": found["versions"] | {"torch": torch.__version__},
        "machine": machine_line(),
    }
    return [about | row for row in found["rows"]]


def _measured(
    network: str, runtimes: Sequence[str], ratio: float, round_to: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows; if the process failed, they say how."""
    try:
        return in_a_process(_measure, network, runtimes, ratio, round_to, batch, rounds)
    except BrokenProcessPool:
        crash = "the process died without a message"
    except vbpfx.VbpfxError as error:
        crash = f"{type(error).__name__}: {error}"
    given = {"network": network, "ratio": ratio, "round_to": round_to, "batch": batch, "rounds": rounds}
    return [given | {"runtime": name, "crash": crash} for name in runtimes]


def _together(names: Sequence[str]) -> list[list[str]]:
    """Group the runtimes by process: those that take ONNX files share one and its exported files."""
    files = [name for name in names if name in ("onnxruntime", "openvino")]
    return [group for group in (files, *([name] for name in names if name not in files)) if group]


def _command(row: dict[str, Any]) -> str:
    """Return the command that measures this row."""
    words = ["python", "benchmarks/deployment.py", row["network"], "--runtime", row["runtime"]]
    for option in ("ratio", "round-to", "batch", "rounds"):
        words += [f"--{option}", str(row[option.replace("-", "_")])]
    return shlex.join([*words, "--again"])


def _spread(value: dict[str, float] | None, digits: int = 2) -> str:
    if value is None:
        return "failed"
    return f"{value['median']:.{digits}f} ({value['lower']:.{digits}f}-{value['upper']:.{digits}f})"


def _line(row: dict[str, Any]) -> list[str]:
    rounded = {0: " by default", 1: ""}.get(row["round_to"], f" to {row['round_to']}")
    start = [row["network"], row["runtime"], f"{row['ratio']:.0%}{rounded}"]
    if row.get("speedup") is None:
        return [*start, *["failed"] * 4, "-"]
    dense, pruned = row["dense"], row["pruned"]
    sizes = [side["size"] for side in (dense, pruned)]
    return [
        *start,
        f"{dense['seconds']['median'] * 1e3:.1f} -> {pruned['seconds']['median'] * 1e3:.1f}",
        _spread(row["speedup"]),
        f"{row['efficiency']:.2f}",
        f"{dense['parity']:.0e}, {pruned['parity']:.0e}",
        "-" if None in sizes else f"{sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f}",
    ]


def _failures(rows: Sequence[dict[str, Any]]) -> str:
    """Return the failures, dense beside pruned: a failure of both is the runtime's own."""
    lines = []
    for row in rows:
        if row.get("speedup") is not None:
            continue
        said = {"both": row["crash"]} if "crash" in row else {
            side: row[side]["failure"] or "runs" for side in ("dense", "pruned")
        }  # fmt: skip
        lines.append(f"- {row['network']} in {row['runtime']}: " + "; ".join(f"*{k}*: `{v}`" for k, v in said.items()))
    return "\n".join(["", "What failed:", "", *lines, ""]) if lines else ""


def _missing(rows: Sequence[dict[str, Any]]) -> str:
    """Return the combinations of network and runtime that have no row at p = 0.5."""
    there = {(row["network"], row["runtime"]) for row in rows if row["ratio"] == 0.5}
    lines = []
    for name in NAMES:
        absent = [network for network in NETWORKS if (network, name) not in there]
        if absent:
            lines.append(f"- {name}: {'all' if len(absent) == len(NETWORKS) else '; '.join(absent)}")
    return "\n".join(["", "Not measured at p = 50%:", "", *lines, ""]) if lines else ""


def write_page(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Write the section on deployment into the page."""
    order = {name: place for place, name in enumerate(NETWORKS)}
    rows = sorted(
        results.values(),
        key=lambda r: (order.get(r["network"], 0), r["runtime"] != "pytorch", r["runtime"], r["ratio"]),
    )
    columns = ("network", "runtime", "p", "ms", "speed-up", "efficiency", "parity", "MB")
    machines = sorted({row["machine"] for row in rows if "machine" in row})
    versions = sorted({f"{name} {version}" for row in rows for name, version in row.get("versions", {}).items()})
    text = f"""## Speed-up and parity per runtime

`python benchmarks/deployment.py`; each row's own command is in `benchmarks/results/deployment.json`.

The column *ms* is the processor time per call, on one thread with a batch of one. The dense and the pruned network are measured
in turn. Times and speed-ups are medians, and the brackets show the quartiles of the speed-up. *Efficiency* is the speed-up
divided by the ratio of MACs. *Parity* is the largest difference from PyTorch divided by the largest output, first for the dense
network, then for the pruned one. All weights are random except those of MiniLM: speed does not depend on them. Widths are not
rounded unless the table says so. *By default* means rounded as `vbpfx.prune` rounds: convolutions to multiples of 8, and
nothing else.

{markdown_table(columns, [_line(row) for row in rows])}
{_failures(rows)}{_missing(rows)}
{"  ".join(machines)} {", ".join(versions)}.
"""
    write_section(page, "deployment", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/deployment.py", description="Dense against pruned in the runtimes."
    )
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}; default all")
    add("--runtime", action="append", choices=NAMES, help="once for each; default all")
    add("--ratio", action="append", type=float, help="share of the hidden neurons to remove; default 0.5")
    add("--round-to", type=int, default=1, help="multiples of widths, 0 for prune()'s own; default %(default)s")
    add("--batch", type=int, default=1, help="default %(default)s")
    add("--rounds", type=int, default=21, help="default %(default)s")
    add("--again", action="store_true", help="measure what is there, too")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/deployment.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of deployment.md; default docs")
    options = parser.parse_args(argv)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(NETWORKS)}")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for group in () if options.page else _together(options.runtime or NAMES):
        for network in options.networks:
            for ratio in options.ratio or [0.5]:
                keys = {n: f"{network}/{n}/{ratio:g}/{options.round_to}/{options.batch}" for n in group}
                missing = [name for name, key in keys.items() if options.again or key not in results]
                if not missing:
                    continue
                for row in _measured(network, missing, ratio, options.round_to, options.batch, options.rounds):
                    results[keys[row["runtime"]]] = row | {"command": _command(row)}
                    print(", ".join(_line(row)), flush=True)
                write_atomically({options.out: json_writer(results)})
    write_page(results, options.docs / "deployment.md")
    print(f"written: {options.docs / 'deployment.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
