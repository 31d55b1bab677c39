"""Read the images of a folder as batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from vbpfx.data.batches import Data, some, spread, taken
from vbpfx.data.image_files import list_images
from vbpfx.data.image_transforms import ImageTransform, Overrides, check_image, image_transform, open_image
from vbpfx.data.inputs import Labelled
from vbpfx.display.tables import counted
from vbpfx.errors import CalibrationError


class _UnreadableImageError(CalibrationError):
    """An image cannot be read.

    A DataLoader's worker raises the error anew, with its traceback in front of the message. The traceback is removed
    here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


@dataclass(frozen=True)
class _Images(Dataset[Any]):
    """A dataset of prepared images, with their labels if there are any."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    transform: ImageTransform
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        file = self.files[number]
        try:
            image = open_image(file, self.transform.mode)
        except CalibrationError as error:
            raise _UnreadableImageError(
                f"cannot read the image {file}: {error}; remove it, or leave out what cannot be read: bad_images='skip' "
                f"(--bad-images skip)"
            ) from error
        values = self.transform.apply(image).to(self.dtype)
        return values if self.labels is None else (values, self.labels[number])


@dataclass(frozen=True)
class _Arguments:
    """Collates samples into a batch, under the name of the model's argument if it has one."""

    argument: str | None

    def __call__(self, samples: list[Any]) -> Any:
        try:
            made = default_collate(samples)
        except RuntimeError as error:
            shapes = sorted({tuple(s[0].shape if isinstance(s, tuple) else s.shape) for s in samples})
            raise CalibrationError(
                f"images of one batch have shapes {shapes[0]} and {shapes[-1]}; pass shape="
            ) from error
        if self.argument is None:
            return Labelled(*made) if isinstance(made, list) else made
        return Labelled({self.argument: made[0]}, made[1]) if isinstance(made, list) else {self.argument: made}


def open_images(
    path: Path,
    model: nn.Module,
    name: str,
    overrides: Overrides,
    dtype: torch.dtype,
    labels: Path | None,
    classes: Path | None,
    limit: int | None,
    seed: int,
    batch: int,
    workers: int,
    *,
    skip: bool,
) -> Data:
    """Read the images of a folder. The arguments are those of :func:`vbpfx.open_data`.

    Args:
        skip: check all images before they are used, and leave out those that cannot be read.

    Raises:
        CalibrationError: there are no images, or it is not known how to prepare them.
    """
    found = list_images(path, labels, classes)
    transform = image_transform(model, name, overrides)
    order = spread(found.labels, len(found.files), seed)
    wanted = len(order) if limit is None else limit
    chosen: list[int] = []
    skipped: list[str] = []
    for number in order:
        if len(chosen) == wanted:
            break
        reason = check_image(found.files[number]) if skip else ""
        if reason:
            skipped.append(f"{found.files[number]}: {reason}")
        else:
            chosen.append(number)
    if not chosen:
        raise CalibrationError(f"none of the {len(order)} images of {path} can be read, such as {sorted(skipped)[0]}")
    chosen.sort()
    known = None if found.labels is None else tuple(found.labels[number] for number in chosen)
    spread_over = "" if known is None else f", {counted(len(set(known)), 'class', 'classes')}"
    about = [f"{taken(len(chosen), len(found.files), 'image')} from {path}{spread_over}", f"prepared {transform.about}"]
    if skipped:
        about.append(f"skipped {counted(len(skipped), 'image')} that cannot be read: {some(sorted(skipped), '; ')}")
    if found.unlabelled:
        about.append(f"left out {counted(found.unlabelled, 'image')} without a label")
    if found.others:
        about.append(
            f"ignored {counted(len(found.others), 'file')} of other kinds: {some([f.name for f in found.others], ', ')}"
        )
    dataset = _Images(tuple(found.files[number] for number in chosen), known, transform, dtype)
    return Data(path, len(chosen), known, found.classes, tuple(sorted(skipped)), tuple(about), batch, workers, dataset,
                _Arguments(transform.argument))  # fmt: skip
