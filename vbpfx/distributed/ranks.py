"""Ranks: everything that a run on several processes needs from ``torch.distributed``.

Ranks work independently, and meet before every exchange of tensors (:mod:`vbpfx.distributed.meeting`). When all have
arrived, tensors are exchanged by a single kind of collective, the sum.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from vbpfx.distributed.meeting import PAUSE, Meeting, reaching
from vbpfx.errors import CalibrationError, RankError, first_line

Sharing = Literal["share", "own", "alone"]
P = ParamSpec("P")
R = TypeVar("R")

WRITING = 600.0  # seconds that the other ranks wait until rank 0 has written a file
_runs = itertools.count()


class Ranks:
    """This process and the processes that it works with. :func:`join` returns it; :data:`ALONE` is a single process.

    Attributes:
        rank: the number of this process, from 0.
        count: the number of processes.
        own: whether every rank was given data of its own; otherwise all were given the same data.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, own: bool = False, meeting: Meeting | None = None) -> None:
        self.rank, self.count, self.own, self._meeting, self._files = rank, count, own, meeting, 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes files and shows progress."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Return whether this rank runs the batch with this number, counted from 0."""
        return self.own or number % self.count == self.rank

    def share_of(self, number: int) -> int:
        """Return how many of ``number`` batches this rank runs."""
        return number if self.own else len(range(self.rank, number, self.count))

    def require_whole(self, data: object) -> None:
        """Raise a CalibrationError if the data is divided between the ranks already, and would be divided again."""
        divides = self.count > 1 and not self.own
        if divides and isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler):
            raise CalibrationError(
                "the loader's DistributedSampler gives every process its share of the data, of which a share would be taken "
                "again; pass the loader without it, or ranks='own'"
            )

    def watch(self) -> None:
        """Raise a RankError if another rank has failed."""
        if self._meeting is not None:
            self._meeting.watch()

    def meet(self, place: str, value: str) -> None:
        """Wait until all ranks have come here with the same value.

        Raises:
            RankError: a rank has failed or died, or has another value.
        """
        if self._meeting is not None:
            self._meeting.meet(place, value)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of every tensor over the ranks, bit for bit the same on all ranks.

        All ranks must pass tensors of the same shapes.
        """
        if self._meeting is None:
            return list(tensors)
        self._meeting.meet("shapes", str([tuple(tensor.shape) for tensor in tensors]))
        summed = []
        for tensor in tensors:
            there = tensor.detach().to(_exchange_device(), copy=True).contiguous()
            with reaching():
                dist.all_reduce(there)
            summed.append(there.to(tensor.device))
        return summed

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of every number over the ranks."""
        if self._meeting is None:
            return list(values)
        return list(self.sum([torch.tensor(values, dtype=torch.float64)])[0].tolist())

    def gather(self, values: Tensor) -> Tensor:
        """Return the ranks' tensors, concatenated along the last axis, on the CPU; all other sizes must be equal."""
        if self._meeting is None:
            return values.cpu()
        lengths = [int(n) for n in self.sums([float(values.shape[-1] * (r == self.rank)) for r in range(self.count)])]
        joined = torch.zeros(*values.shape[:-1], sum(lengths), dtype=values.dtype)
        joined.narrow(-1, sum(lengths[: self.rank]), lengths[self.rank]).copy_(values)
        return self.sum([joined])[0]

    def of_lowest(self, tensors: Sequence[Tensor] | None, shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        """Return the tensors of the lowest rank that has any, as float64; None if no rank has any."""
        if self._meeting is None:
            return None if tensors is None else [tensor.double() for tensor in tensors]
        have = self.sums([float(tensors is not None and rank == self.rank) for rank in range(self.count)])
        if not any(have):
            return None
        mine = tensors is not None and have.index(1.0) == self.rank
        own = [t.double() for t in tensors or ()] if mine else [torch.zeros(s, dtype=torch.float64) for s in shapes]
        return self.sum(own)

    def of_first(self, make: Callable[[], R]) -> R:
        """Return what ``make`` returns on rank 0, on all ranks; the others wait for it."""
        if self._meeting is None:
            return make()
        made: list[Any] = [make() if self.first else None]
        self._meeting.meet("what rank 0 makes")
        with reaching():
            dist.broadcast_object_list(made, src=0, device=_exchange_device())
        return made[0]  # type: ignore[no-any-return]

    def write(self, write: Callable[[], R], result: R) -> R:
        """Call ``write`` on rank 0 alone and return its result; the other ranks wait for it and return ``result``.

        Rank 0 waits a few seconds for the others to notice. It is allowed that only rank 0 calls this.

        Raises:
            RankError: rank 0 could not write, or has not written in time.
        """
        if self._meeting is None:
            return write()
        self._files += 1
        key = f"written/{self._files}"
        if self.first:
            message = "interrupted"
            try:
                result = write()
                message = ""
            except Exception as error:
                message = first_line(error)
                raise
            finally:
                self._meeting.say(key, message)
            return result
        begun = time.monotonic()
        while not self._meeting.is_there(key):
            if time.monotonic() - begun > WRITING:
                raise RankError(f"rank 0 has not written {result} within {WRITING:g} s; save on rank 0, too")
            time.sleep(PAUSE)
        message = self._meeting.read(key)
        self._meeting.hear(key)
        if message:
            raise RankError(f"rank 0 could not write {result}: {message}")
        return result


ALONE = Ranks()


@contextmanager
def join(sharing: Sharing | Ranks) -> Iterator[Ranks]:
    """Work together with the other ranks while the context is open. Yield the :class:`Ranks`.

    These are the ranks of ``torch.distributed``'s default group, if it is initialised; otherwise this process alone. If
    an error leaves the context, the other ranks end with a RankError. All ranks leave together.

    Args:
        sharing: ``"share"`` if all ranks were given the same data, of which each runs its share; ``"own"`` if every
            rank was given data of its own; ``"alone"`` if this process works alone. :class:`Ranks` that are joined
            already are yielded as they are.

    Raises:
        RankError: another rank has failed, died, or does something else.
        CalibrationError: ``sharing`` is unknown.
    """
    if isinstance(sharing, Ranks):
        yield sharing
        return
    if sharing not in ("share", "own", "alone"):
        raise CalibrationError(f"ranks={sharing!r} is unknown; use 'share', 'own' or 'alone'")
    if sharing == "alone" or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield ALONE
        return
    from torch._C._distributed_c10d import PrefixStore  # not at the top: some builds of torch do not have it

    store = PrefixStore(f"vbpfx/{next(_runs)}", dist.distributed_c10d._get_default_store())
    meeting = Meeting(dist.get_rank(), dist.get_world_size(), store)
    with meeting.joined():
        meeting.meet("sharing", sharing)
        yield Ranks(meeting.rank, meeting.count, own=sharing == "own", meeting=meeting)


def joining(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that has an argument ``ranks``, so that it runs inside of :func:`join`.

    The caller passes ``ranks`` as ``sharing`` of :func:`join`; the function gets the :class:`Ranks`.
    """

    @functools.wraps(function)
    def joined(*args: P.args, **kwargs: P.kwargs) -> R:
        sharing: Any = kwargs.pop("ranks", "share")
        with join(sharing) as ranks:
            kwargs["ranks"] = ranks
            return function(*args, **kwargs)

    return joined


def _exchange_device() -> torch.device:
    """Return the device on which the backend needs tensors to be."""
    takes_cpu = "cpu" in str(dist.get_backend_config())
    return torch.device("cpu") if takes_cpu else torch.device("cuda", torch.cuda.current_device())
