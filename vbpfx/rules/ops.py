"""The operator table: one row per operator.

A row has the rule by which an operator treats axes (:mod:`vbpfx.rules`), its spellings (module classes, functions, Tensor methods,
ATen operators), and its traits (:class:`vbpfx.rules.table.Operator`). Operators with the same rule and traits share a row. An
operator without a row makes all axes of its tensors opaque, and is reported by name. A new operator is one row and one test.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vbpfx.errors import AnalysisError
from vbpfx.rules.axes import Relation, Site
from vbpfx.rules.cells import channel_shuffle, pixel_shuffle, pixel_unshuffle
from vbpfx.rules.experts import grouped_product
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
    rolling,
    sampling,
)
from vbpfx.rules.parts import aten_slice, concatenation, glu, indexing, narrowing, select, splitting, stack
from vbpfx.rules.picking import aten_index, index_put, picking, scattering, where_true
from vbpfx.rules.pointwise import elementwise, prelu, unchanged
from vbpfx.rules.shapes import expansion, permutation, regrouping, repetition, repetition_of_entries
from vbpfx.rules.table import Argument, Attribute, Operator, Qualified, Rule, enter, entered, rows_of

aten = torch.ops.aten


def _row(rule: Rule | None, *spellings: Any, **traits: Any) -> None:
    """Enter all spellings of operators with the same rule and the same traits."""
    for spelled in spellings:
        assert entered(spelled) is None, f"{spelled} stands in two rows"
    enter(Operator(rule, **traits), spellings)


def _named(rule: Rule | None, *names: str, **traits: Any) -> None:
    """Enter x.name(), x.name_(), torch.name, F.name and aten.name, if they exist and have no row of their own."""
    for name in names:
        spelled: list[Any] = [n for n in (name, f"{name}_") if hasattr(torch.Tensor, n)]
        for place in (torch, F, aten):
            spelled += [getattr(place, n) for n in (name, f"{name}_") if hasattr(place, n)]
        _row(rule, *(s for s in dict.fromkeys(spelled) if entered(s) is None), **traits)


# y = f(x) on every element.
_row(
    elementwise,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Threshold, nn.RReLU,
    operator.pow, operator.neg, operator.abs, operator.floordiv, operator.invert,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, aten.__and__, aten.__or__,
)  # fmt: skip
_named(
    elementwise,
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "tanh",
    "tanhshrink", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softplus", "softshrink", "softsign",
    "threshold", "rrelu", "log_sigmoid", "native_dropout",
    "pow", "neg", "abs", "exp", "expm1", "log", "log1p", "log2",
    "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
    "acosh", "atanh", "sinc", "erf", "erfc", "erfinv", "lgamma", "logit", "trunc", "frac", "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max",
    "maximum", "minimum", "sign", "floor", "ceil", "round", "masked_fill",
    "bitwise_and", "bitwise_or", "bitwise_not", "floor_divide", "remainder", "fmod",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan", "isfinite", "lift_fresh_copy",
)  # fmt: skip
_row(elementwise, operator.add, joins="addition")
_row(elementwise, operator.iadd, joins="addition", in_place=True)
_named(elementwise, "add", joins="addition")
_row(elementwise, operator.sub, joins="sum")
_row(elementwise, operator.isub, joins="sum", in_place=True)
_named(elementwise, "sub", "rsub", "addcmul", "addcdiv", "lerp", "where", joins="sum")
_row(elementwise, operator.mul, joins="product")
_row(elementwise, operator.imul, joins="product", in_place=True)
_named(elementwise, "mul", "multiply", joins="product")
_row(elementwise, operator.truediv, joins="quotient")
_row(elementwise, operator.itruediv, joins="quotient", in_place=True)
_named(elementwise, "div", "true_divide", joins="quotient")
# Operators that leave every element as it is.
_row(
    elementwise,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    view=True, hands_on=True,
)  # fmt: skip
_named(
    elementwise,
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
    view=True, hands_on=True, trains=2,
)  # fmt: skip
_named(elementwise, "detach", "contiguous", "alias", view=True, hands_on=True)
_named(elementwise, "clone", hands_on=True)
_row(elementwise, Attribute("data"), view=True)
_row(unchanged, "float", "double", "half", "bfloat16", "type", "cpu", "cuda", aten._to_copy, view=True, casts=True)
_named(unchanged, "to", "type_as", view=True, casts=True, form_of=1)
# Operators that use the sizes, type and device of their operand but not its values, and operators that return one of these.
_named(elementwise, "zeros_like", "ones_like", "full_like", form_of=0)
_named(
    None,
    "empty_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_tensor",
    form_of=0,
)
_row(None, Attribute("shape"), "size", aten.sym_size, reads="sizes")
_row(
    None,
    *map(Attribute, ("device", "dtype", "ndim", "layout", "requires_grad", "is_cuda")),
    "dim", "ndimension", "is_floating_point", "get_device", "element_size",
    reads="kind",
)  # fmt: skip
# Operators with weights.
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
_row(attention, F.scaled_dot_product_attention, aten.scaled_dot_product_attention, scales_by_width=True)
_row(einsum, torch.einsum, aten.einsum)
_row(matrix_product, operator.matmul)
_named(matrix_product, "matmul", "bmm", "mm")
_row(matrix_product, torch.sparse.mm, aten._sparse_mm)
_named(grouped_product, "grouped_mm", "_grouped_mm")
_row(grouped_product, Qualified("transformers::grouped_mm_fallback"))
_row(prelu, nn.PReLU, F.prelu, aten.prelu)
# Operators that compute along axes.
_row(
    batch_norm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    F.batch_norm,
    torch.batch_norm,
    aten.batch_norm,
    affine=True,
    trains=5,
)
_row(
    norm_over_last,
    nn.LayerNorm, nn.RMSNorm, F.layer_norm, F.rms_norm, aten.layer_norm, aten.rms_norm,
    reads_sizes=True,
)  # fmt: skip
_row(instance_norm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm, aten.instance_norm)
_row(group_norm, nn.GroupNorm, F.group_norm, aten.group_norm)
_row(along_one_axis, nn.Softmax, nn.LogSoftmax)
_named(along_one_axis, "softmax", "log_softmax", "cumsum", "cumprod")
_named(along_one_axis, "normalize", dim=Argument(2, "dim", 1))
_named(reduction, "mean", aggregates=True, statistic="mean")
_named(reduction, "sum", aggregates=True, statistic="sum")
_named(reduction, "amax", "amin", "std", "var", "logsumexp", "prod", aggregates=True)
_named(reduction, "norm", aggregates=True, dim=Argument(2, "dim"))
_row(reduction, torch.linalg.vector_norm, aten.linalg_vector_norm, aggregates=True, dim=Argument(2, "dim"))
_named(extremum, "max", "min", "median", takes_apart=True, aggregates=True)
_named(extremum, "nanmedian", "mode", takes_apart=True)
_named(extremum, "kthvalue", takes_apart=True, dim=Argument(2, "dim", -1))
_named(extremum, "sort", takes_apart=True, keeps_axis=True, dim=Argument(1, "dim", -1))
_named(extremum, "topk", takes_apart=True, keeps_axis=True, dim=Argument(2, "dim", -1))
_named(extremum, "cummax", "cummin", takes_apart=True, keeps_axis=True)
_row(
    pooling,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate,
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
)  # fmt: skip
_named(
    pooling,
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip
_row(sampling, F.grid_sample, aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d)
_named(rolling, "roll", affine=True, dim=Argument(2, "dims"))
_named(rolling, "flip")
_named(padding, "pad")
# Operators that give the same elements another shape.
_named(permutation, "t", "transpose", "swapaxes", "swapdims", view=True, transposes=True, reshapes=True)
_named(permutation, "permute", view=True, transposes=True)
_row(permutation, Attribute("T"), Attribute("mT"), aten.numpy_T, aten.mT, view=True, transposes=True)
_named(permutation, "movedim", "moveaxis", view=True)
_row(regrouping, nn.Flatten, nn.Unflatten, view=True, reads_sizes=True)
_named(regrouping, "view", "_unsafe_view", view=True, reads_sizes=True, sizes=Argument(1, "size"))
_named(regrouping, "reshape", view=True, reads_sizes=True, sizes=Argument(1, "shape"))
_named(regrouping, "unflatten", view=True, reads_sizes=True, sizes=Argument(2, "sizes"))
_named(regrouping, "view_as", "reshape_as", view=True, reads_sizes=True, form_of=1)
_named(regrouping, "flatten", view=True, reads_sizes=True)
_named(regrouping, "squeeze", "unsqueeze", view=True, reads_sizes=True, reshapes=True)
_named(expansion, "expand", view=True, reads_sizes=True, sizes=Argument(1, "size"))
_named(expansion, "expand_as", view=True, reads_sizes=True, form_of=1)
_named(repetition, "repeat", "tile")
_named(repetition_of_entries, "repeat_interleave")
_named(None, "resize", "resize_as", "set", "as_strided", reshapes=True)
_row(pixel_shuffle, nn.PixelShuffle, F.pixel_shuffle, aten.pixel_shuffle)
_row(pixel_unshuffle, nn.PixelUnshuffle, F.pixel_unshuffle, aten.pixel_unshuffle)
_row(channel_shuffle, nn.ChannelShuffle, F.channel_shuffle, aten.channel_shuffle)
# Operators that take parts of axes, or join parts.
_row(indexing, operator.getitem, view=True)
_row(None, operator.setitem, operator.ipow, in_place=True)
_row(aten_slice, aten.slice, view=True)
_named(narrowing, "narrow", view=True)
_row(select, aten.select, "select", torch.select, view=True)
_named(
    splitting,
    "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
    view=True, takes_apart=True,
)  # fmt: skip
_named(splitting, "unbind", view=True, takes_apart=True, dim=Argument(1, "dim", 0))
_named(splitting, "vsplit", view=True, takes_apart=True, dim=0)
_named(splitting, "hsplit", view=True, takes_apart=True, dim=1)
_named(splitting, "dsplit", view=True, takes_apart=True, dim=2)
_row(glu, nn.GLU, F.glu, aten.glu)
_named(concatenation, "cat", "concat")
_named(stack, "stack", joins="sum")
# Operators that pick entries by an index or a mask, or put them back.
_row(aten_index, aten.index)
_named(index_put, "index_put", joins="sum")
_named(picking, "index_select", "index_fill")
_named(picking, "index_add", "index_copy", joins="sum")
_named(scattering, "gather")
_named(scattering, "scatter", "scatter_add", "scatter_reduce", joins="sum")
_named(where_true, "nonzero", "argwhere", "masked_select")


def register_operator(rule: Callable[[Site], Iterable[Relation]], *spellings: Any, **traits: Any) -> None:
    """Add operators to the operator table: your own, or those of another library.

    A registered module class becomes a leaf of symbolic tracing, so that its rule describes the whole module. See
    ``docs/adding_an_operator.md``.

    Args:
        rule: a generator of relations over one call: one of :mod:`vbpfx.rules`, or your own.
        spellings: the operators, as a graph calls them: module classes, functions, names of Tensor methods,
            ``torch.ops`` packets (``torch.ops.mylib.myop``).
        traits: further properties of the operators, named as in :class:`vbpfx.rules.table.Operator`. For example, ``view=True``
            says that the value may share memory with the operand. If a trait is not given, a module class takes it from a base
            class that is in the table. Otherwise it is the trait that all operators with the rule share, if they agree.

    Raises:
        AnalysisError: no rule or no operator is given, a spelling is not an operator or is already in the table with another
            rule or other traits, or a trait does not exist.
    """
    if not callable(rule) or not spellings:
        raise AnalysisError("register_operator takes a rule and at least one operator that follows it")
    names = [field.name for field in fields(Operator) if field.name != "rule"]
    for name in traits:
        if name not in names:
            raise AnalysisError(f"operators have no trait {name!r}; register_operator takes {', '.join(names)}")
    for spelled in spellings:
        if isinstance(spelled, torch._ops.OpOverload):
            raise AnalysisError(f"{spelled} is one overload; register its packet, {spelled.overloadpacket}")
        if not callable(spelled) and not isinstance(spelled, str):
            raise AnalysisError(f"{spelled!r} is neither a module class nor a function nor the name of a method")
        row = entered(spelled)
        if row is None or row.rule is None:
            continue
        if row.rule is not rule:
            raise AnalysisError(f"{spelled} is already in the operator table, with the rule {row.rule.__name__}")
        for name, value in traits.items():
            if getattr(row, name) != value:
                raise AnalysisError(f"{spelled} is already in the operator table, with {name}={getattr(row, name)!r}")
    for spelled in spellings:
        row = entered(spelled)
        if row is None or row.rule is None:
            enter(replace(row or _like(spelled, rule), rule=rule, **traits), [spelled])


def _like(spelled: Any, rule: Rule) -> Operator:
    """Return a row for a new operator: the row of a base class, or one with the traits that all rows of its rule share."""
    bases = spelled.__mro__ if isinstance(spelled, type) else ()
    known = next((row for base in bases if (row := entered(base)) is not None), None)
    if known is not None:
        return known
    rows = rows_of(rule)
    traits = {field.name: {getattr(row, field.name) for row in rows} for field in fields(Operator)}
    return Operator(**{name: values.pop() for name, values in traits.items() if len(values) == 1})
