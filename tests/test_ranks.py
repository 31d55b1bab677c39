"""Calibration on many processes."""

from __future__ import annotations

import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import ranks_jobs
import torch

import vbpfx

# Each starts as a copy of one process that has imported everything.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["vbpfx"])  # and torch with it


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(job: str, count: int, folder: Path, **options: Any) -> list[int | None]:
    """Run a job on so many processes; their exit codes."""
    port = _free_port()
    ranks = [
        _FORKS.Process(target=ranks_jobs.run_rank, args=(job, rank, count, port, folder, options))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]

