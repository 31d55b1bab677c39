"""Calibration data from ``.npy`` and ``.npz`` files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vbpfx.data.batches import spread, taken
from vbpfx.errors import CalibrationError, first_line

Array = npt.NDArray[Any]


class ArrayBatches:
    """Batches of the samples in a file: arrays from an ``.npy``, mappings from array name to batch from an ``.npz``.

    An ``.npy`` is mapped into memory.

    Args:
        path: the file. An ``.npy`` is one array, whose name here is the empty string.
        batch: samples in a batch; what is left over in the end makes a smaller one.
        whole: leave out what is left over, for networks that take one size alone.
        axes: per array which axis is the samples'; None for one that goes whole with every batch, such as a number. Arrays that
            are not named are left out. By default the first axis is the samples' in every array.
        ranks: per array how many axes a batch of it has. Where every array has one axis more, the first one is of batches:
            they are handed on one by one, whatever their axes are.
        limit: take that many samples, chosen at random by ``seed``, in the order in which they stand.

    Raises:
        CalibrationError: it cannot be read, or its arrays have different numbers of samples.
    """

    def __init__(
        self,
        path: Path,
        batch: int,
        *,
        whole: bool = False,
        axes: Mapping[str, int | None] | None = None,
        ranks: Mapping[str, int] | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.path, self.batch = path, batch
        arrays = _load(path)
        self.axes: dict[str, int | None] = dict.fromkeys(arrays, 0) if axes is None else dict(axes)
        self.arrays = {name: array for name, array in arrays.items() if name in self.axes}
        ranks = ranks or {}
        self._one_by_one = bool(self.arrays) and all(a.ndim - 1 == ranks.get(n) for n, a in self.arrays.items())
        if self._one_by_one:
            self.batch, whole = 1, False
            self.axes = dict.fromkeys(self.arrays, 0)
        counts = {
            name: array.shape[axis] if array.ndim > axis else 0
            for name, array in self.arrays.items()
            if (axis := self.axes[name]) is not None
        }
        self.samples = next(iter(counts.values()), 0)
        if not self.samples or set(counts.values()) != {self.samples}:
            raise CalibrationError(
                f"{path} holds no arrays of one number of samples: {counts or ', '.join(arrays) or 'it is empty'}"
            )
        self.of = self.samples
        self._chosen = sorted(spread(None, self.of, seed)[:limit])
        if whole:
            self._chosen = self._chosen[: len(self._chosen) // batch * batch]
            if not self._chosen:
                raise CalibrationError(
                    f"the network takes batches of {batch} samples, and {path} has fewer than that. Pass a file with at least {batch} samples"
                )
        self.samples = len(self._chosen)

    def __str__(self) -> str:
        return f"{taken(self.samples, self.of, 'batch' if self._one_by_one else 'sample')} from {self.path}"

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.samples, self.batch):
            made = {name: self._part(name, start) for name in self.arrays}
            yield made.get("", made)

    def _part(self, name: str, start: int) -> Array:
        array, axis = self.arrays[name], self.axes[name]
        if self._one_by_one:
            return np.array(array[self._chosen[start]])
        if axis is None:
            return np.array(array)
        return np.take(array, self._chosen[start : start + self.batch], axis)


def _load(path: Path) -> dict[str, Array]:
    if path.suffix not in (".npy", ".npz"):
        raise CalibrationError(f"{path} is neither .npy nor .npz, and not a folder of images; pass one of these")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except Exception as error:  # numpy, zipfile and the file system have their own
        raise CalibrationError(f"cannot read {path}: {first_line(error)}") from error
