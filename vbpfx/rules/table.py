"""A row of the operator table: an operator's rule for axes, and its traits.

The rows are in :mod:`vbpfx.rules.ops`. Code that depends on the operator of a node gets its row from :func:`operator_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn

# From a Site to its Relations. Both are defined in vbpfx.rules.axes, which reads this table.
Rule = Callable[[Any], Iterable[Any]]


class Argument(NamedTuple):
    """Where a call holds an argument: its position (the first tensor is 0), its keyword, and its default."""

    position: int
    name: str
    default: Any = None

    def given(self, node: fx.Node, module: nn.Module | None = None) -> Any:
        """Return what the call passes for the argument, or its default; for the call of a module, the module's attribute."""
        if module is not None:
            return getattr(module, self.name, self.default)
        if self.position < len(node.args):
            return node.args[self.position]
        return node.kwargs.get(self.name, self.default)


class Attribute(NamedTuple):
    """A spelling for an attribute of tensors, which a graph reads with ``getattr``."""

    name: str


class Qualified(NamedTuple):
    """A spelling for an operator of ``torch.ops`` that another library registers when it is imported."""

    name: str


@dataclass(frozen=True)
class Operator:
    """One row of the operator table.

    An argument is given only if operators with the same rule have it at different places.

    Attributes:
        rule: a generator of relations over one call. None if only traits are known: the analysis then refuses every axis that the
            operator touches.
        view: the value may share memory with the first operand.
        hands_on: in eval mode the value equals the first operand.
        casts: the value is the first operand in another type, on another device or in another layout.
        affine: every entry of the value is one entry of the first operand, times a scale, plus a shift. This need not be set
            if ``view`` or ``hands_on`` is.
        joins: how the call combines its operands: ``"addition"`` (x + y), ``"sum"`` (a sum with signs or factors, or entries of one
            operand put among those of another), ``"product"`` (x * y), ``"quotient"`` (x / y).
        in_place: the call changes its first operand, although its name does not end with an underscore.
        reshapes: the in-place form of the operator changes sizes or strides of its operand.
        takes_apart: the value is a tuple, and the rule describes its entries.
        transposes: if the operand is a matrix, the value is its transpose, unless the arguments say otherwise.
        aggregates: one entry is computed from all entries along an axis.
        statistic: the statistic over an axis that the call computes, if the contribution of constant channels can be added to
            it afterwards.
        keeps_axis: the value still has the axis along which entries are compared.
        reads: ``"sizes"`` if the value is the shape of a tensor or one of its sizes; ``"kind"`` if it is a number or a flag that
            does not depend on sizes.
        form_of: the position of an operand whose sizes, type or device the call uses, but not its values.
        reads_sizes: the rule interprets sizes among the arguments.
        sizes: the argument that states the sizes of the value.
        dim: the argument that names the axis; a number if the axis is always the same.
        scales_by_width: the call divides by the square root of the width of its first operand, unless its argument ``scale`` states
            another factor.
        trains: the position of the flag that puts a call of ATen in training mode.
    """

    rule: Rule | None = None
    view: bool = False
    hands_on: bool = False
    casts: bool = False
    affine: bool = False
    joins: Literal["addition", "sum", "product", "quotient"] | None = None
    in_place: bool = False
    reshapes: bool = False
    takes_apart: bool = False
    transposes: bool = False
    aggregates: bool = False
    statistic: Literal["sum", "mean"] | None = None
    keeps_axis: bool = False
    reads: Literal["sizes", "kind"] | None = None
    form_of: int | None = None
    reads_sizes: bool = False
    sizes: Argument | None = None
    dim: Argument | int | None = None
    scales_by_width: bool = False
    trains: int | None = None

    @property
    def adds(self) -> bool:
        """Whether the call adds its operands, as a residual connection does."""
        return self.joins in ("addition", "sum")

    @property
    def scales(self) -> bool:
        """Whether the call multiplies or divides its operands entry by entry."""
        return self.joins in ("product", "quotient")


_TABLE: dict[Any, Operator] = {}
_UNKNOWN = Operator()
# An attribute of a tensor that is a tensor itself (``x.real``) shares its memory.
_UNKNOWN_ATTRIBUTE = Operator(view=True)


def enter(operator: Operator, spellings: Iterable[Any]) -> None:
    """Enter a row under every spelling of its operators. A row that a spelling already has is replaced."""
    _TABLE.update(dict.fromkeys(spellings, operator))


def entered(spelled: Any) -> Operator | None:
    """Return the row of a spelling; None if the table has none."""
    return _TABLE.get(spelled)


def rows_of(rule: Rule) -> list[Operator]:
    """Return all rows with a rule."""
    return [operator for operator in _TABLE.values() if operator.rule is rule]


def operator_of(node: fx.Node, module: nn.Module | None = None) -> Operator:
    """Return the row of the operator that a node calls, or an empty row if the table has none.

    Args:
        node: any node of a graph.
        module: the module that it calls, for a ``call_module`` node.
    """
    target: Any = node.target
    if module is not None:
        return _TABLE.get(type(module), _UNKNOWN)
    if node.op not in ("call_function", "call_method"):
        return _UNKNOWN
    if target is getattr:
        return _TABLE.get(Attribute(str(node.args[1])), _UNKNOWN_ATTRIBUTE)
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if isinstance(packet, torch._ops.OpOverloadPacket) and packet not in _TABLE:
        return _TABLE.get(Qualified(packet._qualified_op_name), _UNKNOWN)
    return _TABLE.get(packet, _UNKNOWN)
