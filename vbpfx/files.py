"""Files: a write is whole or not at all, and an error names the path."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vbpfx.errors import ArtifactError

Write = Callable[[Path], None]


def write_atomically(files: Mapping[Path, Write]) -> None:
    """Write all files beside their paths, then rename them.

    A process that is killed, or a disk that fills, leaves the old files: nothing takes its name before
    everything is written.

    Raises:
        ArtifactError: a folder cannot be made or a file cannot be written.
    """
    written: dict[Path, Path] = {}
    path = Path()
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            written[path] = Path(name)
            write(written[path])
            written[path].chmod(0o666 & ~_umask())
        for path, temporary in written.items():
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose a folder that can be written, "
            f"on a disk with room"
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """The folder, made if need be, before any work goes into what it will hold.

    Raises:
        ArtifactError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_writer(data: Any) -> Write:
    """Writes data as JSON."""
    text = json.dumps(data, indent=1) + "\n"

    def write(path: Path) -> None:
        path.write_text(text)

    return write


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Write:
    """Writes tensors as safetensors."""

    def write(path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}))

    return write


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing, truncated or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}); save the network again") from error
