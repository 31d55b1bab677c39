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

from vbpfx.errors import AnalysisError
from vbpfx.rules.axes import Relation, Site, spelling
from vbpfx.rules.layers import (
    addmm,
    attention,
    convolution,
    einsum,
    embedding,
    linear,
    matrix_product,
    transposed_convolution,
)
from vbpfx.rules.norms import (
    along_one_axis,
    batch_norm,
    extremum,
    group_norm,
    instance_norm,
    norm_over_last,
    padding,
    pooling,
    reduction,
    resizing,
    rolling,
    sampling,
)
from vbpfx.rules.parts import aten_slice, concatenation, glu, indexing, narrowing, select, splitting, stack
from vbpfx.rules.picking import aten_index, index_put, picking, scattering, where_true
from vbpfx.rules.pointwise import elementwise, prelu, unchanged
from vbpfx.rules.shapes import expansion, permutation, regrouping, repetition, repetition_of_entries

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
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.invert, operator.floordiv, aten.__and__, aten.__or__,
)  # fmt: skip
_methods_and_functions(
    elementwise,
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "tanh",
    "tanhshrink", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softplus", "softshrink", "softsign",
    "threshold", "rrelu", "log_sigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
    "add", "sub", "rsub", "mul", "div", "true_divide", "pow", "neg", "abs", "exp", "expm1", "log", "log1p", "log2",
    "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
    "acosh", "atanh", "sinc", "erf", "erfc", "erfinv", "lgamma", "logit", "trunc", "frac", "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max",
    "maximum", "minimum", "sign", "floor", "ceil", "round", "where", "lerp", "addcmul", "addcdiv", "masked_fill",
    "bitwise_and", "bitwise_or", "bitwise_not", "floor_divide", "remainder", "fmod",
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
_row(
    transposed_convolution,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
)  # fmt: skip
_row(embedding, nn.Embedding, F.embedding, aten.embedding)
_row(attention, F.scaled_dot_product_attention, aten.scaled_dot_product_attention)
_row(einsum, torch.einsum, aten.einsum)
_row(batch_norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, F.batch_norm, aten.batch_norm)
_row(prelu, nn.PReLU, F.prelu, aten.prelu)
_row(norm_over_last, nn.LayerNorm, nn.RMSNorm, F.layer_norm, F.rms_norm, aten.layer_norm, aten.rms_norm)
_row(instance_norm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm, aten.instance_norm)
_row(group_norm, nn.GroupNorm, F.group_norm, aten.group_norm)
_row(along_one_axis, nn.Softmax, nn.LogSoftmax)
_methods_and_functions(along_one_axis, "softmax", "log_softmax", "cumsum", "cumprod")
_methods_and_functions(reduction, "mean", "sum", "amax", "amin", "std", "var", "logsumexp", "norm")
_row(reduction, torch.linalg.vector_norm, aten.linalg_vector_norm)
_methods_and_functions(
    extremum, "max", "min", "median", "nanmedian", "mode", "kthvalue", "sort", "topk", "cummax", "cummin"
)
_methods_and_functions(along_one_axis, "normalize")
_row(
    pooling,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate,
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
)  # fmt: skip
_methods_and_functions(
    pooling,
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip
_row(sampling, F.grid_sample, aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d)
_methods_and_functions(rolling, "roll", "flip")
_methods_and_functions(padding, "pad")
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
_methods_and_functions(expansion, "expand", "expand_as")
_methods_and_functions(repetition, "repeat", "tile")
_methods_and_functions(repetition_of_entries, "repeat_interleave")
_row(indexing, operator.getitem)
_row(aten_slice, aten.slice)
_methods_and_functions(narrowing, "narrow")
_methods_and_functions(
    splitting,
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "hsplit",
    "vsplit",
    "dsplit",
    "unbind",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
)
_row(aten_index, aten.index)
_methods_and_functions(index_put, "index_put")
_methods_and_functions(picking, "index_select", "index_add", "index_copy", "index_fill")
_methods_and_functions(scattering, "gather", "scatter", "scatter_add", "scatter_reduce")
_methods_and_functions(where_true, "nonzero", "argwhere", "masked_select")
_row(glu, nn.GLU, F.glu, aten.glu)
_row(select, aten.select, "select", torch.select)
_methods_and_functions(concatenation, "cat", "concat")
_methods_and_functions(stack, "stack")
_row(matrix_product, operator.matmul)
_methods_and_functions(matrix_product, "matmul", "bmm", "mm")
_row(matrix_product, torch.sparse.mm, aten._sparse_mm)


def register_operator(rule: Rule, *spellings: Any) -> None:
    """Enter a rule for operators that the table lacks: your own, or a library's.

    A module class becomes a leaf of symbolic tracing, so that its rule speaks for the whole module. See
    ``docs/adding_an_operator.md``.

    Args:
        rule: a generator of relations over one call; one of :mod:`vbpfx.rules`, or your own.
        spellings: what the graph may call: module classes, functions, names of Tensor methods,
            ``torch.ops`` packets (``torch.ops.mylib.myop``).

    Raises:
        AnalysisError: nothing is given, one is not an operator, or stands in the table with another rule.
    """
    if not callable(rule) or not spellings:
        raise AnalysisError("register_operator takes a rule and at least one operator that follows it")
    for spelled in spellings:
        if isinstance(spelled, torch._ops.OpOverload):
            raise AnalysisError(f"{spelled} is one overload; register its packet, {spelled.overloadpacket}")
        if not callable(spelled) and not isinstance(spelled, str):
            raise AnalysisError(f"{spelled!r} is neither a module class nor a function nor the name of a method")
        if _TABLE.get(spelled, rule) is not rule:
            raise AnalysisError(f"{spelled} stands in the table already, with the rule {_TABLE[spelled].__name__}")
    _TABLE.update(dict.fromkeys(spellings, rule))


def is_registered(module: nn.Module) -> bool:
    """Whether a module's class stands in the table."""
    return type(module) in _TABLE


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


def called_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None where it calls none."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_view(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call's value may lie in its operand's memory."""
    if module is not None:
        return isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd))
    return rule_for(node, module) in _VIEWS or spelling(node) in _HAND_ON


