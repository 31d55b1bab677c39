"""ONNX operators with weights, as torch functions: matrix products, convolutions, norms with scales, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.builder import Builder, Constant, StatedNumber, Value, pairs, shape_of

SKIP_EPSILON = 1e-12  # ONNX Runtime's default epsilon of SkipLayerNormalization


def _matmul(b: Builder) -> Value:
    """Translate a product with a stored matrix to a linear layer. An Add of a vector behind it becomes the bias."""
    weight = b.value(1)
    if not isinstance(weight, Constant) or weight.array.ndim != 2 or not _is_right_factor_alone(b, weight):
        return b.emit(torch.matmul, b.tensor(0), b.tensor(1))
    product, (addition, index) = b.node, _bias_behind(b, weight.array.shape[1])
    x, transposed = b.tensor(0), b.parameter(1, "transposed")
    if addition is None:
        return b.emit(F.linear, x, transposed)
    bias = b.parameter(index, "flat", of=addition)
    b.hint = str(addition.outputs[0].name)
    layer = b.emit(F.linear, x, transposed, bias)
    b.made_by[layer.name] = (product, addition)
    b.values[addition.outputs[0]] = layer
    return layer


def _is_right_factor_alone(b: Builder, weight: Constant) -> bool:
    """Return whether a matrix is used only as the right factor of products, so that it may be kept transposed."""
    waiting = [weight.value] if weight.value is not None else []
    while waiting:
        for user, index in waiting.pop().uses():
            if user.op_type in ("Identity", "Cast"):
                waiting.append(user.outputs[0])
            elif (
                user.graph is not b.node.graph
                or user.op_type not in ("MatMul", "Gemm", "FusedGemm")
                or index != 1
                or _attribute(user, "transB", 0)
            ):
                return False
    return weight.value is not None


def _bias_behind(b: Builder, outputs: int) -> tuple[ir.Node | None, int]:
    """Find the Add that makes a stored vector the bias of the current product.

    Return the Add and the index of the vector among its inputs. Return (None, 0) if there is no such Add, or if another
    node reads the product, too.
    """
    product = b.node.outputs[0]
    users = list(product.uses())
    if len(users) != 1 or product.is_graph_output() or users[0].node.op_type != "Add":
        return None, 0
    addition, own = users[0]
    if addition.graph is not b.node.graph:
        return None, 0
    other = addition.inputs[1 - own]
    bias = b.values.get(other) if other is not None else None
    if not isinstance(bias, Constant) or bias.array.ndim == 0 or bias.array.shape[-1] != outputs:
        return None, 0
    fits = bias.array.size == outputs and bias.array.ndim <= len(shape_of(b.tensor(0)))
    return (addition, 1 - own) if fits else (None, 0)


def _gemm(b: Builder) -> Value:
    """Translate alpha A B + beta C, where A and B may be transposed."""
    alpha, beta = b.attribute("alpha", 1.0), b.attribute("beta", 1.0)
    x = b.emit(torch.t, b.tensor(0)) if b.attribute("transA", 0) else b.tensor(0)
    stored_as_linear = bool(b.attribute("transB", 0))
    weight, bias = b.value(1), b.constant(2)
    own = isinstance(weight, Constant) and (stored_as_linear or _is_right_factor_alone(b, weight))
    if own and alpha == 1:
        matrix = b.parameter(1, "same" if stored_as_linear else "transposed")
        if not b.has(2):
            return b.emit(F.linear, x, matrix)
        outputs = shape_of(matrix)[0]
        if bias is not None and beta == 1 and bias.size == outputs and bias.ndim and bias.shape[-1] == outputs:
            return b.emit(F.linear, x, matrix, b.parameter(2, "flat"))
        product = b.emit(F.linear, x, matrix)
    else:
        other = b.tensor(1)
        product = b.emit(torch.matmul, x, b.emit(torch.t, other) if stored_as_linear else other)
        product = product if alpha == 1 else b.emit(torch.mul, product, alpha)
    if not b.has(2):
        return product
    added = b.tensor(2)
    return b.emit(torch.add, product, added if beta == 1 else b.emit(torch.mul, added, beta))


def _convolution(b: Builder) -> Value:
    weight = b.tensor(1)
    spatial = len(shape_of(weight)) - 2
    stride, dilation = b.attribute("strides", [1] * spatial), b.attribute("dilations", [1] * spatial)
    x, padding = _padded(b, b.tensor(0), shape_of(weight)[2:], stride, dilation)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    bias = b.tensor(2) if b.has(2) else None
    groups = b.attribute("group", 1)
    node = b.emit(function, x, weight, bias, list(stride), padding, list(dilation), groups)
    b.states(node, ("args", 6), StatedNumber(b.node, "group"))
    return node


def _fused_convolution(b: Builder) -> Value:
    """Translate a node of ONNX Runtime's optimizer: act(W x + b + z), where z and the activation are optional."""
    y = _convolution(b)
    if b.has(3):
        y = b.emit(torch.add, y, b.tensor(3))
    return _activated(b, y)


