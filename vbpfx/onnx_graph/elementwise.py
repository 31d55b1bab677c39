"""Elementwise ONNX operators, as torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Builder, Value, one_entry, shape_of

# The precisions in which weights can be stored and computed.
FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.DOUBLE: np.float64, ir.DataType.FLOAT16: np.float16}
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float32,  # the fx graph computes in float32
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


def dtype_of(kind: int) -> torch.dtype:
    """Return the torch dtype of an ONNX data type."""
    found = DTYPES.get(ir.DataType(kind))
    if found is None:
        raise CaptureError(f"its data type {ir.DataType(kind).name} is not supported")
    return found


def _operands(b: Builder) -> list[Any]:
    """Return all inputs; one with a single entry becomes a number, unless it has more axes than all other tensors."""
    values = [b.value(i) for i in range(len(b.node.inputs))]
    ndim = max((len(shape_of(v)) for v in values if isinstance(v, fx.Node)), default=-1)
    found = []
    for i, value in enumerate(values):
        entry = one_entry(value)
        axes = getattr(value, "array", getattr(value, "entries", None))
        plain = entry is not None and axes is not None and axes.ndim <= ndim and not isinstance(entry, bool)
        found.append(entry if plain else b.tensor(i))
    return found


def _unary(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    return lambda b: b.emit(function, b.tensor(0))


def _binary(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    def operate(b: Builder) -> Value:
        x, y = _operands(b)
        return b.emit(function, x, y)

    return operate


def _logical(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    return lambda b: b.emit(function, b.tensor(0), b.tensor(1))


def _division(b: Builder) -> Value:
    x, y = _operands(b)
    values = [v.meta["val"] if isinstance(v, fx.Node) else v for v in (x, y)]
    whole = all(isinstance(v, int) or (isinstance(v, torch.Tensor) and not v.is_floating_point()) for v in values)
    return b.emit(torch.div, x, y, rounding_mode="trunc") if whole else b.emit(torch.div, x, y)


def _subtraction(b: Builder) -> Value:
    x, y = _operands(b)
    return b.emit(torch.sub, x, y) if isinstance(x, fx.Node) else b.emit(torch.rsub, y, x)


def _power(b: Builder) -> Value:
    x, y = _operands(b)
    return b.emit(torch.pow, x, y)


def _modulo(b: Builder) -> Value:
    x, y = _operands(b)
    return b.emit(torch.fmod if b.attribute("fmod", 0) else torch.remainder, x, y)


def _extreme(function: Callable[..., Any], bound: str) -> Callable[[Builder], Value]:
    """Translate Min or Max of any number of operands."""

    def operate(b: Builder) -> Value:
        operands = _operands(b)
        tensors = [x for x in operands if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor)]
        numbers = [x for x in operands if x not in tensors]
        found = tensors[0]
        for other in tensors[1:]:
            found = b.emit(function, found, other)
        for other in numbers:
            found = b.emit(torch.clamp, found, **{bound: other})
        return found

    return operate


def _sum(b: Builder) -> Value:
    found = b.tensor(0)
    for index in range(1, len(b.node.inputs)):
        found = b.emit(torch.add, found, b.tensor(index))
    return found


def _mean(b: Builder) -> Value:
    return b.emit(torch.div, _sum(b), len(b.node.inputs))


def _shrink(b: Builder) -> Value:
    """Translate Shrink: x + bias below -lambd, x - bias above lambd, 0 between."""
    x, bias, bound = b.tensor(0), b.attribute("bias", 0.0), b.attribute("lambd", 0.5)
    below = b.emit(torch.where, b.emit(torch.lt, x, -bound), b.emit(torch.add, x, bias), 0.0)
    return b.emit(torch.where, b.emit(torch.gt, x, bound), b.emit(torch.sub, x, bias), below)


def _clip(b: Builder) -> Value:
    bounds = {}
    for index, name in ((1, "min"), (2, "max")):
        if b.has(index):
            entry = one_entry(b.value(index))
            bounds[name] = b.tensor(index) if entry is None else entry
    return b.emit(torch.clamp, b.tensor(0), **bounds) if bounds else b.tensor(0)


def _where(b: Builder) -> Value:
    condition = b.tensor(0)
    ndim = len(shape_of(condition))
    taken: list[Any] = []
    for i in (1, 2):
        entry, array = one_entry(b.value(i)), b.constant(i)
        plain = isinstance(entry, float) and array is not None and array.ndim <= ndim
        taken.append(entry if plain else b.tensor(i))
    return b.emit(torch.where, condition, *taken)


def _cast(b: Builder) -> Value:
    return b.emit("to", b.tensor(0), dtype_of(b.attribute("to")))


def _cast_like(b: Builder) -> Value:
    return b.emit("to", b.tensor(0), b.tensor(1).meta["val"].dtype)


def _gelu(b: Builder) -> Value:
    return b.emit(F.gelu, b.tensor(0), approximate=b.attribute("approximate", "none"))


def _fast_gelu(b: Builder) -> Value:
    x = b.emit(torch.add, b.tensor(0), b.tensor(1)) if b.has(1) else b.tensor(0)
    return b.emit(F.gelu, x, approximate="tanh")


def _bias_gelu(b: Builder) -> Value:
    return b.emit(F.gelu, b.emit(torch.add, b.tensor(0), b.tensor(1)))


def _quick_gelu(b: Builder) -> Value:
    x = b.tensor(0)
    return b.emit(torch.mul, x, b.emit(torch.sigmoid, b.emit(torch.mul, x, b.attribute("alpha", 1.702))))


def _swish(b: Builder) -> Value:
    x = b.tensor(0)
    return b.emit(torch.mul, x, b.emit(torch.sigmoid, b.emit(torch.mul, x, b.attribute("alpha", 1.0))))


def _leaky_relu(b: Builder) -> Value:
    return b.emit(F.leaky_relu, b.tensor(0), b.attribute("alpha", 0.01))


def _elu(b: Builder) -> Value:
    return b.emit(F.elu, b.tensor(0), b.attribute("alpha", 1.0))


def _celu(b: Builder) -> Value:
    return b.emit(F.celu, b.tensor(0), b.attribute("alpha", 1.0))


def _thresholded_relu(b: Builder) -> Value:
    return b.emit(F.threshold, b.tensor(0), b.attribute("alpha", 1.0), 0.0)


def _hard_sigmoid(b: Builder) -> Value:
    scaled = b.emit(torch.mul, b.tensor(0), b.attribute("alpha", 0.2))
    return b.emit(torch.clamp, b.emit(torch.add, scaled, b.attribute("beta", 0.5)), min=0.0, max=1.0)


def _prelu(b: Builder) -> Value:
    """Translate PRelu. ONNX broadcasts the slope from the last axis; torch has one slope per channel."""
    x = b.tensor(0)
    below = b.emit(torch.mul, b.emit(torch.clamp, x, max=0.0), b.tensor(1))
    return b.emit(torch.add, b.emit(torch.relu, x), below)


def _identity(b: Builder) -> Value:
    return b.value(0)


ELEMENTWISE: Mapping[str, Callable[[Builder], Value]] = {
    "Identity": _identity,
    "Dropout": _identity,
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Selu": _unary(F.selu),
    "HardSwish": _unary(F.hardswish),
    "Mish": _unary(F.mish),
    "Gelu": _gelu,
    "com.microsoft.Gelu": _gelu,
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.BiasGelu": _bias_gelu,
    "com.microsoft.QuickGelu": _quick_gelu,
    "Swish": _swish,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Celu": _celu,
    "HardSigmoid": _hard_sigmoid,
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "PRelu": _prelu,
    "Clip": _clip,
    "Erf": _unary(torch.erf),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
    "Sign": _unary(torch.sign),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "IsNaN": _unary(torch.isnan),
    "Not": _unary(torch.logical_not),
    "Add": _binary(torch.add),
    "Sub": _subtraction,
    "Mul": _binary(torch.mul),
    "Div": _division,
    "Pow": _power,
    "Mod": _modulo,
    "Sum": _sum,
    "Mean": _mean,
    "Min": _extreme(torch.minimum, "max"),
    "Max": _extreme(torch.maximum, "min"),
    "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "And": _logical(torch.logical_and),
    "Or": _logical(torch.logical_or),
    "Xor": _logical(torch.ne),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
}
