"""The operator table.

One row per rule (:mod:`vbpfx.rules`), with every spelling of the operators that follow it: module classes,
functions, Tensor methods, ATen operators. An operator that stands in no row makes every axis that touches it
opaque, and is reported by name. A new operator is one row and one test.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from vbpfx.axes import Relation, Site
from vbpfx.rules import (
    addmm,
    along_one_axis,
    aten_slice,
    batch_norm,
    concatenation,
    convolution,
    elementwise,
    expansion,
    glu,
    group_norm,
    indexing,
    linear,
    matrix_product,
    narrowing,
    norm_over_last,
    permutation,
    pooling,
    prelu,
    reduction,
    regrouping,
    select,
    spelling,
    splitting,
    stack,
    unchanged,
)

Rule = Callable[[Site], Iterable[Relation]]
aten = torch.ops.aten

_TABLE: dict[Any, Rule] = {}


def _row(rule: Rule, *spellings: Any) -> None:
    """Enter every spelling of the operators that follow a rule."""
    for spelled in spellings:
        assert spelled not in _TABLE, f"{spelled} stands in two rows"
        _TABLE[spelled] = rule


def _methods_and_functions(rule: Rule, *names: str) -> None:
    """Enter x.name(), x.name_(), torch.name, F.name and aten.name, those of them that exist."""
    for name in names:
        spelled: list[Any] = [n for n in (name, f"{name}_") if hasattr(torch.Tensor, n)]
        for place in (torch, F, aten):
            spelled += [getattr(place, n) for n in (name, f"{name}_") if hasattr(place, n)]
        _row(rule, *(s for s in dict.fromkeys(spelled) if s not in _TABLE))


# y = f(x) on every element, and what leaves every element alone.
_row(
    elementwise,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Threshold, nn.RReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.abs,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
)  # fmt: skip
_methods_and_functions(
    elementwise,
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "tanh",
    "tanhshrink", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softplus", "softshrink", "softsign",
    "threshold", "rrelu", "log_sigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "native_dropout",
    "add", "sub", "rsub", "mul", "div", "true_divide", "pow", "neg", "abs", "exp", "expm1", "log", "log1p", "log2",
    "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
    "acosh", "atanh", "sinc", "erf", "erfc", "erfinv", "lgamma", "logit", "trunc", "frac", "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max",
    "maximum", "minimum", "sign", "floor", "ceil", "round", "where", "lerp", "addcmul", "addcdiv", "masked_fill",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan", "isfinite",
    "clone", "detach", "contiguous", "alias", "lift_fresh_copy", "zeros_like", "ones_like", "full_like",
)  # fmt: skip
_row(unchanged, "float", "double", "half", "bfloat16", "type", "cpu", "cuda", aten._to_copy)
_methods_and_functions(unchanged, "to", "type_as")
_row(linear, nn.Linear, F.linear, aten.linear)
_row(addmm, torch.addmm, aten.addmm, "addmm")
_row(
    convolution,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d, aten.conv1d, aten.conv2d, aten.conv3d,
)  # fmt: skip
_row(batch_norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, F.batch_norm, aten.batch_norm)
_row(prelu, nn.PReLU, F.prelu, aten.prelu)
_row(norm_over_last, nn.LayerNorm, nn.RMSNorm, F.layer_norm, F.rms_norm, aten.layer_norm, aten.rms_norm)
_row(group_norm, nn.GroupNorm, F.group_norm, aten.group_norm)
_row(along_one_axis, nn.Softmax, nn.LogSoftmax)
_methods_and_functions(along_one_axis, "softmax", "log_softmax", "cumsum", "cumprod")
_methods_and_functions(reduction, "mean", "sum", "amax", "amin", "std", "var", "logsumexp", "norm")
_row(reduction, torch.linalg.vector_norm, aten.linalg_vector_norm)
_row(
    pooling,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d,
)  # fmt: skip
_methods_and_functions(permutation, "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")
_row(permutation, aten.numpy_T, aten.mT)
_row(regrouping, nn.Flatten, nn.Unflatten)
_methods_and_functions(
    regrouping,
    "view",
    "reshape",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
)
_methods_and_functions(expansion, "expand")
_row(indexing, operator.getitem)
_row(aten_slice, aten.slice)
_methods_and_functions(narrowing, "narrow")
_methods_and_functions(splitting, "chunk", "split", "unbind")
_row(splitting, aten.split_with_sizes)
_row(glu, nn.GLU, F.glu, aten.glu)
_row(select, aten.select, "select", torch.select)
_methods_and_functions(concatenation, "cat", "concat")
_methods_and_functions(stack, "stack")
_row(matrix_product, operator.matmul)
_methods_and_functions(matrix_product, "matmul", "bmm")


def rule_for(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The row of a call; None where the table has none."""
    if module is not None:
        return _TABLE.get(type(module))
    target = node.target
    if target is getattr:
        return permutation if node.args[1] in ("T", "mT") else elementwise if node.args[1] == "data" else None
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return _TABLE.get(target)


_VIEWS = (unchanged, regrouping, permutation, expansion, indexing, aten_slice, narrowing, splitting, select)
# Elementwise operators that may hand on their operand itself: dropout does in eval mode.
_HAND_ON = ("detach", "contiguous", "alias", "getattr", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
            "feature_dropout", "feature_alpha_dropout")  # fmt: skip


def is_view(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call's value may lie in its operand's memory."""
    if module is not None:
        return isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd))
    return rule_for(node, module) in _VIEWS or spelling(node) in _HAND_ON


def takes_sizes(rule: Rule | None) -> bool:
    """Whether a rule reads size arguments itself."""
    return rule in (regrouping, expansion)


def takes_apart(node: fx.Node) -> bool:
    """Whether the call makes a tuple of consecutive parts of one tensor."""
    return node.op in ("call_function", "call_method") and rule_for(node, None) is splitting


def is_matrix_product(node: fx.Node) -> bool:
    """Whether the call is a bare product of matrices, which takes no bias."""
    return rule_for(node, None) is matrix_product


def is_sum(node: fx.Node) -> bool:
    """Whether the call adds its operands: where a residual stream takes in what a branch made of it."""
    return node.op in ("call_function", "call_method") and spelling(node).strip("_") in ("add", "iadd", "sub", "isub")


def describe(node: fx.Node, module: nn.Module | None) -> str:
    """The operator by the name its users know."""
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else spelling(node)
