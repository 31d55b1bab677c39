"""Open data for an ONNX file from one path: arrays for its inputs, or a folder of images if it takes images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from vbpfx.data.array_batches import ArrayBatches
from vbpfx.data.batches import Data
from vbpfx.data.reader import ReadOptions
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
    """Read the samples at a path in batches for an ONNX file, with the file's own batch size if that is fixed.

    An array of an ``.npz`` belongs to the input of the same name. It has the axes of the input, with all samples along
    the batch axis. The batch axis has the same name in all inputs. Alternatively, all arrays have an extra axis in
    front, and each entry along it is a batch. An array without a batch axis, such as a number, is passed with every
    batch.

    A folder of images can be read if the file has one input of (samples, channels, height, width). If the file does
    not state these sizes, pass ``shape``.

    Args:
        path: the ONNX file.
        data: ``.npy``, ``.npz``, or a folder of images.
        batch, limit, seed, shape, reading: as for :func:`vbpfx.open_data`. If each entry of an array is a batch,
            ``limit`` counts batches.

    Raises:
        CalibrationError: the data cannot be read, or does not fit the file.
    """
    data = Path(data)
    require_options_for(data, ReadOptions(batch=batch, limit=limit, shape=shape, **reading))
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
    """A stand-in for the model that :func:`vbpfx.open_data` needs. An ONNX file does not say how to prepare images."""


def _images(data: Path, fixed: int | None, *, batch: int, limit: int | None, **reading: Any) -> Data:
    """Return the images of a folder. If the file's batch size is fixed, a last incomplete batch is left out."""
    found = open_data(data, OnnxFile(), batch=fixed or batch, limit=limit, **reading)
    rest = found.samples % found.batch if fixed else 0
    if rest == found.samples:
        raise CalibrationError(
            f"the network takes batches of {fixed} samples, and {data} has {found.samples}; pass at least {fixed}"
        )
    return open_data(data, OnnxFile(), batch=found.batch, limit=found.samples - rest, **reading) if rest else found


def _image_shape(path: Path, inputs: Sequence[ir.Value]) -> tuple[int, ...]:
    """Return the channels, height and width of the images that a file takes.

    Raises:
        CalibrationError: the file does not state them, or does not take images.
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
