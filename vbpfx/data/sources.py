"""Open data for a network from one path: a folder of images, a file of arrays, or a text file.

    data = open_data("photographs", model, limit=128)
    pruned = vbpfx.prune(model, data, ratio=0.5)

The samples and their order are fixed when the path is opened. The samples themselves are read batch by batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from torch import nn

from vbpfx.data.batches import Data
from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.data.reader import DataReader, ReadOptions
from vbpfx.data.readers import NAMES
from vbpfx.errors import CalibrationError

READERS: tuple[DataReader, ...] = tuple(importlib.import_module(f"vbpfx.data.readers.{name}").READER for name in NAMES)


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
    how = ReadOptions(
        name=name, batch=batch, limit=limit, seed=seed, labels=labels, classes=classes, bad_images=bad_images,
        shape=shape, mean=mean, std=std, crop=crop, max_length=max_length, workers=workers,
    )  # fmt: skip
    path = Path(path)
    require_options_for(path, how)
    if not path.exists():
        raise CalibrationError(f"{path} does not exist")
    for reader in READERS:
        if reader.reads(path):
            return reader.read(path, model, how)
    expected = ", ".join(suffix for reader in READERS for suffix in reader.suffixes or ())
    raise CalibrationError(
        f"{path}: this kind of file is not supported; pass a folder of images, or a file that ends in {expected}"
    )


def require_options_for(path: Path, how: ReadOptions) -> None:
    """Raise a CalibrationError if an option of :func:`open_data` is out of range, or is not for this kind of data."""
    for what, value, least in (("batch", how.batch, 1), ("limit", how.limit, 1), ("workers", how.workers, 0)):
        if value is not None and value < least:
            raise CalibrationError(f"{what} must be at least {least}, found {value}")
    if how.bad_images not in ("refuse", "skip"):
        raise CalibrationError(f"bad_images={how.bad_images!r} is unknown; use 'refuse' or 'skip'")
    for option in (field.name for field in fields(how)):
        owners = [reader for reader in READERS if option in reader.options]
        if owners and getattr(how, option) is not None and not any(reader.reads(path) for reader in owners):
            kinds = " or ".join(reader.about for reader in owners)
            raise CalibrationError(f"{option} is for {kinds}, and {path} is something else")


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
