"""The interface of a reader of data: the request that it gets, and the record that describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from vbpfx.data.batches import Data


@dataclass(frozen=True)
class ReadOptions:
    """How a path is to be read. The attributes are the arguments of :func:`vbpfx.open_data`."""

    name: str = ""
    batch: int = 32
    limit: int | None = None
    seed: int = 0
    labels: str | Path | None = None
    classes: str | Path | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"
    shape: tuple[int, ...] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop: float | None = None
    max_length: int | None = None
    workers: int = 0


@dataclass(frozen=True)
class DataReader:
    """A reader of one kind of data.

    Attributes:
        about: the kind of data, such as "a folder of images".
        read: a function of the path, the model and a :class:`ReadOptions`. It returns the data, or raises a CalibrationError.
        suffixes: the suffixes of the files that it reads; None if it reads folders.
        options: the arguments of :func:`vbpfx.open_data` that this kind of data supports and some other kinds do not.
    """

    about: str
    read: Callable[[Path, nn.Module, ReadOptions], Data]
    suffixes: tuple[str, ...] | None
    options: tuple[str, ...] = ()

    def reads(self, path: Path) -> bool:
        """Return whether the path is of this kind, judging by its suffix, or by whether it is a folder."""
        return path.is_dir() if self.suffixes is None else not path.is_dir() and path.suffix in self.suffixes
