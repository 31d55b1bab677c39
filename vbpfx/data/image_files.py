"""Which images a folder holds, and of which classes.

Images lie directly in the folder, or in a folder for each class, sorted by name and numbered in that order, as in
torchvision's ``ImageFolder``; a folder without images is a class without samples, so that the others keep their numbers.
Hidden files and folders do not count; other files that are not images are told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vbpfx.data.labels import read_class_names, read_labels
from vbpfx.errors import CalibrationError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_SYNSET = re.compile(r"^n\d{8}\s+")  # WordNet's number in front of a name
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "calibration"}


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder, in the order of their names.

    Attributes:
        files: their paths.
        labels: a class for each image; None where nothing says it.
        classes: names of the classes, as far as they are known; a label is a place in it.
        others: files that are not images.
        unlabelled: how many images the list of labels does not name; they are left out.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    others: tuple[Path, ...]
    unlabelled: int = 0


def list_images(folder: Path, labels: Path | None = None, classes: Path | None = None) -> ImageFiles:
    """The images of a folder.

    Args:
        labels: a CSV file with the columns ``file`` and ``label`` (a number); files are relative to it, or to the folder.
            Without it, folders are classes.
        classes: a file with the name of a class on each line, the first one class 0. Where folders are classes, their names
            are looked up in it: they are whole lines or a line's first word (``n01440764 tench``).

    Raises:
        CalibrationError: there is no image, or what is said about labels does not fit.
    """
    names = read_class_names(classes) if classes is not None else None
    shown = tuple(_SYNSET.sub("", name) for name in names) if names else None
    images, others = _walk(folder)
    if not images:
        held = f"; it holds {len(others)} other files, such as {others[0].name}" if others else ""
        raise CalibrationError(f"{folder} holds no images ({', '.join(SUFFIXES)}){held}")
    if labels is not None:
        known = read_labels(labels, images, folder)
        found = [image for image in images if image in known]
        numbers = tuple(known[image] for image in found)
        return ImageFiles(tuple(found), numbers, shown, others, len(images) - len(found))
    top = [image.relative_to(folder).parts[0] for image in images]
    direct = [name for name, image in zip(top, images, strict=True) if image.parent == folder]
    if len(direct) == len(images):
        return ImageFiles(images, None, shown, others)
    holding = sorted(set(top) - set(direct))
    if direct:
        raise CalibrationError(
            f"{folder} holds images both directly ({direct[0]}) and in folders ({holding[0]}): pass one of them"
        )
    if set(map(str.lower, holding)) <= _SPLITS:
        raise CalibrationError(f"{folder} holds {', '.join(holding)}, which are not classes: pass one of them")
    folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    places = {name: place for place, name in enumerate(folders)}
    if names is not None:
        places = _places(holding, names, folder)
    return ImageFiles(images, tuple(places[name] for name in top), shown or tuple(folders), others)


def _places(folders: Sequence[str], names: Sequence[str], folder: Path) -> dict[str, int]:
    lines, words = _numbered(names), _numbered([line.split()[0] if line else "" for line in names])
    found = {name: lines.get(name) or words.get(name, []) for name in folders}
    if twice := [name for name in folders if len(found[name]) > 1]:
        first, second, *_ = found[twice[0]]
        raise CalibrationError(
            f"the folder {twice[0]} of {folder} may be line {first + 1} or line {second + 1} of the names of classes "
            f"({names[first]!r}, {names[second]!r}): name folders by whole lines, each of which is there once"
        )
    missing = [name for name in folders if not found[name]]
    if missing:
        raise CalibrationError(
            f"the folder {missing[0]} of {folder} is not a name of a class ({len(missing)} such folders); the names are {', '.join(names[:3])}, ..."
        )
    return {name: numbers[0] for name, numbers in found.items()}


def _numbered(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> where it stands."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _leads_back(path: Path, folder: Path) -> bool:
    """Whether it is a link to a folder on the way to it, where one would go round for ever."""
    if not path.is_symlink():
        return False
    parts = path.relative_to(folder).parts
    way = (folder.joinpath(*parts[:length]) for length in range(len(parts)))
    return os.path.realpath(path) in map(os.path.realpath, way)


def _walk(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """All images beneath a folder, and all other files, in order; hidden ones left out."""
    images: list[Path] = []
    others: list[Path] = []
    for root, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(Path(root) / name, folder)]
        for name in files:
            if not name.startswith("."):
                (images if name.lower().endswith(SUFFIXES) else others).append(Path(root) / name)
    return tuple(sorted(images)), tuple(sorted(others))
