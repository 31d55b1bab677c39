"""Measure how much a second process speeds up calibration.

``python benchmarks/processes.py`` starts two processes of one thread each. Every round has four measurements on the same images:

- the first process calibrates alone, while the second waits;
- both calibrate together: :func:`vbpfx.calibrate` under ``torch.distributed`` (gloo) divides the work and merges the statistics;
- the first process runs plain forward passes over all images alone;
- both do so at the same time, which shows what a second process gains on this machine at best.

Times are wall-clock time, and the results are medians over rounds. A process's processor time divided by its wall-clock time
says how much of a core it had. Below 0.9 other programs disturbed the run, and nothing is recorded. What can still be read
then is the processor time of the single process divided by that of the busier one of two: it shows how evenly the work is
divided, and what merging adds. Weights and images are random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "processes.json"
PERFORMANCE = PAGE.parent / "performance.md"
PROCESSES = 2
# The share of a core that a process needs to have had for its wall-clock time to count.
OWN_CORE = 0.9
WAYS = ("alone", "together", "forward alone", "forward together")


def _clocked(job: Callable[[], object]) -> tuple[float, float, float]:
    """Run a job in all processes; return wall-clock seconds, the share of a core, and processor seconds.

    Wall-clock seconds go from a common start to the end of the last process. The share of a core is that of this process until
    its own end. Processor seconds are those of the process that took most.
    """
    dist.barrier()
    wall, own = time.perf_counter(), time.process_time()
    job()
    own = time.process_time() - own
    share = own / (time.perf_counter() - wall)
    dist.barrier()
    seconds, most = time.perf_counter() - wall, torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return seconds, share, float(most)


def _measure(
    rank: int, port: int, name: str, images: int, at_once: int, rounds: int, covariance: bool, found: Any
) -> None:
    """Measure in one process; the first process passes the results on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    model = timm.create_model(name).eval()
    batches = torch.randn(images, *model.pretrained_cfg["input_size"]).split(at_once)
    analysis = vbpfx.find_blocks(vbpfx.capture(model, batches[0][:4]))

    def calibrate(ranks: Any) -> None:
        observed = vbpfx.prepare(analysis.captured, analysis, covariance=covariance)
        vbpfx.calibrate(observed, batches, ranks=ranks)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    jobs: dict[str, Callable[[], object]] = {
        "alone": lambda: calibrate("alone") if rank == 0 else None,
        "together": lambda: calibrate("share"),
        "forward alone": lambda: forward() if rank == 0 else None,
        "forward together": forward,
    }
    for batch in batches[:1]:
        model(batch)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            taken, share, own = _clocked(jobs[way])
            seconds[way].append(taken)
            shares[way].append(share)
            processor[way].append(own)
    if rank == 0:
        found.put({"seconds": seconds, "shares": shares, "processor": processor})
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, images: int, at_once: int, rounds: int, covariance: bool) -> dict[str, Any]:
    """Return the seconds of every way and round, and the ratios of their medians."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = multiprocessing.get_context("spawn")
    found = start.Queue()
    given = (port, name, images, at_once, rounds, covariance, found)
    workers = [start.Process(target=_measure, args=(rank, *given)) for rank in range(PROCESSES)]
    for worker in workers:
        worker.start()
    measured: dict[str, Any] = found.get()
    for worker in workers:
        worker.join()
    medians = {way: statistics.median(taken) for way, taken in measured["seconds"].items()}
    own = {way: statistics.median(taken) for way, taken in measured["processor"].items()}
    return measured | {
        "processor_speedup": own["alone"] / own["together"],
        "images": images,
        "speedup": medians["alone"] / medians["together"],
        "machine": PROCESSES * medians["forward alone"] / medians["forward together"],
        "core": min(statistics.median(shares) for shares in measured["shares"].values()),
        "images_per_second": {way: images / medians[way] for way in ("alone", "together")},
    }


def write_page(results: dict[str, Any], page: Path) -> None:
    """Write the section on processes into the page."""
    rows = [
        [
            name,
            f"{found['images']:,}",
            str(len(found["seconds"]["alone"])),
            f"{found['images_per_second']['alone']:.1f}",
            f"{found['images_per_second']['together']:.1f}",
            f"{found['speedup']:.2f}x",
            f"{found['machine']:.2f}x",
            f"{found['processor_speedup']:.2f}x",
        ]
        for name, found in results.items()
    ]
    columns = (
        "network",
        "images",
        "rounds",
        "one process, images/s",
        "two, images/s",
        "calibration",
        "the machine",
        "processor time",
    )
    commands = "  \n".join(f"`{found['command']}`" for found in results.values())
    text = f"""## Calibration on two processes

{commands}

Wall-clock time of the same calibration by one process of one thread and by two, medians over rounds. *The machine*: what two processes get
done that know nothing of each other, plain forward passes at the same time, over what one does. *Processor time*: of one process
over that of the busier one of two.

{markdown_table(columns, rows)}

{machine_line()}
"""
    write_section(page, "processes", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 1 if the machine was too busy to measure."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/processes.py", description="What a second process brings to calibration."
    )
    add = parser.add_argument
    add("network", nargs="?", default="deit_small_patch16_224", help="of timm; default %(default)s")
    add("--images", type=int, default=160, help="default %(default)s")
    add("--batch", type=int, default=20, help="images at once; default %(default)s")
    add("--rounds", type=int, default=5, help="default %(default)s")
    add("--covariance", action="store_true", help="covariances, too")
    add("--busy", action="store_true", help="record figures of a busy machine, too")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/processes.json")
    add("--docs", type=Path, default=PERFORMANCE.parent, help="folder of performance.md; default docs")
    options = parser.parse_args(argv)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.page:
        found = measure(options.network, options.images, options.batch, options.rounds, options.covariance)
        per_second = found["images_per_second"]
        print(
            f"{options.network}: {per_second['alone']:.2f} images/s by one process, {per_second['together']:.2f} by two, "
            f"{found['speedup']:.2f}x; the machine {found['machine']:.2f}x; share of a core {found['core']:.2f}; "
            f"{found['processor_speedup']:.2f}x by processor time",
            flush=True,
        )
        if found["core"] < OWN_CORE and not options.busy:
            print(f"not recorded: a process had less than {OWN_CORE:.0%} of its core; run again on a machine at rest")
            return 1
        words = ["python", "benchmarks/processes.py", options.network]
        for option in ("images", "batch", "rounds"):
            words += [f"--{option}", str(getattr(options, option))]
        name = f"{options.network}, covariances" if options.covariance else options.network
        words += ["--covariance"] if options.covariance else []
        results[name] = found | {"command": shlex.join(words)}
        write_atomically({options.out: json_writer(results)})
    if results:
        write_page(results, options.docs / PERFORMANCE.name)
        print(f"written: the section on processes in {options.docs / PERFORMANCE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
