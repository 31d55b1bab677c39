"""Calibration data from ``.npy`` and ``.npz`` files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vbpfx.errors import CalibrationError, first_line

Array = npt.NDArray[Any]


class ArrayBatches:
    """Batches of the samples in a file: arrays from an ``.npy``, mappings from array name to batch from an ``.npz``.

    An ``.npy`` is mapped into memory.

    Args:
        path: the file; the first axis of every array is the samples'.
        batch: samples in a batch; what is left over in the end makes a smaller one.
        whole: leave out what is left over, for networks that take one size alone.

    Raises:
        CalibrationError: it cannot be read, or its arrays have different numbers of samples.
    """

    def __init__(self, path: Path, batch: int, *, whole: bool = False) -> None:
        self.batch = batch
        self.arrays = _load(path)
        counts = {name: len(array) if array.ndim else 0 for name, array in self.arrays.items()}
        self.samples = next(iter(counts.values()), 0)
        if not self.samples or set(counts.values()) != {self.samples}:
            raise CalibrationError(f"{path} holds no arrays of one number of samples: {counts}")
        if whole:
            self.samples -= self.samples % batch
            if not self.samples:
                raise CalibrationError(f"{path} has fewer than the {batch} samples of a batch, which the network takes")

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.samples, self.batch):
            stop = min(start + self.batch, self.samples)
            made = {name: np.array(array[start:stop]) for name, array in self.arrays.items()}
            yield made.get("", made)


def _load(path: Path) -> dict[str, Array]:
    if path.suffix not in (".npy", ".npz"):
        raise CalibrationError(f"{path} is neither .npy nor .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except Exception as error:  # numpy, zipfile and the file system have their own
        raise CalibrationError(f"cannot read {path}: {first_line(error)}") from error
