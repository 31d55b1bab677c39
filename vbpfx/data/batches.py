"""Samples in batches: what every kind of data is read as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vbpfx.display.tables import counted


@dataclass(frozen=True)
class Data:
    """Samples in batches, to be gone through as often as wanted, always in the same order.

    A batch is what the model takes, a tensor or a mapping of arguments; where there are labels, a pair of it and them.
    ``len()`` is the number of batches, as of a ``DataLoader``. Printing it says what was read and how.

    Attributes:
        path: where it was read.
        samples: how many there are.
        labels: the class of every sample; None where nothing says it.
        classes: names of the classes, as far as they are known.
        skipped: what could not be read and was left out, each with the reason.
        about: what was read and how, in lines.
        batch: samples in a batch; the last may be smaller.
        workers: processes that read ahead; 0 reads in this one.
        dataset, collate: as ``DataLoader`` takes them.
    """

    path: Path
    samples: int
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    skipped: tuple[str, ...]
    about: tuple[str, ...]
    batch: int
    workers: int
    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader())

    def __str__(self) -> str:
        return "\n".join(self.about)

    def loader(self, *, shuffle: bool = False) -> DataLoader[Any]:
        """The batches as a ``DataLoader``, which :func:`vbpfx.finetune` splits by samples."""
        return DataLoader(self.dataset, self.batch, shuffle=shuffle, num_workers=self.workers, collate_fn=self.collate)


def spread(labels: Sequence[int] | None, count: int, seed: int) -> list[int]:
    """The numbers of all samples in an order whose every beginning is random, and spread over the classes."""
    shuffled: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    if labels is None:
        return shuffled
    seen: dict[int, int] = {}
    turn = {}
    for number in shuffled:
        turn[number] = seen[labels[number]] = seen.get(labels[number], 0) + 1
    return sorted(shuffled, key=turn.__getitem__)


def taken(number: int, of: int, thing: str) -> str:
    """``128 of 1,000 images``; ``1,000 images`` where all are taken."""
    return f"{number:,} of {counted(of, thing)}" if number < of else counted(of, thing)


def some(names: Sequence[str], between: str, most: int = 3) -> str:
    """The first names, and a sign that there are more."""
    return between.join(names[:most]) + (f"{between}..." if len(names) > most else "")
