"""Arithmetic on sizes, entry by entry: what exporters compute between a ``Shape`` and the ``Reshape`` that reads it."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Array, Builder, Constant, Sizes, Value, number, shape_of


def as_value(entries: Array) -> Value:
    """Return the entries as sizes, or as a constant if none of them is computed."""
    if any(isinstance(entry, fx.Node) for entry in entries.flat):
        return Sizes(entries)
    plain = entries.tolist()
    kinds = {type(entry) for entry in entries.flat}
    return Constant(np.array(plain, bool if kinds == {bool} else np.float32 if float in kinds else np.int64))


def _shape(b: Builder) -> Value:
    """Translate Shape: the size of every axis is an entry of its own."""
    start, end = b.attribute("start", 0), b.attribute("end")
    found = b.value(0)
    if isinstance(found, (Constant, Sizes)):
        whole = found.array.shape if isinstance(found, Constant) else found.entries.shape
        return Constant(np.array(whole[start:end], np.int64))
    dims = range(len(shape_of(found)))[start:end]
    return as_value(_objects([b.emit("size", found, dim) for dim in dims]))


def _count(b: Builder) -> Value:
    """Translate Size: the number of entries of a tensor."""
    return as_value(_objects(b.emit("numel", b.tensor(0))))


def _objects(entries: Any) -> Array:
    made = np.empty(len(entries) if isinstance(entries, list) else (), dtype=object)
    made[...] = entries
    return made


def entries_of(value: Value) -> Array:
    """Return a constant or sizes as an array of numbers and nodes."""
    assert isinstance(value, (Constant, Sizes))
    if isinstance(value, Sizes):
        return value.entries
    made = np.empty(value.array.shape, dtype=object)
    made[...] = value.array.tolist()
    return made


def takes_sizes(b: Builder) -> bool:
    """Return whether the current node computes with sizes rather than with tensors."""
    first = b.node.op_type in _OF_ONE
    values = [b.value(i) for i in range(1 if first else len(b.node.inputs)) if b.has(i)]
    return any(isinstance(v, Sizes) for v in values) and not any(isinstance(v, fx.Node) for v in values)


def _gather(b: Builder) -> Value:
    index = b.constant(1)
    if index is None:
        raise CaptureError("it indexes a shape with a computed index; only constant indices are supported")
    taken = np.take(entries_of(b.value(0)), index, axis=b.attribute("axis", 0))
    return as_value(taken if isinstance(taken, np.ndarray) else _objects(taken))


def _slice(b: Builder) -> Value:
    entries = entries_of(b.value(0))
    starts, ends = b.integers(1, "starts") or [], b.integers(2, "ends") or []
    axes = (b.integers(3, "axes") if b.has(3) else None) or list(range(len(starts)))
    steps = (b.integers(4, "steps") if b.has(4) else None) or [1] * len(starts)
    taken = [slice(None)] * entries.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop = None if step < 0 and end < -entries.shape[axis] else end  # down to the first entry
        taken[axis] = slice(start, stop, step)
    return as_value(entries[tuple(taken)])


def _transpose(b: Builder) -> Value:
    return as_value(np.transpose(entries_of(b.value(0)), b.attribute("perm")))


def _concat(b: Builder) -> Value:
    parts = [entries_of(b.value(i)) for i in range(len(b.node.inputs))]
    return as_value(np.concatenate(parts, axis=b.attribute("axis", 0)))


def _unsqueeze(b: Builder) -> Value:
    return as_value(np.expand_dims(entries_of(b.value(0)), tuple(b.integers(1, "axes") or ())))


def _squeeze(b: Builder) -> Value:
    axes = b.integers(1, "axes")
    return as_value(np.squeeze(entries_of(b.value(0)), None if axes is None else tuple(axes)))


def _reshape(b: Builder) -> Value:
    return as_value(entries_of(b.value(0)).reshape([int(entry) for entry in b.numbers(1)]))


def _expand(b: Builder) -> Value:
    target = [int(entry) for entry in b.numbers(1)]
    entries = entries_of(b.value(0))
    return as_value(np.broadcast_to(entries, np.broadcast_shapes(entries.shape, target)))


def _product(b: Builder) -> Value:
    total: Any = 1
    for entry in entries_of(b.value(0)).flat:
        total = _apply(b, operator.mul, total, entry)
    return as_value(_objects([total] if b.attribute("keepdims", 1) else total))


def _cast(b: Builder) -> Value:
    to = ir.DataType(b.attribute("to"))
    kind = float if to.is_floating_point() else bool if to == ir.DataType.BOOL else int

    def convert(entry: Any) -> Any:
        return entry if isinstance(number(entry), kind) else _apply(b, kind, entry)

    return as_value(_map(convert, entries_of(b.value(0))))


def _where(b: Builder) -> Value:
    def choose(condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(condition, fx.Node):
            raise CaptureError("it chooses between sizes by a condition that depends on sizes")
        return yes if condition else no

    return as_value(_map(choose, *(entries_of(b.value(i)) for i in range(3))))


def _entrywise(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    def operate(b: Builder) -> Value:
        arrays = [entries_of(b.value(i)) for i in range(len(b.node.inputs))]
        return as_value(_map(lambda *entries: _apply(b, function, *entries), *arrays))

    return operate


def _apply(b: Builder, function: Callable[..., Any], *entries: Any) -> Any:
    if not any(isinstance(entry, fx.Node) for entry in entries):
        return function(*entries)
    known = [entry for entry in entries if not isinstance(entry, fx.Node)]
    if function is operator.eq and known and known[0] < 0:
        return False  # a size is never negative, so it is not a placeholder such as -1
    if function is _divide:
        whole = all(isinstance(number(entry), int) for entry in entries)
        function = operator.floordiv if whole else operator.truediv
    return b.emit(function, *entries)


def _divide(x: Any, y: Any) -> Any:
    return x // y if isinstance(x, int) and isinstance(y, int) else x / y


def _map(function: Callable[..., Any], *arrays: Array) -> Array:
    broadcast = np.broadcast_arrays(*arrays)
    made = np.empty(broadcast[0].shape, dtype=object)
    for index in np.ndindex(made.shape):
        made[index] = function(*(array[index] for array in broadcast))
    return made


_OF_ONE = frozenset({"Gather", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "ReduceProd", "Cast"})
# How operators compute with sizes. Operators that are not listed take sizes as tensors.
SIZE_OPERATORS: Mapping[str, Callable[[Builder], Value]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Transpose": _transpose,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "ReduceProd": _product,
    "Cast": _cast,
    "Where": _where,
    "Add": _entrywise(operator.add),
    "Sub": _entrywise(operator.sub),
    "Mul": _entrywise(operator.mul),
    "Div": _entrywise(_divide),
    "Mod": _entrywise(operator.mod),
    "Neg": _entrywise(operator.neg),
    "Pow": _entrywise(operator.pow),
    "Equal": _entrywise(operator.eq),
    "Less": _entrywise(operator.lt),
    "Greater": _entrywise(operator.gt),
    "Min": _entrywise(builtins.min),
    "Max": _entrywise(builtins.max),
    "Sqrt": _entrywise(math.sqrt),
    "Floor": _entrywise(math.floor),
    "Ceil": _entrywise(math.ceil),
}
# Operators that make sizes of a tensor.
READ_SIZES: Mapping[str, Callable[[Builder], Value]] = {"Shape": _shape, "Size": _count}
