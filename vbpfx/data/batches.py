"""``Data``: samples in batches, the form in which every kind of data is read."""

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
    """Samples in batches. They can be iterated over any number of times, always in the same order.

    A batch is what the model takes: a tensor, or a mapping of arguments. If there are labels, it is a pair of inputs
    and labels. ``len()`` is the number of batches, as for a ``DataLoader``. Printing it shows what was read and how.

    Attributes:
        path: the file or folder that was read.
        samples: the number of samples.
        labels: the class of every sample, or None if it is not known.
        classes: the names of the classes, or None if they are not known.
        skipped: the files that could not be read and were left out, each with the reason.
        about: what was read and how, as lines of text.
        batch: samples per batch; the last batch may be smaller.
        workers: the number of processes that read ahead. With 0, this process reads.
        dataset, collate: the arguments of a ``DataLoader``.
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
        """Return the batches as a ``DataLoader``, which :func:`vbpfx.finetune` can split by samples."""
        return DataLoader(self.dataset, self.batch, shuffle=shuffle, num_workers=self.workers, collate_fn=self.collate)


def spread(labels: Sequence[int] | None, count: int, seed: int) -> list[int]:
    """Return all sample indices in random order, so that the first n, for any n, are spread evenly over the classes."""
    shuffled: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    if labels is None:
        return shuffled
    seen: dict[int, int] = {}
    turn = {}
    for number in shuffled:
        turn[number] = seen[labels[number]] = seen.get(labels[number], 0) + 1
    return sorted(shuffled, key=turn.__getitem__)


def taken(number: int, of: int, thing: str) -> str:
    """Return ``128 of 1,000 images``, or ``1,000 images`` if all are taken."""
    return f"{number:,} of {counted(of, thing)}" if number < of else counted(of, thing)


def some(names: Sequence[str], between: str) -> str:
    """Join the first names, followed by "..." if there are more."""
    return between.join(names[:3]) + (f"{between}..." if len(names) > 3 else "")
