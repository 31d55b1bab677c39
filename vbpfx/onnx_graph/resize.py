"""ONNX's Resize: resample the positions of an image, independently in every channel.

Torch's ``interpolate`` supports only some of ONNX's coordinate transformations. This function supports all but
``tf_crop_and_resize``. See https://onnx.ai/onnx/operators/onnx__Resize.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Array, Builder, StatedNumber, Value, number, shape_of
from vbpfx.rules.norms import resizing
from vbpfx.rules.ops import register_operator

_ROUNDED: Mapping[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}
_TRANSFORMS = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


def resize(
    x: Tensor,
    sizes: Sequence[int | None] | None,
    scales: Sequence[float] | None,
    mode: str = "nearest",
    transform: str = "half_pixel",
    rounding: str = "round_prefer_floor",
    cubic: float = -0.75,
    exclude_outside: bool = False,
) -> Tensor:
    """Resample every axis behind the channels: y[i] = sum_k w_k(i) x[t_k(i)], with taps t and weights w of ``mode``.

    Args:
        x: (N, C, positions).
        sizes: the new size of every axis but the first, None for an axis that keeps its size. The channel axis has an
            entry, too, and keeps its size.
        scales: used if no sizes are given: an axis gets floor(scale times size) positions.
        mode, transform, rounding, cubic, exclude_outside: ONNX's mode, coordinate_transformation_mode, nearest_mode,
            cubic_coeff_a and exclude_outside.
    """
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        stated = sizes[axis - 1] if sizes is not None else None
        if scales is not None:
            scale = float(scales[axis - 2])
            made = math.floor(np.float32(scale) * np.float32(size))
        else:
            made = size if stated is None else stated
            scale = made / size
        if made == size and scale == 1:
            continue
        taps, weights = _taps(size, made, scale, mode, transform, rounding, cubic, exclude_outside)
        shape = [-1] + [1] * (x.ndim - 1 - axis)
        parts = [
            x.index_select(axis, torch.from_numpy(taps[:, k]).to(x.device))
            * (1 if weights is None else torch.from_numpy(weights[:, k]).to(x).reshape(shape))
            for k in range(taps.shape[1])
        ]
        x = parts[0]
        for part in parts[1:]:
            x = x + part
    return x


def _taps(
    size: int, made: int, scale: float, mode: str, transform: str, rounding: str, cubic: float, exclude_outside: bool
) -> tuple[Array, Array | None]:
    """Return which old positions every new one reads, and their weights: two arrays (positions, taps).

    The weights are None if every position reads one tap.
    """
    place = _places(size, made, scale, transform)
    if mode == "nearest":
        return np.clip(_ROUNDED[rounding](place), 0, size - 1).astype(np.int64)[:, None], None
    if mode == "linear":
        place = np.clip(place, 0, size - 1)
        first = np.floor(place)
        share = place - first
        taps = np.stack([first, np.minimum(first + 1, size - 1)], 1)
        return taps.astype(np.int64), np.stack([1 - share, share], 1)
    first = np.floor(place)
    taps = first[:, None] + np.arange(-1, 3)
    distance = np.abs(place[:, None] - taps)
    near = ((cubic + 2) * distance - (cubic + 3)) * distance * distance + 1
    far = ((cubic * distance - 5 * cubic) * distance + 8 * cubic) * distance - 4 * cubic
    weights = np.where(distance <= 1, near, far)
    if exclude_outside:
        weights = np.where((taps < 0) | (taps >= size), 0, weights)
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(taps, 0, size - 1).astype(np.int64), weights


def _places(size: int, made: int, scale: float, transform: str) -> Array:
    """Return the coordinate of each new position among the old ones, in float32 as runtimes compute it."""
    i, f = np.arange(made, dtype=np.float32), np.float32
    match transform:
        case "align_corners":
            return i * f(0) if made == 1 else i * f(size - 1) / f(made - 1)
        case "asymmetric":
            return i / f(scale)
        case "pytorch_half_pixel" if made == 1:
            return i * f(0)
        case "half_pixel_symmetric":
            middle = f(size) / f(2)
            return middle * (1 - f(made) / (f(scale) * f(size))) + (i + f(0.5)) / f(scale) - f(0.5)
    return (i + f(0.5)) / f(scale) - f(0.5)


def _resize(b: Builder) -> Value:
    x = b.tensor(0)
    ndim = len(shape_of(x))
    mode, transform = b.attribute("mode", "nearest"), b.attribute("coordinate_transformation_mode", "half_pixel")
    if ndim < 3:
        raise CaptureError(
            "its input has fewer than three axes, so there is nothing to resize behind samples and channels"
        )
    if transform not in _TRANSFORMS:
        raise CaptureError(f"coordinates that are transformed by {transform} are not supported")
    for option, usual in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        if (given_option := b.attribute(option, usual)) != usual:
            raise CaptureError(f"{option}={given_option} is not supported")
    axes = [axis % ndim for axis in b.attribute("axes") or range(ndim)]
    by_size = b.has(3) and len(b.numbers(3)) > 0
    given = dict(zip(axes, b.numbers(3 if by_size else 2), strict=True))
    unmoved = ((axis, given[axis]) for axis in (0, 1) if axis in given)
    if any(number(e) != (shape_of(x)[axis] if by_size else 1) for axis, e in unmoved):
        raise CaptureError("it resizes the batch or the channel axis; only the other axes can be resized")
    sizes = [given.get(axis) for axis in range(1, ndim)] if by_size else None
    scales = None if by_size else [given.get(axis, 1.0) for axis in range(2, ndim)]
    node = b.emit(
        resize, x, sizes, scales, mode, transform, b.attribute("nearest_mode", "round_prefer_floor"),
        b.attribute("cubic_coeff_a", -0.75), bool(b.attribute("exclude_outside", 0)),
    )  # fmt: skip
    if by_size and isinstance(given.get(1), int):
        b.states(node, ("args", 1, 0), StatedNumber(b.node, 3, axes.index(1)))
    return node


RESIZE: Mapping[str, Callable[[Builder], Any]] = {"Resize": _resize}
register_operator(resizing, resize, reads_sizes=True)
