"""Meetings: points where processes wait for each other, by means of the key-value store of their process group.

A waiting process learns within seconds that another one has failed, and within a minute that another one has died. It
also learns if another one waits at a different meeting. This works whatever the backend does in such cases.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vbpfx.errors import RankError, first_line

if TYPE_CHECKING:  # some builds of torch do not have it
    from torch._C._distributed_c10d import Store

# All in seconds. BEAT: from one sign of life to the next. SILENCE: without a sign of life, until a rank counts as dead.
# ARRIVAL: until every rank must have started. GRACE: rank 0, in whose process the store often lives, waits so long for
# the others to read its last message. PAUSE: from one look at the store to the next.
BEAT, SILENCE, ARRIVAL, GRACE, PAUSE = 1.0, 60.0, 600.0, 5.0, 0.02


class Meeting:
    """One of the processes that meet.

    Args:
        rank: the number of this process, from 0.
        count: the number of processes.
        store: a key-value store that only these meetings use.
    """

    def __init__(self, rank: int, count: int, store: Store) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._meetings = 0
        self._pace: dict[int, tuple[str, float]] = {}

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Take part in the meetings while the context is open, and report an error inside it to the other processes."""
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(stop,), daemon=True, name="vbpfx: signs of life")
        beating.start()
        try:
            yield
            self._part()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            stop.set()
            beating.join(BEAT)

    def watch(self) -> None:
        """Raise a RankError if another rank has failed."""
        if self.is_there("failed"):
            rank, message = json.loads(self.read("failed"))
            self.hear("failed")
            raise RankError(f"rank {rank} failed: {message}")

    def meet(self, place: str, value: str = "") -> None:
        """Wait until all ranks have called this with the same place and the same value.

        Raises:
            RankError: a rank has failed, gives no sign of life, or has called this with another place or value.
        """
        self._meetings += 1
        keys = [f"{self._meetings}/{rank}" for rank in range(self.count)]
        with reaching():
            self._store.set(keys[self.rank], json.dumps([place, value]))
        self._wait(keys)
        for rank, key in enumerate(keys):
            theirs = json.loads(self.read(key))
            if theirs[0] != place:
                raise RankError(
                    f"rank {rank} is at {theirs[0]!r}, but rank {self.rank} is at {place!r}: all ranks must make the same vbpfx calls "
                    f"in the same order"
                )
            if theirs[1] != value:
                raise RankError(
                    f"ranks {rank} and {self.rank} were given different values for: {place}. Pass the same model, options and data to all ranks"
                )

    def _fail(self, error: BaseException) -> None:
        """Report an error of this process to the others."""
        if isinstance(error, RankError):
            self._let_hear("failed")
        else:
            self.hear("failed")
            self.say("failed", json.dumps([self.rank, f"{type(error).__name__}: {first_line(error)}"]))

    def say(self, key: str, message: str) -> None:
        """Leave a message for the other ranks, and give them time to read it before this process ends."""
        with suppress(RuntimeError):  # nobody is left to tell
            self._store.set(key, message)
        self._let_hear(key)

    def _let_hear(self, key: str) -> None:
        """On rank 0, wait until the others have read a message, but not longer than GRACE."""
        others = [f"{key}/heard by {rank}" for rank in range(1, self.count)]
        until = time.monotonic() + GRACE
        with suppress(RuntimeError):
            while not self.rank and self._store.check([key]) and not self._store.check(others):
                if time.monotonic() > until:
                    return
                time.sleep(PAUSE)

    def hear(self, key: str) -> None:
        """Confirm that this rank has read a message."""
        with suppress(RuntimeError):
            self._store.set(f"{key}/heard by {self.rank}", "")

    def _part(self) -> None:
        """End the run on all ranks together; rank 0 leaves last."""
        self.meet("end")
        if not self.rank:
            self._wait([f"end/heard by {rank}" if rank else f"{self._meetings}/0" for rank in range(self.count)])
        else:
            self.hear("end")

    def _beat(self, stop: threading.Event) -> None:
        """Give signs of life until stopped."""
        for number in itertools.count():
            try:
                self._store.set(f"beat/{self.rank}", str(number))
            except RuntimeError:  # the store is gone; a process that waits for it raises the error
                return
            if stop.wait(BEAT):
                return

    def is_there(self, *keys: str) -> bool:
        """Return whether the store holds all these keys."""
        with reaching():
            return bool(self._store.check(list(keys)))

    def read(self, key: str) -> str:
        """Return the value of a key that the store holds."""
        with reaching():
            return str(self._store.get(key).decode())

    def _wait(self, keys: list[str]) -> None:
        """Wait until the store holds all keys, one of every rank."""
        begun = time.monotonic()
        self._pace = dict.fromkeys(range(self.count), ("", begun))
        pause = PAUSE / 64
        while not self.is_there(*keys):
            self.watch()
            now = time.monotonic()
            for rank, key in enumerate(keys):
                if not self.is_there(key):
                    self._require_life(rank, now)
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)

    def _require_life(self, rank: int, now: float) -> None:
        beat = self.read(f"beat/{rank}") if self.is_there(f"beat/{rank}") else ""
        last, since = self._pace[rank]
        if beat != last:
            self._pace[rank] = (beat, now)
        elif not beat and now - since > ARRIVAL:
            self._give_up(
                rank, f"it did not arrive within {ARRIVAL:g} s; make this call on every rank, or pass ranks='alone'"
            )
        elif beat and now - since > SILENCE:
            self._give_up(rank, f"it has not responded for {SILENCE:g} s: it was killed, or its machine is down")

    def _give_up(self, rank: int, why: str) -> None:
        """Report the failure of another rank in its place, and raise it here."""
        with reaching():
            self._store.set(f"failed/heard by {rank}", "")
            self._store.set("failed", json.dumps([rank, why]))
        self.watch()


@contextmanager
def reaching() -> Iterator[None]:
    """Turn an error of torch.distributed into a RankError that explains it in one line."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"another rank cannot be reached ({first_line(error)}): it, or the process that holds the store (rank 0, or "
            f"torchrun), has ended"
        ) from error


@contextmanager
def exchanging() -> Iterator[None]:
    """Like :func:`reaching`, for work that also does other things, whose errors pass through unchanged."""
    try:
        yield
    except RuntimeError as error:
        from torch import distributed

        # gloo raises plain RuntimeErrors, whose messages begin with a path in its source code
        if isinstance(error, distributed.DistError) or "/gloo/" in first_line(error):
            with reaching():
                raise
        raise
