"""Training data: which part is held out, in which order the rest is read, and which process reads what.

Everything is decided by indices before anything is read. The held-out samples (or batches), and the order of every
epoch, follow from the seed alone. So every process knows what the others read, and a resumed run skips earlier batches
without reading them.

There are three kinds of data:

- A ``DataLoader`` with PyTorch's own samplers: *samples* are held out. New batches of the same size are made with the
  loader's own dataset, workers and collate function, and shuffled if the loader shuffles.
- A list, or any sequence of batches: whole batches are held out, and the order of the others is shuffled.
- Any other iterable that can be iterated over repeatedly: whole batches are held out by their index. This only makes
  sense if the batches are the same in every pass, so every pass is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from vbpfx.errors import FinetuneError

# What identifies a batch: the list of its samples' indices, or its own index.
Unit = Any


@dataclass(frozen=True)
class TrainingData:
    """Batches to train on, and held-out batches.

    Attributes:
        order: epoch -> the units of all its batches, in order.
        read: units in the order of an epoch -> their batches.
        held_out: (rank, number of processes) -> a process's share of the held-out batches, the same at every call.
        measured: whether there are held-out batches.
    """

    order: Callable[[int], list[Unit]]
    read: Callable[[Sequence[Unit]], Iterator[Any]]
    held_out: Callable[[int, int], Iterator[Any]]
    measured: bool


def seed_of(*key: int) -> int:
    """Return a seed (32 bits) for a key. Equal keys give equal seeds, and different keys give unrelated ones."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def training_data(data: Iterable[Any], held_out: float, validation: Iterable[Any] | None, seed: int) -> TrainingData:
    """Split data into a part to train on and a held-out part.

    Args:
        data: the batches.
        held_out: the share to hold out, at least one sample or batch; 0 for none. It is ignored with ``validation``.
        validation: batches to evaluate on instead. All of ``data`` is then trained on.
        seed: the seed of the split and the order.

    Raises:
        FinetuneError: the data is empty, too little to be split, an iterator that one pass uses up, or already divided
            over processes.
    """
    if isinstance(data, (Tensor, Mapping)):
        raise FinetuneError(f"data is one {type(data).__name__}; pass an iterable of batches: [batch]")
    for name, given in (("data", data), ("validation", validation)):
        if given is not None and (not hasattr(given, "__iter__") or isinstance(given, Iterator)):
            raise FinetuneError(
                f"{name} is a {type(given).__name__}, which cannot be iterated over once per epoch; pass a DataLoader or a list"
            )
    if not 0 <= held_out < 1:
        raise FinetuneError(f"held_out must be at least 0 and below 1, found {held_out!r}")
    share = 0.0 if validation is not None else held_out
    if isinstance(data, DataLoader):
        made = _from_loader(data, share, seed)
    elif isinstance(data, Sequence):
        made = _from_sequence(data, share, seed)
    else:
        made = _from_stream(data, share, seed)
    if validation is None:
        return made
    return TrainingData(
        made.order, made.read, lambda rank, processes: itertools.islice(validation, rank, None, processes), True
    )


def _from_loader(loader: DataLoader[Any], share: float, seed: int) -> TrainingData:
    if isinstance(loader.sampler, DistributedSampler):
        raise FinetuneError(
            "the loader's DistributedSampler gives every process its share of the data, which finetune does itself; "
            "pass the loader without it"
        )
    if not _is_plain(loader):
        return _from_stream(loader, share, seed)
    dataset: Dataset[Any] = loader.dataset
    size, shuffled = loader.batch_size or 1, isinstance(loader.sampler, RandomSampler)
    training, held_out = _set_aside(len(dataset), share, seed, "sample")  # type: ignore[arg-type] # has one: _is_plain

    def order(epoch: int) -> list[Unit]:
        numbers = _shuffled(training, seed, epoch) if shuffled else training
        units = chunks(numbers, size)
        return units[:-1] if loader.drop_last and len(units[-1]) < size else units

    def read(units: Sequence[Unit]) -> Iterator[Any]:
        return iter(
            DataLoader(
                dataset,
                batch_sampler=list(units),
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
            )
        )

    if not order(0):
        raise FinetuneError(
            f"{len(training)} samples are left to train on, drop_last leaves out a batch of fewer than {size}; "
            f"pass drop_last=False"
        )
    return TrainingData(order, read, lambda rank, n: read(chunks(held_out, size)[rank::n]), bool(held_out))


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether the loader yields every sample of its dataset once, in order or shuffled."""
    sampler = loader.sampler
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and (type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement))
        and len(sampler) == len(loader.dataset)  # type: ignore[arg-type] # these samplers have asked it already
    )


def _from_sequence(data: Sequence[Any], share: float, seed: int) -> TrainingData:
    training, held_out = _set_aside(len(data), share, seed, "batch")

    def read(units: Sequence[Unit]) -> Iterator[Any]:
        return (data[unit] for unit in units)

    return TrainingData(
        lambda epoch: _shuffled(training, seed, epoch), read, lambda rank, n: read(held_out[rank::n]), bool(held_out)
    )


def _from_stream(data: Iterable[Any], share: float, seed: int) -> TrainingData:
    count = sum(1 for _ in data)
    training, numbers = _set_aside(count, share, seed, "batch")
    held_out = set(numbers)
    kept = {number: batch for number, batch in enumerate(data) if number in held_out} if held_out else {}

    def read(units: Sequence[Unit]) -> Iterator[Any]:
        wanted, seen = set(units), 0
        for seen, batch in enumerate(data, start=1):
            number = seen - 1
            if number in kept and not _same(batch, kept[number]):
                raise FinetuneError(
                    f"batch {seen} (counted from 1) is held out, but is not the same in this pass over data, so held-out samples "
                    f"would be trained on. Pass validation=, or a DataLoader with PyTorch's own samplers, or a list"
                )
            if number in wanted:
                yield batch
        if seen != count:
            raise FinetuneError(
                f"data had {count} batches at the first pass and {seen} at this one; pass a list of them"
            )

    return TrainingData(
        lambda epoch: list(training),
        read,
        lambda rank, n: itertools.islice(kept.values(), rank, None, n),
        bool(kept),
    )


def _set_aside(count: int, share: float, seed: int, thing: str) -> tuple[list[int], list[int]]:
    """Return the indices to train on and those held out, both ascending."""
    if not count:
        raise FinetuneError("data is empty: pass at least one batch")
    number = max(1, round(share * count)) if share else 0
    if number >= count:
        raise FinetuneError(
            f"held_out={share} of {count} {(thing if count == 1 else thing + 's')} leaves nothing to train on. Pass smaller batches, or pass validation data with validation=, or pass held_out=0 to train without validation"
        )
    chosen = set(_shuffled(range(count), seed)[:number])
    return [n for n in range(count) if n not in chosen], sorted(chosen)


def _shuffled(numbers: Sequence[int], *key: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(*key))
    return [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]


def _same(one: Any, other: Any) -> bool:
    first, second = (
        [leaf for leaf in pytree.tree_leaves(dict(b) if isinstance(b, Mapping) else b) if isinstance(leaf, Tensor)]
        for b in (one, other)
    )
    return len(first) == len(second) and all(map(torch.equal, first, second))


def chunks(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    """Return the units in groups of the given size; the last group may be smaller."""
    return [list(units[start : start + size]) for start in range(0, len(units), size)]
