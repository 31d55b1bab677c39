"""ONNX operators that work along axes, as torch functions: reductions, softmax, pooling."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Builder, Value, one_entry, shape_of
from vbpfx.onnx_graph.layers import padding_of


def _reduction(
    function: Callable[..., Any], *ahead: Any, squared: bool = False, behind: Callable[..., Any] | None = None
) -> Callable[[Builder], Value]:
    def reduce(b: Builder) -> Value:
        x, axes = b.tensor(0), b.integers(1, "axes")
        if not axes and b.attribute("noop_with_empty_axes", 0):
            return x
        dims = axes or list(range(len(shape_of(x))))
        x = b.emit(torch.square, x) if squared else x
        dim = dims[0] if len(dims) == 1 else dims
        found = b.emit(function, x, *ahead, dim, bool(b.attribute("keepdims", 1)))
        return found if behind is None else b.emit(behind, found)

    return reduce


def _product(b: Builder) -> Value:
    x, axes, keep = b.tensor(0), b.integers(1, "axes"), bool(b.attribute("keepdims", 1))
    ndim = len(shape_of(x))
    for axis in sorted((axis % ndim for axis in axes or range(ndim)), reverse=True):
        x = b.emit(torch.prod, x, axis, keep)
    return x


def _l1(b: Builder) -> Value:
    return b.emit(torch.linalg.vector_norm, b.tensor(0), 1, b.integers(1, "axes"), bool(b.attribute("keepdims", 1)))


def _global(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    def pool(b: Builder) -> Value:
        x = b.tensor(0)
        return b.emit(function, x, list(range(2, len(shape_of(x)))), True)

    return pool


def _along(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    return lambda b: b.emit(function, b.tensor(0), b.attribute("axis", -1))


def _cumsum(b: Builder) -> Value:
    axis = one_entry(b.value(1))
    if b.attribute("exclusive", 0) or b.attribute("reverse", 0) or not isinstance(axis, int):
        raise CaptureError("exclusive or reversed sums are not supported")
    return b.emit(torch.cumsum, b.tensor(0), axis)


def _extreme_index(function: Callable[..., Any]) -> Callable[[Builder], Value]:
    def find(b: Builder) -> Value:
        if b.attribute("select_last_index", 0):
            raise CaptureError("select_last_index is not supported")
        return b.emit(function, b.tensor(0), b.attribute("axis", 0), bool(b.attribute("keepdims", 1)))

    return find


def _top_k(b: Builder) -> tuple[Value, ...]:
    k = one_entry(b.value(1))
    largest, ordered = bool(b.attribute("largest", 1)), bool(b.attribute("sorted", 1))
    both = b.emit(torch.topk, b.tensor(0), k, b.attribute("axis", -1), largest, ordered)
    return tuple(b.emit(operator.getitem, both, index) for index in range(2))


def _lp_norm(b: Builder) -> Value:
    return b.emit(F.normalize, b.tensor(0), float(b.attribute("p", 2)), b.attribute("axis", -1))


def _average_pool(b: Builder) -> Value:
    counting = bool(b.attribute("count_include_pad", 0))
    x, kernel, stride, padding, _ = _window(b, 0.0, uneven=counting)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    return b.emit(function, x, kernel, stride, padding, bool(b.attribute("ceil_mode", 0)), counting)


def _global_lp_pool(b: Builder) -> Value:
    x = b.tensor(0)
    return b.emit(torch.linalg.vector_norm, x, b.attribute("p", 2), list(range(2, len(shape_of(x)))), True)


def _lp_pool(b: Builder) -> Value:
    """Translate LpPool: (sum over the window of |x|^p)^(1/p)."""
    p, ceil = b.attribute("p", 2), b.attribute("ceil_mode", 0)
    x, kernel, stride, padding, dilation = _window(b, 0.0, uneven=True)
    if ceil or any(step != 1 for step in dilation):
        raise CaptureError("dilations and ceil_mode are not supported")
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    powers = b.emit(torch.pow, b.emit(torch.abs, x), p)
    mean = b.emit(function, powers, kernel, stride, padding, False, True)
    return b.emit(torch.pow, b.emit(torch.mul, mean, math.prod(kernel)), 1 / p)


def _grid_sample(b: Builder) -> Value:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(given := b.attribute("mode", "linear"), given)
    padding, aligned = b.attribute("padding_mode", "zeros"), bool(b.attribute("align_corners", 0))
    return b.emit(F.grid_sample, b.tensor(0), b.tensor(1), mode, padding, aligned)


def _max_pool(b: Builder) -> Value:
    x, kernel, stride, padding, dilation = _window(b, float("-inf"), uneven=True)
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    return b.emit(function, x, kernel, stride, padding, dilation, bool(b.attribute("ceil_mode", 0)))


def _window(b: Builder, fill: float, *, uneven: bool) -> tuple[fx.Node, list[int], list[int], list[int], list[int]]:
    """Return the input and the window's kernel size, stride, padding and dilation.

    Padding that torch's pooling does not support becomes a pad call in front, and the returned padding is then 0.
    """
    kernel = list(b.attribute("kernel_shape"))
    ones = [1] * len(kernel)
    stride, dilation = list(b.attribute("strides", ones)), list(b.attribute("dilations", ones))
    x = b.tensor(0)
    before, after = padding_of(b, x, kernel, stride, dilation)
    if before != after or any(2 * p > k for p, k in zip(before, kernel, strict=True)):
        if not uneven:
            raise CaptureError("uneven padding is only supported with count_include_pad=1")
        amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
        x, before = b.emit(F.pad, x, amounts, "constant", fill), [0] * len(kernel)
    return x, kernel, stride, before, dilation


REDUCTIONS: Mapping[str, Callable[[Builder], Any]] = {
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(torch.sum, squared=True),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceLogSum": _reduction(torch.sum, behind=torch.log),
    "ReduceL2": _reduction(torch.linalg.vector_norm, 2),
    "ReduceL1": _l1,
    "ReduceProd": _product,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "Softmax": _along(torch.softmax),
    "LogSoftmax": _along(torch.log_softmax),
    "CumSum": _cumsum,
    "ArgMax": _extreme_index(torch.argmax),
    "ArgMin": _extreme_index(torch.argmin),
    "TopK": _top_k,
    "LpNormalization": _lp_norm,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "LpPool": _lp_pool,
    "GlobalLpPool": _global_lp_pool,
    "GridSample": _grid_sample,
}
