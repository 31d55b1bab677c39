"""Read the arrays of a file as batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from vbpfx.data.array_batches import Array, ArrayBatches
from vbpfx.data.batches import Data, spread, taken
from vbpfx.data.inputs import LABELS, Labelled, model_dtype
from vbpfx.data.reader import DataReader, ReadOptions
from vbpfx.errors import CalibrationError

_BYTES = 8  # the size of the largest number type that torch supports


@dataclass(frozen=True)
class _Samples(Dataset[Any]):
    """A dataset of samples from one array, or from several named arrays."""

    arrays: dict[str, Array]
    labels: tuple[int, ...] | None
    chosen: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> Any:
        made = {name: self._tensor(array[self.chosen[number]]) for name, array in self.arrays.items()}
        sample = next(iter(made.values())) if len(made) == 1 else made
        return sample if self.labels is None else (sample, self.labels[number])

    def _tensor(self, values: Any) -> Tensor:
        own = np.array(values)
        tensor = torch.from_numpy(own.astype(own.dtype.newbyteorder("="), copy=False))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _collate(samples: list[Any]) -> Any:
    made = default_collate(samples)
    return Labelled(*made) if isinstance(made, list) else made


def _read(path: Path, model: nn.Module, how: ReadOptions) -> Data:
    """Read the samples of an ``.npy`` or ``.npz``.

    Raises:
        CalibrationError: the file cannot be read, or does not hold arrays of samples.
    """
    read = ArrayBatches(path, how.batch)
    arrays = dict(read.arrays)
    given = arrays.pop(LABELS, None)
    if given is not None and (given.ndim != 1 or given.dtype.kind not in "iu"):
        raise CalibrationError(
            f"{path}: labels must be one integer a sample, found {given.dtype} of shape {given.shape}"
        )
    if not arrays:
        raise CalibrationError(f"{path} holds only labels; add an array for each input of the model")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > _BYTES:
            raise CalibrationError(
                f"{path}: {f'array {name}' if name else 'the array'} has dtype {array.dtype}; expected real numbers "
                f"of at most {_BYTES} bytes"
            )
    known = None if given is None else given.tolist()
    order = spread(known, read.samples, how.seed)
    chosen = tuple(sorted(order[: how.limit]))
    labels = None if known is None else tuple(known[number] for number in chosen)
    shapes = ", ".join(f"{name} {array.shape[1:]}".strip() for name, array in arrays.items())
    about = (f"{taken(len(chosen), read.samples, 'sample')} from {path}: {shapes}",)
    dataset = _Samples(arrays, labels, chosen, model_dtype(model))
    return Data(path, len(chosen), labels, None, (), about, how.batch, 0, dataset, _collate)


READER = DataReader("an array file (.npy, .npz)", _read, suffixes=(".npy", ".npz"))
