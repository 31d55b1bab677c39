"""Data for an ONNX file from one path: arrays for its inputs, or a folder of images where it takes images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from vbpfx.data.array_batches import ArrayBatches
from vbpfx.data.batches import Data
from vbpfx.data.sources import open_data, require_options_for
from vbpfx.errors import CalibrationError
from vbpfx.onnx_graph.axes import stated_axes_of_samples
from vbpfx.onnx_graph.file import fixed_batch, read_model, true_inputs


def data_for_file(
    path: str | Path,
    data: str | Path,
    *,
    batch: int = 32,
    limit: int | None = None,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
    **reading: Any,
) -> ArrayBatches | Data:
    """The samples at a path in batches for an ONNX file, of the file's own batch size where that is fixed.

    An array of an ``.npz`` belongs to the input of its name. It has the input's axes, with all samples on the axis that the input
    has them on (the file says which: they have one name), or one more in front, where all arrays do: then each entry is a batch. What
    has no axis of samples, such as a number, goes with every batch.

    A folder of images is read for a file with one input of (samples, channels, height, width). Where the file does not state these
    sizes, ``shape`` does.

    Args:
        path: the ONNX file.
        data: ``.npy``, ``.npz``, or a folder of images.
        batch, limit, seed, shape, reading: as :func:`vbpfx.open_data` takes them. ``limit`` counts batches where each entry of an array
            is one.

    Raises:
        CalibrationError: the data cannot be read, or does not go with the file.
    """
    data = Path(data)
    require_options_for(data, batch=batch, limit=limit, shape=shape, **reading)
    model = read_model(Path(path))
    inputs, fixed = true_inputs(model), fixed_batch(model)
    if data.is_dir():
        shape = shape or _image_shape(Path(path), inputs)
        return _images(data, fixed, batch=batch, limit=limit, seed=seed, shape=shape, **reading)
    axes, ranks = stated_axes_of_samples(inputs), {str(v.name): len(v.shape) for v in inputs if v.shape is not None}
    if data.suffix == ".npy":
        first = str(inputs[0].name)
        axes, ranks = {"": axes[first]}, {"": ranks[first]} if first in ranks else {}
    return ArrayBatches(data, fixed or batch, whole=fixed is not None, axes=axes, ranks=ranks, limit=limit, seed=seed)


class OnnxFile(nn.Module):
    """Stands where :func:`vbpfx.open_data` asks for a model: an ONNX file does not say how images are prepared."""


def _images(data: Path, fixed: int | None, *, batch: int, limit: int | None, **reading: Any) -> Data:
    """The images of a folder; where the file's batch size is fixed, no more of them than fill whole batches."""
    found = open_data(data, OnnxFile(), batch=fixed or batch, limit=limit, **reading)
    rest = found.samples % found.batch if fixed else 0
    if rest == found.samples:
        raise CalibrationError(
            f"the network takes batches of {fixed} samples, and {data} has {found.samples}; pass at least {fixed}"
        )
    return open_data(data, OnnxFile(), batch=found.batch, limit=found.samples - rest, **reading) if rest else found


def _image_shape(path: Path, inputs: Sequence[ir.Value]) -> tuple[int, ...]:
    """Channels, height and width of the images that a file takes.

    Raises:
        CalibrationError: the file does not say, or takes something else.
    """
    sizes = list(inputs[0].shape or ()) if len(inputs) == 1 else []
    image = tuple(size for size in sizes[1:] if isinstance(size, int))
    if len(sizes) == 4 and len(image) == 3 and image[0] in (1, 3):
        return image
    if len(sizes) == 4 and sizes[1] in (1, 3):
        raise CalibrationError(
            f"{path} does not state the height and the width of its images; pass shape=(3, 224, 224) (--shape 3x224x224)"
        )
    taken = ", ".join(f"{v.name!r} ({', '.join(map(str, v.shape)) if v.shape is not None else '?'})" for v in inputs)
    raise CalibrationError(
        f"a folder of images is for a file with one input of (samples, channels, height, width); {path} takes {taken}. "
        f"Pass an .npz with one array for each input, stored under its name"
    )
