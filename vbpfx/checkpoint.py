"""Checkpoints: a training run in one file, without pickle.

Tensors lie in a safetensors file, everything else as JSON in its header. One file is one rename, so that a run that is
killed at any moment leaves the old checkpoint or the new one, and never halves of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vbpfx.errors import FinetuneError
from vbpfx.files import safetensors_writer, write_atomically

_KEY = "vbpfx.finetune"
_FORMAT = 1


def save_checkpoint(path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        run: what makes the run this run; :func:`load_checkpoint` compares it.
        data: the rest, as JSON can hold it.

    Raises:
        ArtifactError: the file cannot be written.
    """
    about = json.dumps({"format": _FORMAT, "run": dict(run), "data": dict(data)})
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses tensors that share memory
    write_atomically({path: safetensors_writer(own, {_KEY: about})})


def load_checkpoint(path: Path, run: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and data of a checkpoint of the same run.

    Raises:
        FinetuneError: the file is damaged, or of a run with other networks, data or settings.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            # cloned: tensors as they lie in the file are not aligned, and other kernels would run
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 # no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FinetuneError(
            f"{path} is no checkpoint of finetune, or damaged ({type(error).__name__}: {error}); remove it, or pass resume=False"
        ) from error
    if about["format"] != _FORMAT:
        raise FinetuneError(f"{path} has format {about['format']}, this vbpfx reads {_FORMAT}; pass resume=False")
    here = json.loads(json.dumps(dict(run)))
    other = [f"{key} is {about['run'].get(key)!r} there, {value!r} here" for key, value in here.items()
             if about["run"].get(key) != value]  # fmt: skip
    if other:
        raise FinetuneError(f"{path} is of another run: {'; '.join(other)}. Pass another folder, or resume=False")
    return tensors, about["data"]


def digest(network: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
