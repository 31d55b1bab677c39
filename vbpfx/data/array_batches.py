"""Read calibration data from ``.npy`` and ``.npz`` files, batch by batch."""

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
    """Batches of samples from a file: arrays from an ``.npy``, or mappings from array name to batch from an ``.npz``.

    An ``.npy`` is memory-mapped.

    Args:
        path: the file. The one array of an ``.npy`` has the name "" here.
        batch: samples per batch. Samples that are left over at the end form a smaller batch.
        whole: drop the samples that are left over, for networks that accept only one batch size.
        axes: array name -> batch axis, or None for an array that is passed whole with every batch, such as a number.
            Arrays that are not named are left out. By default the first axis of every array is the batch axis.
        ranks: array name -> number of axes of one batch. If every array in the file has one axis more, its first axis
            enumerates ready-made batches, and these are yielded one by one, whatever their axes mean.
        limit: take this many samples. They are chosen at random by ``seed``, and kept in their original order.

    Raises:
        CalibrationError: the file cannot be read, or its arrays have different numbers of samples.
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
                f"the arrays in {path} must all have the same number of samples, at least 1; found "
                f"{counts or ', '.join(arrays) or 'none'}"
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
    except Exception as error:  # numpy, zipfile and the file system raise exceptions of their own
        raise CalibrationError(f"cannot read {path}: {first_line(error)}") from error