def _fused_gemm(b: Builder) -> Value:
    """Translate a node of ONNX Runtime's optimizer: act(A B + C), where A B + C must be a linear layer."""
    y = _gemm(b)
    if isinstance(y, fx.Node) and y.target is not F.linear and b.attribute("activation", ""):
        raise CaptureError("its activation is not applied directly to a linear layer, the only form that is supported")
    return _activated(b, y)


def _activated(b: Builder, x: Value) -> Value:
    """Apply the activation that an operator names in its attributes.

    The numbers of the activation are in ``activation_params``, or each in an attribute of its own.
    """
    name = b.attribute("activation", "")
    if not name:
        return x
    if name not in _ACTIVATIONS:
        raise CaptureError(f"its activation {name} is not supported")
    function, defaults = _ACTIVATIONS[name]
    given = list(b.attribute("activation_params") or ())
    given = given or [b.attribute(f"activation_{key}", value) for key, value in defaults.items()]
    return b.emit(function, x, *(float(number) for number in given))


# Name of the activation -> torch function, and the names and defaults of its numbers.
_ACTIVATIONS: Mapping[str, tuple[Callable[..., Any], Mapping[str, float]]] = {
    "Relu": (torch.relu, {}),
    "Sigmoid": (torch.sigmoid, {}),
    "Tanh": (torch.tanh, {}),
    "LeakyRelu": (F.leaky_relu, {"alpha": 0.01}),
    "Clip": (torch.clamp, {"min": float("-inf"), "max": float("inf")}),
}


def _padded(b: Builder, x: fx.Node, kernel: Any, stride: Any, dilation: Any) -> tuple[fx.Node, Any]:
    """Return the input and the padding for torch's function. Uneven padding becomes a pad call in front, and 0 here."""
    before, after = padding_of(b, x, kernel, stride, dilation)
    if before == after:
        return x, before
    amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return b.emit(F.pad, x, amounts, "constant", 0.0), [0] * len(before)


