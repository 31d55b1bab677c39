"""Correct statistics over a narrowed axis with ONNX nodes, by the formulas of :mod:`vbpfx.rewrite.carry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vbpfx.onnx_graph.edit import OnnxEdit
from vbpfx.onnx_graph.layers import SKIP_EPSILON
from vbpfx.rewrite.carry import NORMALISE, Carried

# Norms of a sum -> the indices of the inputs that are scale and shift, and of those that are added to the first one.
_NORMS_OF_SUMS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "SkipLayerNormalization": ((2, 3), (1, 4)),
    "SkipSimplifiedLayerNormalization": ((2,), (1, 3)),
}


@dataclass(frozen=True)
class _Term:
    """A value of the file with a tensor's arithmetic: every operation inserts a node in front of ``before``."""

    file: OnnxEdit
    before: ir.Node
    value: ir.Value
    dtype: Any

    def _make(self, op_type: str, *operands: Any, **attributes: int) -> _Term:
        inputs = [self._value(operand) for operand in operands]
        name = f"{self.before.inputs[0].name}_{op_type}"  # type: ignore[union-attr]
        return _Term(
            self.file, self.before, self.file.insert(self.before, op_type, inputs, name, **attributes), self.dtype
        )

    def _value(self, operand: Any) -> ir.Value:
        match operand:
            case _Term(value=value):
                return value
            case ir.Value():
                return operand
            case _:
                array = operand if isinstance(operand, np.ndarray) else np.array(operand, self.dtype)
                return self.file.store(f"{self.before.inputs[0].name}_constant", array)  # type: ignore[union-attr]

    def of(self, dtype: Any) -> _Term:
        """Return the term in another precision."""
        if np.dtype(dtype) == self.dtype:
            return self
        term = self._make("Cast", self, to=int(ir.DataType.from_numpy(np.dtype(dtype))))
        return _Term(self.file, self.before, term.value, np.dtype(dtype))

    def sum(self, dim: int, keepdim: bool) -> _Term:
        return self._make("ReduceSum", self, np.array([dim], np.int64), keepdims=int(keepdim))

    def __add__(self, other: Any) -> _Term:
        return self._make("Add", self, other)

    def __sub__(self, other: Any) -> _Term:
        return self._make("Sub", self, other)

    def __mul__(self, other: Any) -> _Term:
        return self._make("Mul", self, other)

    def __truediv__(self, other: Any) -> _Term:
        return self._make("Div", self, other)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.rsqrt:
            return NotImplemented
        (term,) = args
        return term._make("Reciprocal", term._make("Sqrt", term))


def carry(file: OnnxEdit, node: ir.Node, kind: str, carried: Carried) -> None:
    """Correct a statistic over a narrowed axis, so that it includes the removed channels again.

    Args:
        node: the node that computes the statistic. Its inputs are narrowed already.
        kind: the kind of statistic, as in :attr:`vbpfx.plans.records.Reduction.kind`.
        carried: the removed channels.
    """
    source, sums = node.inputs[0], carried.summed
    assert source is not None
    known = node.outputs[0].dtype or source.dtype
    dtype = known.numpy() if known is not None else np.dtype(np.float32)

    def make(before: ir.Node) -> ir.Value:
        out, h = (_Term(file, before, value, dtype) for value in (node.outputs[0], source))
        scaling, added = _NORMS_OF_SUMS.get(node.op_type, ((1, 2), ()))
        if kind == "sum":
            return (out + sums.sum).value
        if kind == "mean":
            return (out * ((sums.size - sums.removed) / sums.size) + sums.sum / sums.size).value
        for value in (node.inputs[index] for index in added if index < len(node.inputs)):
            h = h + value if value is not None else h
        eps, usual = node.attributes.get("epsilon"), SKIP_EPSILON if added else 1e-5
        result = NORMALISE[kind](
            h.of(np.float32) if dtype == np.float16 else h, sums, usual if eps is None else eps.as_float()
        )
        result = result.of(dtype)  # computed in float32 above, because sums of squares overflow float16
        for index, combine in zip(scaling, (_Term.__mul__, _Term.__add__), strict=False):
            if index < len(node.inputs) and node.inputs[index] is not None:
                result = combine(result, node.inputs[index])
        return result.value  # type: ignore[no-any-return]

    file.replace_value(node, make)
