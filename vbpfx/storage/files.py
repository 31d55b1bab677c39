"""Files: write them completely or not at all, with errors that name the path.

A single file is written under a temporary name and then renamed. Several files that belong together are first all
written under temporary names. Then a list of the renames to do is put in place, by one rename. From this moment on the
new files count: whoever reads or writes the folder next does the remaining renames on the list. So a process that is
killed at any moment leaves either all old files or all new ones.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vbpfx.errors import ArtifactError

Write = Callable[[Path], None]


_RENAMES = ".vbpfx-renames.json"


def write_atomically(files: Mapping[Path, Write]) -> None:
    """Write files of one folder, all of them or none.

    If the process is killed or the disk is full, the old files remain, because no file gets its name before all are
    written. Before :func:`settle` is called, a folder may hold a mixture of old and new files.

    Raises:
        ArtifactError: the folder cannot be made or a file cannot be written.
    """
    written: dict[Path, Path] = {}
    path = Path()
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            settle(path.parent)
            _remove_remains(path)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
            os.close(handle)
            written[path] = Path(name)
            write(written[path])
            written[path].chmod(0o666 & ~_umask())
        if len(written) > 1:
            renames = {temporary.name: path.name for path, temporary in written.items()}
            write_atomically({path.parent / _RENAMES: json_writer(renames)})
            settle(path.parent)
        else:
            for path, temporary in written.items():
                temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        if (
            len(written) == 1 or not (path.parent / _RENAMES).exists()
        ):  # otherwise they are the new files, which only need to be renamed
            for temporary in written.values():
                temporary.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Finish the renames that another process had begun. Call this before reading a folder.

    Raises:
        ArtifactError: a file cannot be renamed, or the list of renames was not written by :func:`write_atomically`.
    """
    renames = folder / _RENAMES
    if not renames.exists():
        return
    left = read_json(renames)
    if not isinstance(left, dict) or not all(
        isinstance(final, str) and name.startswith(f".{final}.") and not {"/", "\\"} & {*name, *final}
        for name, final in left.items()
    ):
        raise ArtifactError(
            f"{renames} is not a list of files to rename in {folder}; remove it, and save the network again"
        )
    try:
        for name, final in left.items():
            with suppress(FileNotFoundError):
                (folder / name).replace(folder / final)
        renames.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot finish what was written to {folder}: {error.strerror or error}") from error


def _unwritable(path: Path, error: Exception) -> ArtifactError:
    said = getattr(error, "strerror", None) or error
    return ArtifactError(f"cannot write {path}: {said}; choose a folder that can be written, on a disk with room")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into. It gets the given name when the context ends, and is removed on an error.

    Raises:
        ArtifactError: something exists under that name already, or the folder cannot be written.
    """
    require_new(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_prefix(folder)))
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o666 & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Raise an ArtifactError if the path is a file, or a folder that is not empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise ArtifactError(f"{folder} exists already and is not overwritten; choose another folder, or remove it")


def _prefix(path: Path) -> str:
    """Return the beginning of the names of this process's unfinished files."""
    return f".{path.name}.{socket.gethostname()}-{os.getpid()}."


def _remove_remains(path: Path) -> None:
    """Remove the unfinished files that killed processes of this machine have left."""
    if os.name != "posix":
        return
    host = socket.gethostname()
    for remains in path.parent.glob(f".{glob.escape(f'{path.name}.{host}-')}*"):
        number = remains.name.removeprefix(f".{path.name}.{host}-").partition(".")[0]
        if number.isdecimal() and not _is_alive(int(number)):
            if remains.is_dir():
                shutil.rmtree(remains, ignore_errors=True)
            else:
                remains.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


def make_folder(folder: Path) -> Path:
    """Make the folder if needed, check that files can be written to it, and return it.

    Call this before the work whose results it will hold.

    Raises:
        ArtifactError: the folder cannot be made, or files in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder that can be written, for the work in this context.

    If the work fails, the folders that were made here are removed again, unless they hold something.

    Raises:
        ArtifactError: the folder cannot be made, or files in it cannot be written.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_writer(data: Any) -> Write:
    """Return a function that writes the data to a path as JSON."""
    text = json.dumps(data, indent=1) + "\n"

    def write(path: Path) -> None:
        path.write_text(text)

    return write


def text_writer(text: str) -> Write:
    """Return a function that writes the text to a path as UTF-8."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Write:
    """Return a function that writes the tensors to a path as safetensors."""

    def write(path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}))

    return write


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or truncated, or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}); save the network again") from error
