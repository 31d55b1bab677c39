"""The vocabulary of the dependency analysis: axes, and relations between them.

A vertex is one axis of one tensor, which is a node's value, a parameter or a buffer. An operator's rule
(:mod:`vbpfx.rules.ops`) looks at one call through a :class:`Site` and yields relations. It never sees the rest
of the graph. :mod:`vbpfx.analysis.blocks` combines the relations of all calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from vbpfx.rules.routing import Routing
from vbpfx.rules.table import Argument, Operator, operator_of


class Axis(NamedTuple):
    """One axis of a tensor. ``owner`` is the name of a node or, if ``is_parameter``, of a parameter or buffer."""

    owner: str
    dim: int
    is_parameter: bool = False


@dataclass(frozen=True)
class Operand:
    """A tensor as a rule sees it: the name of its owner (see :class:`Axis`), and its shape."""

    owner: str
    shape: tuple[int, ...]
    is_parameter: bool = False

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def axis(self, dim: int) -> Axis:
        """Return an axis; a negative ``dim`` counts from the end."""
        return Axis(self.owner, dim % max(1, self.ndim), self.is_parameter)

    @property
    def axes(self) -> list[Axis]:
        """All axes, in order."""
        return [self.axis(dim) for dim in range(self.ndim)]


@dataclass(frozen=True)
class Same:
    """Channel c of one axis is channel c of the other, and depends on no other channel."""

    a: Axis
    b: Axis


@dataclass(frozen=True)
class Part:
    """Channel c of ``part`` is channel ``start`` + c of ``whole``, as for a slice, a chunk, or a part of a concatenation."""

    whole: Axis
    part: Axis
    start: int


@dataclass(frozen=True)
class Grouped:
    """Channel c of ``part`` belongs to k consecutive channels of ``whole``, k c to k c + k - 1; ``whole`` is k times as long.

    ``part`` is every k-th entry of ``whole``, or ``whole`` after a view that moves every k entries to an axis of their own.
    The k channels are kept or removed together.
    """

    whole: Axis
    part: Axis


@dataclass(frozen=True)
class Stacked:
    """Channel g d + c of ``whole`` is channel c of ``inner``, in group g. ``inner`` has d channels, and ``whole`` consists of G groups.

    A view makes both axes of one, or one of both, as for the heads of attention. On ``outer``, an axis of the same tensor as
    ``inner``, entry i belongs to group i mod G: ``outer`` may hold other axes in front of the groups (samples and heads in one axis).
    None if the tensor has no such axis.
    """

    whole: Axis
    inner: Axis
    outer: Axis | None


@dataclass(frozen=True)
class Repeated:
    """Entry i of ``out`` is entry i // ``count`` of ``x``: every entry is followed by its copies."""

    x: Axis
    out: Axis
    count: int


@dataclass(frozen=True)
class Merged:
    """``out`` is ``first`` and ``second`` flattened: all entries of ``second`` for each entry of ``first`` in turn."""

    out: Axis
    first: Axis
    second: Axis


@dataclass(frozen=True)
class Opaque:
    """The axis cannot be narrowed through this call.

    If ``in_order``, its entries stay where they are: only its length matters, or whole entries are grouped or repeated.
    """

    axis: Axis
    reason: str
    in_order: bool = False


@dataclass(frozen=True)
class Produces:
    """Each row of ``weight`` produces one channel of ``out``.

    If ``groups`` is more than 1, ``out`` consists of so many equal parts, which must stay equally long. ``routing`` is given if
    ``weight`` belongs to a stack of experts: each row of ``out`` is made by the weight of its expert.
    """

    out: Axis
    weight: Axis
    groups: int = 1
    routing: Routing | None = None


@dataclass(frozen=True)
class Contracts:
    """The call sums over ``source`` with ``weight``: the axis ends here, and a constant channel can be folded.

    It is folded into ``bias``, which is None if the call has no bias. If ``padded``, the call adds zeros around ``source``, so
    that a channel that is constant inside is not constant for the call, and a bias cannot replace it. If ``groups`` is more than
    1, ``source`` consists of so many equal parts. The rows of ``weight`` are divided alike, and each row reads its own part alone.
    ``routing`` is given if ``weight`` belongs to a stack of experts: the weight of its expert sums over each row. ``total`` is then
    the node that adds the bias, if that is not the call itself.
    """

    source: Axis
    weight: Axis
    bias: Operand | None
    padded: bool = False
    groups: int = 1
    routing: Routing | None = None
    total: str = ""


