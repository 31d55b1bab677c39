"""Tensors in safetensors files: read them one at a time, and write them shard by shard.

The layout is that of Hugging Face: either ``model.safetensors``, or files ``model-00001-of-00003.safetensors`` and so
on with an index ``model.safetensors.index.json``, which says which file holds which tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vbpfx.errors import ArtifactError, ModelError, first_line
from vbpfx.storage.files import json_writer, read_json, safetensors_writer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """Tensors that are stored in files.

    Attributes:
        files: name of a tensor -> the file that holds it.
        shapes: name of a tensor -> an empty tensor of its shape and dtype on the meta device.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, Tensor]

    @classmethod
    def of(cls, weights: str | Path | Iterable[str | Path]) -> Stored:
        """Return the tensors in a folder (by its index, or in its ``model.safetensors``), in a file or in several files.

        Raises:
            ModelError: a file is missing, is damaged or is not safetensors; or two files hold tensors of the same name.
        """
        single = isinstance(weights, (str, Path))
        paths = _files_of(Path(weights)) if single else [Path(path) for path in weights]  # type: ignore[arg-type, union-attr]
        files: dict[str, Path] = {}
        shapes: dict[str, Tensor] = {}
        for path in paths:
            for name, shape in _shapes(path):
                if name in files:
                    raise ModelError(f"{path} holds {name}, and so does {files[name]}: pass the files of one model")
                files[name], shapes[name] = path, shape
        if not files:
            raise ModelError(
                "no file of weights was given; pass the safetensors files that hold the model's state dict"
            )
        return cls(files, shapes)

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        It is a copy, because a tensor in the file's memory may be unaligned, and then other kernels would run.

        Raises:
            ModelError: the file has changed since it was first read.
        """
        try:
            # the file is opened for every tensor, because the pages of a mapped file count as memory of this process
            with safe_open(self.files[name], "pt") as file:
                return file.get_tensor(name).clone()  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {name} from {self.files[name]}: {first_line(error)}") from error


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        if (path / INDEX).exists():
            return _indexed_files(path)
        path = path / WHOLE
    if not path.exists():
        raise ModelError(f"{path} is missing; pass safetensors files, or a folder with {WHOLE} or {INDEX}")
    return [path]


def _indexed_files(folder: Path) -> list[Path]:
    """Return the files that a folder's index names.

    Raises:
        ModelError: the index is damaged.
    """
    try:
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    except (ArtifactError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is not an index of safetensors files: {first_line(error)}") from error
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ModelError(f"{folder / INDEX} names files outside of its folder")
    return [folder / name for name in names]


def _shapes(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                entry = file.get_slice(name)
                shape = entry.get_shape()
                dtype = entry[:0].dtype if shape else file.get_tensor(name).dtype
                yield name, torch.empty(shape, dtype=dtype, device="meta")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path} as safetensors: {first_line(error)}") from error


def write_shards(shapes: Mapping[str, Tensor], make: Callable[[str], Tensor], folder: Path, limit: int) -> list[Path]:
    """Write tensors to a folder, shard by shard; only one shard is in memory at a time.

    Args:
        shapes: name -> an empty tensor on the meta device, with the shape and dtype of the tensor that will be written.
        make: a function that returns the tensor with a name.
        limit: the largest size of a shard in bytes; a larger tensor gets a shard of its own.

    Returns:
        The paths of the files, including the index if there are several shards.
    """
    shards = list(_divided(shapes, limit))
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WHOLE]
    for file, shard in zip(names, shards, strict=True):
        # transformers requires the entry "format"
        safetensors_writer({name: make(name) for name in shard}, {"format": "pt"})(folder / file)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(map(_bytes, shapes.values()))
        paths.append(folder / INDEX)
        json_writer({"metadata": {"total_size": total}, "weight_map": where})(paths[-1])
    return paths


def byte_count(size: int | str) -> int:
    """Return a size in bytes, given as a number or as in Hugging Face: ``"500MB"``, ``"5GB"``.

    Raises:
        ArtifactError: the size is neither of these, or is not positive.
    """
    found = re.fullmatch(r"([\d.]+) *([KMG])B", str(size), re.IGNORECASE)
    try:
        count = int(float(found[1]) * 1000 ** (" KMG".index(found[2].upper()))) if found else int(size)
    except ValueError:
        count = 0
    if count < 1:
        raise ArtifactError(f"shard_size={size!r} is not a size; use a number of bytes, '500MB' or '5GB'")
    return count


def _divided(shapes: Mapping[str, Tensor], limit: int) -> Iterator[Sequence[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in shapes.items():
        if shard and size + _bytes(tensor) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(tensor)
    yield shard


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        # cloned because tensors in the file's memory may be unaligned, and then other kernels would run
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); save the network again") from error
