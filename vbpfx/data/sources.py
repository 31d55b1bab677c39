"""Open data for a network from one path: a folder of images, a file of arrays, or a text file.

    data = open_data("photographs", model, limit=128)
    pruned = vbpfx.prune(model, data, ratio=0.5)

The samples and their order are fixed when the path is opened. The samples themselves are read batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vbpfx.data.arrays import ARRAY_SUFFIXES, open_arrays
from vbpfx.data.batches import Data
from vbpfx.data.inputs import Inputs, as_inputs, model_dtype
from vbpfx.data.texts import TEXT_SUFFIXES, open_texts
from vbpfx.errors import CalibrationError


def open_data(
    path: str | Path,
    model: nn.Module,
    *,
    name: str = "",
    batch: int = 32,
    limit: int | None = None,
    seed: int = 0,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
    bad_images: Literal["refuse", "skip"] = "refuse",
    shape: tuple[int, ...] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
    max_length: int | None = None,
    workers: int = 0,
) -> Data:
    """Read data for a model.

    Args:
        path: one of

            - a folder of images, with the images directly in it or in a subfolder for each class. They are prepared by
              the rules of the model's package (:mod:`vbpfx.data.image_transforms`);
            - ``.npy``, or ``.npz`` with one array for each argument. The first axis is the batch axis. An array named
              ``labels`` holds the labels;
            - ``.txt`` with a text on each line, or ``.jsonl`` with a ``text`` in each line, for Hugging Face models.
              Encoder-decoder models need ``.jsonl`` with the answer as ``target``.
        model: the model that the data is for. Numbers that are not integers are converted to its dtype.
        name: the string that the model was loaded by, such as ``torchvision:resnet18``. A torchvision model does not
            know its name, which is needed to prepare images.
        batch: samples per batch.
        limit: take this many samples. They are chosen at random, spread over the classes, and kept in their original
            order.
        seed: the random seed of that choice.
        labels: for images: a CSV file with the columns ``file`` and ``label`` (a number).
        classes: for images: a file with the name of a class on each line.
        bad_images: what to do about images that cannot be read. ``"refuse"`` raises an error when one is reached.
            ``"skip"`` decodes every image once at the beginning, and leaves out those that fail.
        shape, mean, std, crop: for images: settings that replace those of the model's package. ``shape`` is (channels,
            height, width), and ``crop`` is the side of the central crop divided by that of the resized image.
        max_length: for texts: the number of tokens after which a text is cut. By default the model's limit, but at most
            512.
        workers: for images: the number of processes that read ahead.

    Raises:
        CalibrationError: there is nothing to read, or it cannot be read, or does not fit the model. The message names
            the file.
    """
    path = Path(path)
    require_options_for(
        path, batch=batch, limit=limit, workers=workers, bad_images=bad_images, max_length=max_length,
        labels=labels, classes=classes, shape=shape, mean=mean, std=std, crop=crop,
    )  # fmt: skip
    if path.is_dir():
        try:
            from vbpfx.data.image_transforms import Overrides
            from vbpfx.data.images import open_images  # needs Pillow, which texts and arrays do not
        except ImportError as error:
            raise CalibrationError(
                f"images need Pillow and torchvision ({error}): pip install pillow torchvision"
            ) from error
        return open_images(
            path, model, name, Overrides(shape, mean, std, crop), model_dtype(model), _path(labels), _path(classes),
            limit, seed, batch, workers, skip=bad_images == "skip",
        )  # fmt: skip
    if not path.exists():
        raise CalibrationError(f"{path} does not exist")
    if path.suffix in ARRAY_SUFFIXES:
        return open_arrays(path, model_dtype(model), limit, seed, batch)
    if path.suffix in TEXT_SUFFIXES:
        return open_texts(path, model, max_length, limit, seed, batch)
    expected = ", ".join((*ARRAY_SUFFIXES, *TEXT_SUFFIXES))
    raise CalibrationError(
        f"{path}: this kind of file is not supported; pass a folder of images, or a file that ends in {expected}"
    )


def require_options_for(
    path: Path,
    *,
    batch: int = 32,
    limit: int | None = None,
    workers: int = 0,
    bad_images: str = "refuse",
    max_length: int | None = None,
    **of_images: Any,
) -> None:
    """Raise a CalibrationError if an option of :func:`open_data` is out of range, or is not for this kind of data."""
    for what, value, least in (("batch", batch, 1), ("limit", limit, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise CalibrationError(f"{what} must be at least {least}, found {value}")
    if bad_images not in ("refuse", "skip"):
        raise CalibrationError(f"bad_images={bad_images!r} is unknown; use 'refuse' or 'skip'")
    for option, given in of_images.items():
        if given is not None and not path.is_dir():
            raise CalibrationError(f"{option} is for a folder of images, and {path} is not a folder")
    if max_length is not None and path.suffix not in TEXT_SUFFIXES:
        raise CalibrationError(f"max_length is for text files ({', '.join(TEXT_SUFFIXES)}), and {path} is not one")


def sample_inputs(path: str | Path, model: nn.Module, *, name: str = "", batch: int = 2) -> Inputs:
    """Return the first samples of a path as inputs of the model, without labels.

    They serve as example inputs if the model itself does not say what its inputs look like.

    Args:
        path, model, name: as for :func:`open_data`.
        batch: the number of samples; fewer are returned if the path holds fewer.

    Raises:
        CalibrationError: as for :func:`open_data`.
    """
    return as_inputs(next(iter(open_data(path, model, name=name, batch=batch))), model)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
