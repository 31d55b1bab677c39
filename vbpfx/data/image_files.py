"""List the images of a folder, and their classes.

Images are directly in the folder, or in a subfolder for each class. As in torchvision's ``ImageFolder``, classes are
numbered in the order of their names. A subfolder without images is a class without samples, so that the other classes
keep their numbers. Hidden files and folders are ignored. Other files that are not images are listed separately.
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
_SYNSET = re.compile(r"^n\d{8}\s+")  # the WordNet ID in front of a class name
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "calibration"}


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder, in the order of their names.

    Attributes:
        files: the paths of the images.
        labels: the class of each image, or None if it is not known.
        classes: the names of the classes, or None if they are not known. A label is an index into it.
        others: the files that are not images.
        unlabelled: the number of images that the list of labels does not name. They are left out.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    others: tuple[Path, ...]
    unlabelled: int = 0


def list_images(folder: Path, labels: Path | None = None, classes: Path | None = None) -> ImageFiles:
    """List the images of a folder, with their classes.

    Args:
        labels: a CSV file with the columns ``file`` and ``label`` (a number). Paths in it are relative to the CSV file,
            or to ``folder``. Without it, every subfolder is a class.
        classes: a text file with the name of a class on each line, beginning with class 0. If subfolders are classes,
            their names are looked up in it: each must be a whole line, or the first word of one (``n01440764 tench``).

    Raises:
        CalibrationError: there are no images, or the labels or class names do not match them.
    """
    names = read_class_names(classes) if classes is not None else None
    shown = tuple(_SYNSET.sub("", name) for name in names) if names else None
    images, others = _walk(folder)
    if not images:
        others_found = f"; it holds {len(others)} other files, such as {others[0].name}" if others else ""
        raise CalibrationError(f"{folder} holds no images ({', '.join(SUFFIXES)}){others_found}")
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
    """Return name -> the indices at which it occurs."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _leads_back(path: Path, folder: Path) -> bool:
    """Return whether a path is a link to one of its parent folders, which would be walked for ever."""
    if not path.is_symlink():
        return False
    parts = path.relative_to(folder).parts
    way = (folder.joinpath(*parts[:length]) for length in range(len(parts)))
    return os.path.realpath(path) in map(os.path.realpath, way)


def _walk(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return all images beneath a folder, and all other files, both sorted and without hidden ones."""
    images: list[Path] = []
    others: list[Path] = []
    for root, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(Path(root) / name, folder)]
        for name in files:
            if not name.startswith("."):
                (images if name.lower().endswith(SUFFIXES) else others).append(Path(root) / name)
    return tuple(sorted(images)), tuple(sorted(others))