def padding_of(b: Builder, x: fx.Node, kernel: Any, stride: Any, dilation: Any) -> tuple[list[int], list[int]]:
    """Return how much a convolution or a pooling pads before and after every spatial axis."""
    mode = b.attribute("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return pairs(b.attribute("pads", [0] * 2 * len(kernel)) if mode == "NOTSET" else [0] * 2 * len(kernel))
    before, after = [], []
    for size, k, s, d in zip(shape_of(x)[2:], kernel, stride, dilation, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if mode == "SAME_UPPER" else more)
        after.append(more if mode == "SAME_UPPER" else less)
    return before, after


def _transposed_convolution(b: Builder) -> Value:
    weight = b.tensor(1)
    spatial = len(shape_of(weight)) - 2
    before, after = pairs(b.attribute("pads", [0] * 2 * spatial))
    if before != after or b.attribute("output_shape") or b.attribute("auto_pad", "NOTSET") != "NOTSET":
        raise CaptureError("a transposed convolution with uneven padding or a stated output shape is not supported")
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
    ones = [1] * spatial
    return b.emit(
        function, b.tensor(0), weight, b.tensor(2) if b.has(2) else None, list(b.attribute("strides", ones)), before,
        list(b.attribute("output_padding", [0] * spatial)), b.attribute("group", 1), list(b.attribute("dilations", ones)),
    )  # fmt: skip


def _layer_norm(b: Builder) -> Value:
    return _norm(b, F.layer_norm, b.attribute("epsilon", 1e-5), b.tensor(2) if b.has(2) else None)


def _rms_norm(b: Builder) -> Value:
    return _norm(b, F.rms_norm, b.attribute("epsilon", 1e-5))


def _norm(b: Builder, function: Callable[..., Any], eps: float, *bias: fx.Node | None) -> Value:
    return _normed(b, function, b.tensor(0), b.tensor(1), *bias, eps=eps)


def _normed(
    b: Builder, function: Callable[..., Any], x: fx.Node, weight: fx.Node, *bias: fx.Node | None, eps: float
) -> Value:
    sizes = shape_of(x)[b.attribute("axis", -1) :]
    if shape_of(weight) != sizes:
        raise CaptureError(f"its scale has the shape {shape_of(weight)}, expected {tuple(sizes)}")
    node = b.emit(function, x, list(sizes), weight, *bias, eps)
    b.states(node, ("args", 1, 0), None)  # the file states the axis, not its size
    return node


def _skip_norm(*, mean: bool) -> Callable[[Builder], tuple[Value, ...]]:
    """Translate an operator of ONNX Runtime: the norm of x + skip (+ bias). Its fourth output is that sum."""

    def norm(b: Builder) -> tuple[Value, ...]:
        if any(value.uses() or value.is_graph_output() for value in b.node.outputs[1:3]):
            raise CaptureError(
                "another node reads its outputs for the mean and the inverse standard deviation, which are not supported"
            )
        total, bias = b.emit(torch.add, b.tensor(0), b.tensor(1)), 4 if mean else 3
        total = b.emit(torch.add, total, b.tensor(bias)) if b.has(bias) else total
        shift = (b.tensor(3) if b.has(3) else None,) if mean else ()
        normed = _normed(
            b,
            F.layer_norm if mean else F.rms_norm,
            total,
            b.tensor(2),
            *shift,
            eps=b.attribute("epsilon", SKIP_EPSILON),
        )
        return normed, total, total, total

    return norm


def _batch_norm(b: Builder) -> Value:
    if b.attribute("training_mode", 0):
        raise CaptureError("it is in training mode; export the network in eval mode")
    scale, bias, mean, var = (b.tensor(i) for i in (1, 2, 3, 4))
    return b.emit(F.batch_norm, b.tensor(0), mean, var, scale, bias, False, 0.0, b.attribute("epsilon", 1e-5))


def _instance_norm(b: Builder) -> Value:
    eps = b.attribute("epsilon", 1e-5)
    return b.emit(F.instance_norm, b.tensor(0), None, None, b.tensor(1), b.tensor(2), True, 0.0, eps)


def _group_norm(b: Builder) -> Value:
    x, scale, bias = b.tensor(0), b.tensor(1), b.tensor(2)
    if shape_of(scale) != shape_of(x)[1:2]:
        raise CaptureError("it has one scale per group, as before opset 21; only one scale per channel is supported")
    return b.emit(F.group_norm, x, b.attribute("num_groups"), scale, bias, b.attribute("epsilon", 1e-5))


def _attention(b: Builder) -> Value:
    """Translate Attention of opset 23, on queries, keys and values with an axis for the heads."""
    query, key, value = (b.tensor(i) for i in range(3))
    further = len(b.node.outputs) > 1 or b.has(4) or b.attribute("softcap", 0.0)
    if further or any(len(shape_of(x)) != 4 for x in (query, key, value)):
        raise CaptureError("only attention over four axes, without a cache, a cap or further outputs, is supported")
    mask = b.tensor(3) if b.has(3) else None
    grouped = {"enable_gqa": True} if shape_of(query)[1] != shape_of(key)[1] else {}
    causal, scale = bool(b.attribute("is_causal", 0)), b.attribute("scale")
    return b.emit(F.scaled_dot_product_attention, query, key, value, mask, 0.0, causal, scale=scale, **grouped)


def _fused_matmul(b: Builder) -> Value:
    """Translate an operator of ONNX Runtime: alpha A B, where A and B may be transposed."""
    if b.attribute("transBatchA", 0) or b.attribute("transBatchB", 0):
        raise CaptureError("the axes in front of its matrices are transposed")
    factors = [b.tensor(0), b.tensor(1)]
    for i, name in enumerate(("transA", "transB")):
        if b.attribute(name, 0):
            factors[i] = b.emit(torch.transpose, factors[i], -1, -2)
    product, alpha = b.emit(torch.matmul, *factors), b.attribute("alpha", 1.0)
    return product if alpha == 1 else b.emit(torch.mul, product, alpha)


def _einsum(b: Builder) -> Value:
    return b.emit(torch.einsum, b.attribute("equation"), *(b.tensor(i) for i in range(len(b.node.inputs))))


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


LAYERS: Mapping[str, Callable[[Builder], Any]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.FusedGemm": _fused_gemm,
    "Conv": _convolution,
    "com.microsoft.FusedConv": _fused_convolution,
    "ConvTranspose": _transposed_convolution,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "com.microsoft.SkipLayerNormalization": _skip_norm(mean=True),
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm(mean=False),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "Attention": _attention,
    "Einsum": _einsum,
}