# Calls that take nothing of one operand but its sizes, type and device -> which operand that is.
_TAKES_THE_FORM_ALONE = dict.fromkeys(
    ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
     "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"), 0,
) | dict.fromkeys(("expand_as", "view_as", "reshape_as", "type_as", "to"), 1)  # fmt: skip


def operands_read(node: fx.Node) -> list[fx.Node]:
    """The operands of a call whose values it reads, not their sizes, types and devices alone."""
    read = node.all_input_nodes
    if node.op in ("call_function", "call_method"):
        place = _TAKES_THE_FORM_ALONE.get(spelling(node))
        if place is not None and place < len(node.args):
            read = [operand for operand in read if operand is not node.args[place]]
    return read


def takes_sizes(rule: Rule | None) -> bool:
    """Whether a rule reads size arguments itself."""
    return rule in (regrouping, expansion, norm_over_last, resizing)


def takes_apart(node: fx.Node) -> bool:
    """Whether the call makes a tuple of one tensor, of which its rule says what the entries are."""
    return node.op in ("call_function", "call_method") and rule_for(node, None) in (splitting, extremum)


def is_matrix_product(node: fx.Node) -> bool:
    """Whether the call is a bare product of matrices, which takes no bias."""
    return rule_for(node, None) is matrix_product


def is_cast(node: fx.Node) -> bool:
    """Whether the call hands on its operand in another type, or on another device."""
    return node.op in ("call_function", "call_method") and rule_for(node, None) is unchanged


def is_linear(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call is a linear layer over the last axis."""
    return rule_for(node, module) is linear


def is_convolution(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call is a convolution, depthwise ones included."""
    return rule_for(node, module) is convolution


_SUMS = (
    "add", "iadd", "sub", "isub", "rsub", "addcmul", "addcdiv", "lerp", "where", "stack",
    "index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce",
)  # fmt: skip


def is_sum(node: fx.Node) -> bool:
    """Whether the call adds its operands: where a residual stream takes in what a branch made of it."""
    return node.op in ("call_function", "call_method") and spelling(node).strip("_") in _SUMS


def is_product(node: fx.Node) -> bool:
    """Whether the call multiplies its operands entry by entry: where a gate opens."""
    return node.op in ("call_function", "call_method") and spelling(node).strip("_") in ("mul", "imul", "multiply")


def describe(node: fx.Node, module: nn.Module | None) -> str:
    """The operator by the name its users know."""
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else spelling(node)
