"""Ranks: what a run on many processes asks of ``torch.distributed``.

Ranks work on their own and *meet* before every exchange, in the key-value store of the process group. Who waits there learns
within seconds that another one has failed, and within a minute that it has died or gone elsewhere, whatever the backend
does in such a case. Tensors are exchanged when all have come, by one collective, the sum.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from vbpfx.errors import CalibrationError, RankError, first_line

if TYPE_CHECKING:  # some builds of torch are without
    from torch._C._distributed_c10d import Store

Sharing = Literal["share", "own", "alone"]
P = ParamSpec("P")
R = TypeVar("R")

# Seconds: between signs of life; without one until a rank counts as dead; until all have begun; for a file to be written; that
# rank 0, in whose process the store often lives, waits for the others to hear a last word.
BEAT, SILENCE, ARRIVAL, WRITING, GRACE = 1.0, 60.0, 600.0, 600.0, 5.0
_LONGEST_PAUSE = 0.02
_runs = itertools.count()


class Ranks:
    """This process and those that work with it; made by :func:`join`, or alone.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
        own: whether every rank was given data of its own, rather than all the same.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, own: bool = False, store: Store | None = None) -> None:
        self.rank, self.count, self.own, self._store = rank, count, own, store
        self._meetings = self._files = 0
        self._pace: dict[int, tuple[bytes, float]] = {}

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows things."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether a batch of the data, counted from 0, is this rank's."""
        return self.own or number % self.count == self.rank

    def share_of(self, number: int) -> int:
        """How many of so many batches are this rank's."""
        return number if self.own else len(range(self.rank, number, self.count))

    def require_whole(self, data: object) -> None:
        """Raise a CalibrationError for data that is divided already and would be divided again."""
        divides = self.count > 1 and not self.own
        if divides and isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler):
            raise CalibrationError(
                "the loader's DistributedSampler gives every process its share of the data, of which a share would be taken "
                "again; pass the loader without it, or ranks='own'"
            )

    def watch(self) -> None:
        """Raise a RankError if another rank has failed."""
        if self._store is not None:
            with _reaching():
                failed = self._store.check(["failed"])
            if failed:
                rank, message = json.loads(self._store.get("failed"))
                self._hear("failed")
                raise RankError(f"rank {rank} failed: {message}")

    def meet(self, place: str, value: str = "") -> None:
        """Wait until all ranks are here, with the same value.

        Raises:
            RankError: one has failed, gives no sign of life, is elsewhere, or has another value.
        """
        if self._store is None:
            return
        self._meetings += 1
        keys = [f"{self._meetings}/{rank}" for rank in range(self.count)]
        with _reaching():
            self._store.set(keys[self.rank], json.dumps([place, value]))
        self._wait(keys)
        for rank, key in enumerate(keys):
            theirs = json.loads(self._store.get(key))
            if theirs[0] != place:
                raise RankError(f"rank {rank} is at {theirs[0]!r}, rank {self.rank} at {place!r}: all must do the same")
            if theirs[1] != value:
                raise RankError(
                    f"rank {rank} has another {place} than rank {self.rank}; pass the same model, options and data to all"
                )

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor summed over the ranks, bit for bit the same on all of them; shapes are the same everywhere."""
        if self._store is None:
            return list(tensors)
        self.meet("shapes", str([tuple(tensor.shape) for tensor in tensors]))
        summed = []
        for tensor in tensors:
            there = tensor.detach().to(_exchange_device(), copy=True).contiguous()
            with _reaching():
                dist.all_reduce(there)
            summed.append(there.to(tensor.device))
        return summed

    def sums(self, values: Sequence[float]) -> list[float]:
        """Every number summed over the ranks."""
        if self._store is None:
            return list(values)
        return list(self.sum([torch.tensor(values, dtype=torch.float64)])[0].tolist())

    def gather(self, values: Tensor) -> Tensor:
        """What the ranks have, one behind the other along the last axis, on the CPU; all other axes are the same everywhere."""
        if self._store is None:
            return values.cpu()
        lengths = [int(n) for n in self.sums([float(values.shape[-1] * (r == self.rank)) for r in range(self.count)])]
        joined = torch.zeros(*values.shape[:-1], sum(lengths), dtype=values.dtype)
        joined.narrow(-1, sum(lengths[: self.rank]), lengths[self.rank]).copy_(values)
        return self.sum([joined])[0]

    def of_lowest(self, tensors: Sequence[Tensor] | None, shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        """The tensors of the lowest rank that has any, float64; None where none has."""
        if self._store is None:
            return None if tensors is None else [tensor.double() for tensor in tensors]
        have = self.sums([float(tensors is not None and rank == self.rank) for rank in range(self.count)])
        if not any(have):
            return None
        mine = tensors is not None and have.index(1.0) == self.rank
        own = [t.double() for t in tensors or ()] if mine else [torch.zeros(s, dtype=torch.float64) for s in shapes]
        return self.sum(own)

    def of_first(self, make: Callable[[], R]) -> R:
        """What rank 0 makes, while the others wait."""
        if self._store is None:
            return make()
        made: list[Any] = [make() if self.first else None]
        self.meet("what rank 0 makes")
        with _reaching():
            dist.broadcast_object_list(made, src=0, device=_exchange_device())
        return made[0]  # type: ignore[no-any-return]

    def write(self, write: Callable[[], R], result: R) -> R:
        """What rank 0 writes, once; a rank above it waits until that is done, and returns ``result``.

        Rank 0 waits a few seconds for the others to know, and may be the only one to write.

        Raises:
            RankError: rank 0 could not write, or did not.
        """
        if self._store is None:
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
                self._say(key, message)
            return result
        begun = time.monotonic()
        while not self._is_there([key]):
            if time.monotonic() - begun > WRITING:
                raise RankError(f"rank 0 has not written {result} within {WRITING:g} s; save on rank 0, too")
            time.sleep(_LONGEST_PAUSE)
        with _reaching():
            message = self._store.get(key).decode()
        self._hear(key)
        if message:
            raise RankError(f"rank 0 could not write {result}: {message}")
        return result

    def _fail(self, error: BaseException) -> None:
        """Tell the others."""
        if self._store is not None and not isinstance(error, RankError):
            self._say("failed", json.dumps([self.rank, f"{type(error).__name__}: {first_line(error)}"]))

    def _say(self, key: str, message: str) -> None:
        """A word to the others, before this process may end; whoever is not there does without."""
        assert self._store is not None
        others = [f"{key}/heard by {rank}" for rank in range(self.count) if rank != self.rank]
        until = time.monotonic() + GRACE
        with suppress(RuntimeError):  # nobody is left to tell
            self._store.set(key, message)
            while self.first and not self._store.check(others) and time.monotonic() < until:
                time.sleep(_LONGEST_PAUSE)

    def _hear(self, key: str) -> None:
        """Say that a word was heard."""
        assert self._store is not None
        with suppress(RuntimeError):
            self._store.set(f"{key}/heard by {self.rank}", "")

    def _part(self) -> None:
        """The end of the run, for all at once: rank 0 goes last."""
        self.meet("end")
        if self._store is not None and self.first:
            self._wait([f"end/heard by {rank}" if rank else f"{self._meetings}/0" for rank in range(self.count)])
        elif self._store is not None:
            self._hear("end")

    def _beat(self, stop: threading.Event) -> None:
        """Signs of life, until stopped."""
        assert self._store is not None
        for number in itertools.count():
            try:
                self._store.set(f"beat/{self.rank}", str(number))
            except RuntimeError:  # the store is gone; who waits says so
                return
            if stop.wait(BEAT):
                return

    def _is_there(self, keys: list[str]) -> bool:
        assert self._store is not None
        with _reaching():
            return bool(self._store.check(keys))

    def _wait(self, keys: list[str]) -> None:
        """Wait for one key of every rank."""
        assert self._store is not None
        begun = time.monotonic()
        self._pace = dict.fromkeys(range(self.count), (b"", begun))
        pause = _LONGEST_PAUSE / 64
        while not self._is_there(keys):
            self.watch()
            now = time.monotonic()
            for rank, key in enumerate(keys):
                if not self._is_there([key]):
                    self._require_life(rank, now)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _require_life(self, rank: int, now: float) -> None:
        assert self._store is not None
        beat = self._store.get(f"beat/{rank}") if self._is_there([f"beat/{rank}"]) else b""
        last, since = self._pace[rank]
        if beat != last:
            self._pace[rank] = (beat, now)
        elif not beat and now - since > ARRIVAL:
            raise RankError(
                f"rank {rank} has not come within {ARRIVAL:g} s; call this on every rank, or pass ranks='alone'"
            )
        elif beat and now - since > SILENCE:
            raise RankError(
                f"rank {rank} has given no sign of life for {SILENCE:g} s: it was killed, or its machine is gone"
            )


ALONE = Ranks()


@contextmanager
def join(sharing: Sharing | Ranks) -> Iterator[Ranks]:
    """The ranks of ``torch.distributed``'s default group, if it is initialised, until the end of a run; otherwise one alone.

    An error here is told to the others, which end with a RankError. All end together.

    Args:
        sharing: ``"share"``: all were given the same data, of which every rank takes its share; ``"own"``: every rank was
            given its own; ``"alone"``: this process works alone. Ranks that have been joined stay so.

    Raises:
        RankError: another rank has failed, died, or does something else.
        CalibrationError: there is no such ``sharing``.
    """
    if isinstance(sharing, Ranks):
        yield sharing
        return
    if sharing not in ("share", "own", "alone"):
        raise CalibrationError(f"ranks={sharing!r} is unknown; use 'share', 'own' or 'alone'")
    if sharing == "alone" or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield ALONE
        return
    from torch._C._distributed_c10d import PrefixStore  # once it is known to be there

    store = PrefixStore(f"vbpfx/{next(_runs)}", dist.distributed_c10d._get_default_store())
    ranks, stop = Ranks(dist.get_rank(), dist.get_world_size(), own=sharing == "own", store=store), threading.Event()
    beating = threading.Thread(target=ranks._beat, args=(stop,), daemon=True, name="vbpfx: signs of life")
    beating.start()
    try:
        ranks.meet("sharing", sharing)
        yield ranks
        ranks._part()
    except BaseException as error:
        ranks._fail(error)
        raise
    finally:
        stop.set()
        beating.join(BEAT)


def joining(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose argument ``ranks`` says which ranks it :func:`join`\\ s; it is given the :class:`Ranks`."""

    @functools.wraps(function)
    def joined(*args: P.args, **kwargs: P.kwargs) -> R:
        sharing: Any = kwargs.pop("ranks", "share")
        with join(sharing) as ranks:
            kwargs["ranks"] = ranks
            return function(*args, **kwargs)

    return joined


def _exchange_device() -> torch.device:
    """Where the backend takes tensors from."""
    takes_cpu = "cpu" in str(dist.get_backend_config())
    return torch.device("cpu") if takes_cpu else torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _reaching() -> Iterator[None]:
    """An error of torch.distributed in a line that says what it means."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"another rank cannot be reached ({first_line(error)}): it, or the process that holds the store (rank 0, or "
            f"torchrun), has ended"
        ) from error
