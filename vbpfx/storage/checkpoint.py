"""Checkpoints: save the state of a long run in one file, without pickle.

Tensors are saved in a safetensors file, and everything else as JSON in its header. The file is put in place by one
rename. So a run that is killed at any moment leaves the old checkpoint or the new one, and never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vbpfx.errors import ArtifactError, FinetuneError, VbpfxError
from vbpfx.storage.files import safetensors_writer, write_atomically

_FORMAT = 2


@dataclass(frozen=True)
class Kind:
    """The kind of run that a checkpoint belongs to.

    Attributes:
        name: its name.
        error: the class of the error that is raised when a file is not such a checkpoint.
        instead: what the user can do when the checkpoint cannot be used.
    """

    name: str
    error: type[VbpfxError]
    instead: str

    @property
    def key(self) -> str:
        """The key in a file's header under which checkpoints of this kind keep their data."""
        return f"vbpfx.{self.name}"


FINETUNE = Kind("finetune", FinetuneError, "pass another folder, or resume=False")
CALIBRATION = Kind("calibration", ArtifactError, "remove it, or pass another folder as checkpoint=")


def save_checkpoint(
    kind: Kind, path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> None:
    """Write a checkpoint.

    Args:
        run: what identifies the run (networks, data, settings); :func:`load_checkpoint` compares it.
        data: everything else that is to be saved; it must be possible to write it as JSON.

    Raises:
        ArtifactError: the file cannot be written.
    """
    own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # safetensors forbids shared memory
    about = {"format": _FORMAT, "sum": _checksum(own), "run": dict(run), "data": dict(data)}
    write_atomically({path: safetensors_writer(own, {kind.key: json.dumps(about)})})


def load_checkpoint(kind: Kind, path: Path, run: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data of a checkpoint of the same run.

    Raises:
        VbpfxError: the file is damaged, or belongs to a run with other networks, data or settings. The error's class is
            ``kind.error``.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[kind.key])
            # cloned because tensors in the file's memory may be unaligned, and then other kernels would run
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 # no mapping
        number, theirs, data = about["format"], about["run"], about["data"]
        if number == _FORMAT and about["sum"] != _checksum(tensors):
            raise ValueError("the checksum is not that of its tensors")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise kind.error(
            f"{path} is not a checkpoint of {kind.name}, or damaged ({type(error).__name__}: {error}); {kind.instead}"
        ) from error
    if number != _FORMAT:
        raise kind.error(f"{path} has format {number}, this vbpfx reads {_FORMAT}; {kind.instead}")
    here = json.loads(json.dumps(dict(run)))
    other = [f"{key} was {theirs.get(key)!r} in that run and is {value!r} now" for key, value in here.items()
             if theirs.get(key) != value]  # fmt: skip
    if other:
        raise kind.error(f"{path} was written by another run: {'; '.join(other)}; {kind.instead}")
    return tensors, data


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of the names and bytes of all parameters and buffers."""
    return tensors_digest(dict((*network.named_parameters(), *network.named_buffers())))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), found))
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
