"""Join the processes that ``torchrun`` has started, and report an error of one of them once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from vbpfx.cli.conventions import INTERRUPTED, reason, say

if TYPE_CHECKING:
    from vbpfx.distributed.ranks import Ranks


@contextmanager
def among_ranks(device: str, debug: bool) -> Iterator[Ranks]:
    """Yield the ranks of this run if ``torchrun`` started it, otherwise this process as the only rank.

    An error of one process is printed once, by that process, and ends all of them.

    Args:
        device: the device of the model. The processes use NCCL on ``cuda``, and gloo elsewhere.
        debug: raise errors with their traceback instead.
    """
    from vbpfx.distributed.ranks import ALONE, join

    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    from vbpfx.errors import RankError, first_line

    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the processes cannot meet: {first_line(error)}; start them by torchrun") from error
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    try:
        with join("share") as ranks:
            try:
                yield ranks
            except BaseException as error:  # printed here, before the other processes learn of it
                if not debug and store.add("vbpfx/said", 1) == 1:
                    say(f"rank {rank}: {reason(error)}")
                raise
    except BaseException as error:
        if debug:
            raise
        raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from error
    finally:
        dist.destroy_process_group()
