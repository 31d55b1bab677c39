"""Read the labels of files, and the names of classes."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from vbpfx.errors import CalibrationError


def read_labels(path: Path, images: Sequence[Path], folder: Path) -> dict[Path, int]:
    """Return image -> label for the images that a CSV list names. Entries for other folders are ignored.

    Args:
        path: the list, with the columns ``file`` and ``label``.
        images: the images of the folder.
        folder: the folder of the images.

    Raises:
        CalibrationError: the list cannot be read, names none of the images, names an image twice with different labels,
            or names a file of the folder that is not an image.
    """
    root = os.path.realpath(folder)
    known = {os.path.join(root, image.relative_to(folder)): image for image in images}
    rows = [_labelled(path, number, row) for number, row in _rows(path)]
    bases = [os.path.realpath(path.parent), root]
    named = [[os.path.normpath(os.path.join(base, name)) for _, name, _ in rows] for base in bases]
    files = max(named, key=lambda given: sum(file in known for file in given))
    found: dict[Path, int] = {}
    missing = []
    for (number, name, label), file in zip(rows, files, strict=True):
        if file not in known:
            missing += [file] if file.startswith(root + os.sep) else []
        elif found.setdefault(known[file], label) != label:
            raise CalibrationError(
                f"{path}, line {number}: {name} has label {label} here and {found[known[file]]} above"
            )
    if not found:
        raise CalibrationError(
            f"{path} lists no image that is in {folder}. The list begins with {(rows[0][1] if rows else 'nothing')}. Write the paths in it relative to {path.parent} or to {folder}"
        )
    if missing:
        state = "is not an image" if os.path.exists(missing[0]) else "does not exist"
        raise CalibrationError(f"{path} names {missing[0]}, which {state} ({len(missing)} such files)")
    return found


def _labelled(path: Path, number: int, row: dict[str, str | None]) -> tuple[int, str, int]:
    name, text = (row["file"] or "").strip(), (row["label"] or "").strip()
    if not name or not text.isdecimal():
        raise CalibrationError(
            f"{path}, line {number}: expected a file and the number of its class, found {name!r}, {text!r}"
        )
    return number, name, int(text)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one on each line of a file.

    Raises:
        CalibrationError: the file cannot be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read names of classes from {path}: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise CalibrationError(f"{path} is empty: expected the name of a class on each line")
    return tuple(line.strip() for line in lines)


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Return the rows of a CSV file, each with its line number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise CalibrationError(
                    f"{path} begins with {','.join(reader.fieldnames or ()) or 'nothing'}; expected a line that names the columns: file,label"
                )
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"cannot read labels from {path}: {error}") from error
