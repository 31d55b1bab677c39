"""ONNX operators that reshape, slice, join and index tensors, as torch functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Builder, Constant, StatedNumber, Value, number, one_entry, pairs, shape_of
from vbpfx.onnx_graph.elementwise import dtype_of

_LARGEST = 2**31


def _reshape(b: Builder) -> Value:
    x, target = b.tensor(0), b.numbers(1)
    if not b.attribute("allowzero", 0):  # 0 stands for the input's own size
        target = [b.emit("size", x, i) if isinstance(e, int) and e == 0 else e for i, e in enumerate(target)]
    node = b.emit(torch.reshape, x, target)
    for index, entry in enumerate(target):
        if isinstance(entry, int):
            b.states(node, ("args", 1, index), StatedNumber(b.node, 1, index))
    return node


def _transpose(b: Builder) -> Value:
    x = b.tensor(0)
    order = b.attribute("perm") or list(reversed(range(len(shape_of(x)))))
    return b.emit(torch.permute, x, [int(dim) for dim in order])


def _flatten(b: Builder) -> Value:
    x, axis = b.tensor(0), b.attribute("axis", 1)
    ndim = len(shape_of(x))
    axis = axis % ndim if axis < 0 else axis
    if axis == 0:
        return b.emit(torch.reshape, x, [1, -1])
    if axis > 1:
        x = b.emit(torch.flatten, x, 0, axis - 1)
    return b.emit(torch.flatten, x, 1) if len(shape_of(x)) > 1 else b.emit(torch.unsqueeze, x, 1)


def _squeeze(b: Builder) -> Value:
    x, axes = b.tensor(0), b.integers(1, "axes")
    ndim = len(shape_of(x))
    dims = [i for i, size in enumerate(shape_of(x)) if size == 1] if axes is None else [axis % ndim for axis in axes]
    return b.emit(torch.squeeze, x, dims[0] if len(dims) == 1 else tuple(dims)) if dims else x


def _unsqueeze(b: Builder) -> Value:
    x, axes = b.tensor(0), b.integers(1, "axes") or []
    ndim = len(shape_of(x)) + len(axes)
    for axis in sorted(axis % ndim for axis in axes):
        x = b.emit(torch.unsqueeze, x, axis)
    return x


def _expand(b: Builder) -> Value:
    """Translate Expand. It broadcasts both ways: where the stated size is 1, the input keeps its size."""
    x, stated = b.tensor(0), b.numbers(1)
    shape = shape_of(x)
    ahead = max(0, len(shape) - len(stated))
    target = [-1] * ahead + [_expanded(entry, shape, i - len(stated)) for i, entry in enumerate(stated)]
    node = b.emit("expand", x, target)
    for index, entry in enumerate(target):
        if isinstance(entry, int) and entry != -1:
            b.states(node, ("args", 1, index), StatedNumber(b.node, 1, index - ahead))
    return node


def _expanded(entry: Any, shape: tuple[int, ...], back: int) -> Any:
    own = shape[back] if -back <= len(shape) else None
    return -1 if own is not None and number(entry) == 1 else entry


def _slice(b: Builder) -> Value:
    x, starts, ends = b.tensor(0), b.numbers(1), b.numbers(2)
    ndim = len(shape_of(x))
    axes = (b.integers(3, "axes") if b.has(3) else None) or list(range(len(starts)))
    steps = (b.integers(4, "steps") if b.has(4) else None) or [1] * len(starts)
    taken = [slice(None)] * ndim
    for i, axis in enumerate(axes):
        if steps[i] < 0:
            if not (steps[i] == -1 and _beyond(starts[i], from_end=True) and _beyond(ends[i])):
                raise CaptureError("it slices with a negative step, which is only supported for reversing a whole axis")
            x = b.emit(torch.flip, x, [axis % ndim])
            continue
        start, stop = None if _beyond(starts[i]) or starts[i] == 0 else starts[i], ends[i]
        taken[axis % ndim] = slice(start, None if _beyond(stop) else stop, steps[i] if steps[i] != 1 else None)
    if all(entry == slice(None) for entry in taken):
        return x
    node = b.emit(operator.getitem, x, tuple(taken))
    for i, axis in enumerate(axes):
        b.states(node, ("args", 1, axis % ndim, "start"), StatedNumber(b.node, 1, i))
        b.states(node, ("args", 1, axis % ndim, "stop"), StatedNumber(b.node, 2, i))
    return node


def _beyond(entry: Any, *, from_end: bool = False) -> bool:
    """Return whether a bound is one of the numbers that stand for the end of the axis."""
    return isinstance(entry, int) and (abs(entry) >= _LARGEST or (from_end and entry == -1))


def _split(b: Builder) -> Value | tuple[Value, ...]:
    x, axis, outputs = b.tensor(0), b.attribute("axis", 0), len(b.node.outputs)
    size = shape_of(x)[axis]
    sizes = b.integers(1, "split")
    if sizes is None:  # equal parts; the last one may be smaller
        part = -(-size // outputs)
        sizes = [part] * (outputs - 1) + [size - part * (outputs - 1)]
    node = b.emit(torch.split, x, sizes, axis)
    for index in range(len(sizes)):
        b.states(node, ("args", 1, index), StatedNumber(b.node, 1, index))
    return tuple(b.emit(operator.getitem, node, index) for index in range(outputs))


def _concat(b: Builder) -> Value:
    return b.emit(torch.cat, [b.tensor(i) for i in range(len(b.node.inputs))], b.attribute("axis", 0))


def _gather(b: Builder) -> Value:
    data, axis = b.value(0), b.attribute("axis", 0)
    entry = one_entry(b.value(1))
    ids = b.constant(1)
    if isinstance(entry, int) and ids is not None and ids.ndim == 0:
        return b.emit(torch.select, b.tensor(0), axis, entry)
    matrix = isinstance(data, Constant) and data.array.ndim == 2 and data.array.dtype.kind == "f" and axis == 0
    if matrix:
        return b.emit(F.embedding, b.tensor(1), b.tensor(0))
    x = b.tensor(0)
    return b.emit(operator.getitem, x, (*[slice(None)] * (axis % len(shape_of(x))), b.tensor(1)))


def _gather_elements(b: Builder) -> Value:
    return b.emit(torch.gather, b.tensor(0), b.attribute("axis", 0), b.tensor(1))


def _gather_nd(b: Builder) -> Value:
    if b.attribute("batch_dims", 0):
        raise CaptureError("batch_dims are not supported")
    index = b.tensor(1)
    parts = [b.emit(torch.select, index, -1, i) for i in range(shape_of(index)[-1])]
    return b.emit(operator.getitem, b.tensor(0), tuple(parts))


def _array_feature_extractor(b: Builder) -> Value:
    x, ids = b.tensor(0), b.tensor(1)
    taken = b.emit(operator.getitem, x, (*[slice(None)] * (len(shape_of(x)) - 1), b.emit(torch.flatten, ids)))
    return b.emit(torch.unsqueeze, taken, 0) if len(shape_of(x)) == 1 else taken


def _scalar(b: Builder, index: int) -> Any:
    entry = one_entry(b.value(index))
    if entry is None:
        raise CaptureError(f"its input {index} is computed from values, where sizes or constants are expected")
    return entry


def _range(b: Builder) -> Value:
    return b.emit(torch.arange, *(_scalar(b, i) for i in range(3)))


def _constant_of_shape(b: Builder) -> Value:
    found = b.attribute("value")
    fill = found.numpy().reshape(-1)[0] if found is not None else 0.0
    dtype = torch.float32 if found is None else dtype_of(found.dtype)
    return b.emit(torch.full, b.numbers(0), getattr(fill, "item", lambda: fill)(), dtype=dtype)


def _tile(b: Builder) -> Value:
    return b.emit("repeat", b.tensor(0), b.numbers(1))


def _pad(b: Builder) -> Value:
    x, mode = b.tensor(0), b.attribute("mode", "constant")
    before, after = pairs(b.numbers(1))
    ndim = len(shape_of(x))
    axes = [axis % ndim for axis in (b.integers(3, "axes") if b.has(3) else None) or range(ndim)]
    amounts: list[Any] = [0] * 2 * ndim
    for axis, first, last in zip(axes, before, after, strict=True):
        amounts[2 * (ndim - 1 - axis) : 2 * (ndim - axis)] = first, last
    fill = _scalar(b, 2) if b.has(2) else 0.0
    if mode == "constant":
        return b.emit(F.pad, x, amounts, "constant", fill)
    while len(amounts) > 2 and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    return b.emit(F.pad, x, amounts, {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def _triangle(b: Builder) -> Value:
    diagonal = int(_scalar(b, 1)) if b.has(1) else 0
    return b.emit(torch.triu if b.attribute("upper", 1) else torch.tril, b.tensor(0), diagonal)


SHAPES: Mapping[str, Callable[[Builder], Any]] = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ai.onnx.ml.ArrayFeatureExtractor": _array_feature_extractor,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Tile": _tile,
    "Pad": _pad,
    "Trilu": _triangle,
}