@dataclass(frozen=True)
class Paired:
    """The call multiplies channel c of ``first`` by channel c of ``second``, and sums over c, as for queries and keys.

    Both axes end here. A channel that is 0 in one of them adds nothing.
    """

    first: Axis
    second: Axis


@dataclass(frozen=True)
class Reduces:
    """The call computes a statistic over ``source``; the contribution of a constant channel can be added to it.

    ``kind`` is ``"sum"`` or ``"mean"``, which remove the axis, or ``"layer_norm"`` or ``"rms_norm"``, which keep it.
    """

    source: Axis
    kind: Literal["sum", "mean", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class SizeStated:
    """An integer among the call's arguments counts the channels ``start`` to ``stop`` of the axis (default: all).

    ``path`` is the place of the integer in the call, or ``("module", name)`` for an attribute of the module whose code makes the call.
    ``by_code`` is false if the call computes the number itself, as ``chunk`` does, so that only the rewritten graph states it.
    ``computed`` are the arguments that are given instead of the integer and are computed from sizes
    (``h[..., : h.shape[-1] // 2]``).
    """

    axis: Axis
    path: tuple[str | int, ...]
    start: int = 0
    stop: int | None = None
    by_code: bool = True
    computed: tuple[fx.Node, ...] = ()


Relation = (
    Same | Part | Grouped | Stacked | Repeated | Merged | Opaque | Produces | Contracts | Paired | Reduces | SizeStated
)


class SizeRead(NamedTuple):
    """A value computed from sizes.

    ``axes`` are the axes whose sizes were read. If ``plain``, the value is these sizes unchanged: an integer is the size
    of one axis, a shape the sizes of all axes in order. If ``pure``, the value is computed from sizes and numbers alone.
    """

    axes: tuple[Axis, ...]
    plain: bool
    pure: bool = False


@dataclass(frozen=True)
class Names:
    """Names of a captured model's parameters and buffers. A tensor with several names is listed under the first.

    Attributes:
        of_attribute: ``get_attr`` target -> name.
        of_module: leaf module path -> {attribute -> name}.
    """

    of_attribute: Mapping[str, str]
    of_module: Mapping[str, Mapping[str, str]]


class ComputedArgumentError(Exception):
    """A rule needs a constant argument, but the call computes it. The analysis turns this into a refusal."""


class Site:
    """One call in the graph, as an operator's rule sees it.

    Args:
        node: the call.
        module: the leaf module, for ``call_module``.
        names: names of parameters and buffers.
        sizes: for each node whose value was computed from sizes, what is known about that value.
    """

    def __init__(
        self, node: fx.Node, module: nn.Module | None, names: Names, sizes: Mapping[fx.Node, SizeRead]
    ) -> None:
        self.node = node
        self.module = module
        self.names = names
        self._sizes = sizes

    @property
    def name(self) -> str:
        """The operator's bare name: the module's class in lower case, or the name of the function or method."""
        return type(self.module).__name__.lower() if self.module is not None else spelling(self.node)

    @property
    def operator(self) -> Operator:
        """The operator's row in the operator table."""
        return operator_of(self.node, self.module)

    def path(self, position: int, name: str) -> tuple[str | int, ...]:
        """Return the place of an argument in the call, for :class:`SizeStated`."""
        return ("kwargs", name) if name in self.node.kwargs else ("args", position)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position (the tensor itself is 0) or keyword, or the module's attribute of that name."""
        return Argument(position, name, default).given(self.node, self.module)

    def constant(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that must be a constant: an integer, a tuple of integers, None or a flag.

        Raises:
            ComputedArgumentError: the call computes it.
        """
        value = self.argument(position, name, default)
        if any(isinstance(entry, fx.Node) for entry in (value if isinstance(value, (tuple, list)) else (value,))):
            raise ComputedArgumentError(name)
        return value

    def along(self, position: int, name: str) -> Any:
        """Return the axis or axes that the call names, in the argument given by its row or else in the one given here."""
        stated = self.operator.dim
        return stated if isinstance(stated, int) else self.constant(*(stated or (position, name)))

    def operand(self, position: int, name: str) -> Operand | None:
        """Return a tensor argument by position or keyword, or the module's parameter or buffer of that name."""
        if self.module is not None:
            own = self.names.of_module.get(str(self.node.target), {})
            if name in own:
                return Operand(own[name], tuple(getattr(self.module, name).shape), is_parameter=True)
            if position > 0:
                return None
        value = Argument(position, name).given(self.node)
        return operand_of(value, self.names) if isinstance(value, fx.Node) else None

    def weight(self, position: int) -> tuple[Operand | None, bool]:
        """Return the parameter that an argument holds, or None; and whether the argument holds its transpose."""
        node = self.node.args[position] if position < len(self.node.args) else None
        if not isinstance(node, fx.Node):
            return None, False
        transposed = operator_of(node).transposes
        source = node.args[0] if transposed else node
        if transposed and len(node.args) > 2 and _first_dim(node.args[1:]) == 0:
            transposed = False  # permute(0, 1), transpose(0, 0)
        found = operand_of(source, self.names) if isinstance(source, fx.Node) else None
        return (found if found is not None and found.is_parameter else None), transposed

    @property
    def of_floats(self) -> bool:
        """Whether the tensors that the call reads and returns are all floating-point."""
        values = [node.meta.get("val") for node in (self.node, *self.node.all_input_nodes)]
        return all(value.is_floating_point() for value in values if isinstance(value, Tensor))

    @property
    def x(self) -> Operand:
        """The first tensor argument."""
        return self.operands[0]

    @property
    def out(self) -> Operand:
        """The tensor that the call returns."""
        operand = operand_of(self.node, self.names)
        assert operand is not None
        return operand

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments, including nested ones, in order."""
        found = (operand_of(node, self.names) for node in self.node.all_input_nodes)
        return [operand for operand in found if operand is not None]

    def parts(self, position: int, name: str) -> list[Operand] | None:
        """Return the entries of an argument that is a list of tensors, with repetitions; None if it is not such a list."""
        value = self.argument(position, name)
        if not isinstance(value, (list, tuple)):
            return None
        found = [operand_of(entry, self.names) if isinstance(entry, fx.Node) else None for entry in value]
        return [operand for operand in found if operand is not None] if None not in found else None

    def size_read(self, value: Any) -> SizeRead | None:
        """Return what is known about an argument that was computed from sizes; None for any other argument."""
        return self._sizes.get(value) if isinstance(value, fx.Node) else None

    def number(self, value: Any) -> Any:
        """Return the integer that an argument computed from sizes has in the dense network; any other argument unchanged."""
        read = self.size_read(value)
        found = value.meta.get("val") if read is not None and read.pure else None
        return found if isinstance(found, int) else value

    def all_opaque(self, reason: str) -> Iterator[Relation]:
        """Yield that no axis of any tensor of the call can be narrowed."""
        out = operand_of(self.node, self.names)
        for operand in (*self.operands, *([out] if out is not None else [])):
            for axis in operand.axes:
                yield Opaque(axis, reason)


def _first_dim(dims: tuple[Any, ...]) -> Any:
    """Return which axis of a matrix comes first after permute(*dims) or transpose(*dims)."""
    listed = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return listed[0] % 2 if listed[0] % 2 == 0 or listed[0] == listed[1] else 1


def operand_of(node: fx.Node, names: Names) -> Operand | None:
    """Return a node's value as an operand; None if it is not a tensor. A parameter has its own name, not the node's."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    if node.op == "get_attr" and str(node.target) in names.of_attribute:
        return Operand(names.of_attribute[str(node.target)], shape, is_parameter=True)
    return Operand(node.name, shape)


def spelling(node: fx.Node) -> str:
    """Return the bare name of the function, method or ATen operator that a node calls."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return node.target.split(".")[-1] if isinstance(node.target, str) else str(node.target.__name__)


def as_tuple(value: Any, repeat: int) -> tuple[Any, ...]:
    """Return a tuple or list as a tuple, and any other value as a tuple that holds it ``repeat`` times."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * repeat


def leading(x: Operand, out: Operand, but: int) -> Iterator[Relation]:
    """Yield that all axes except the last ``but`` are the same in both tensors."""
    for dim in range(x.ndim - but):
        yield Same(x.axis(dim), out.axis(dim))
