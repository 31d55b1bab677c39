"""Read the images of a folder. Pillow and torchvision are imported only then, because other data does not need them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vbpfx.data.batches import Data
from vbpfx.data.inputs import model_dtype
from vbpfx.data.reader import DataReader, ReadOptions
from vbpfx.errors import CalibrationError


def _read(path: Path, model: nn.Module, how: ReadOptions) -> Data:
    try:
        from vbpfx.data.image_transforms import Overrides
        from vbpfx.data.images import open_images
    except ImportError as error:
        raise CalibrationError(
            f"images need Pillow and torchvision ({error}): pip install pillow torchvision"
        ) from error
    return open_images(
        path, model, how.name, Overrides(how.shape, how.mean, how.std, how.crop), model_dtype(model), _path(how.labels),
        _path(how.classes), how.limit, how.seed, how.batch, how.workers, skip=how.bad_images == "skip",
    )  # fmt: skip


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


READER = DataReader(
    about="a folder of images",
    read=_read,
    suffixes=None,
    options=("labels", "classes", "shape", "mean", "std", "crop"),
)
