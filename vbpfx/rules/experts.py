"""Rules for the experts of a mixture, whose weights are entries of one parameter (a stack).

A call may read the whole stack (grouped products, batched products), the entries that belong to its rows
(``weight[expert_ids]``), or one entry (``weight[3]`` in a loop over the experts).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vbpfx.rules.axes import (
    Axis,
    Contracts,
    Names,
    Opaque,
    Operand,
    Produces,
    Relation,
    Same,
    Site,
    operand_of,
    spelling,
)
from vbpfx.rules.parts import indexing, select, split_axis
from vbpfx.rules.picking import aten_index, is_computed
from vbpfx.rules.pointwise import unchanged
from vbpfx.rules.routing import Routing
from vbpfx.rules.shapes import permutation, regrouping
from vbpfx.rules.table import Argument, operator_of

_FOLLOWED = (permutation, regrouping, aten_index, indexing, select, unchanged)
_WHOLE_EXPERTS = "its entries are whole experts"


@dataclass(frozen=True)
class StackRead:
    """A value that holds entries of a parameter, apart from the order of its axes.

    Attributes:
        parameter: the parameter, whose first axis counts experts.
        dims: for every axis of the value the axis of the parameter that it is; None for rows, or an axis of size 1.
        routing: how rows pick entries; None if the value has all of them.
        use: the call that reads the parameter itself; None if the value is the parameter.
    """

    parameter: Operand
    dims: tuple[int | None, ...]
    routing: Routing | None
    use: fx.Node | None

    def axis(self, dim: int) -> Axis:
        """Return the parameter's axis that is axis ``dim`` of the value."""
        found = self.dims[dim]
        assert found is not None
        return self.parameter.axis(found)


def stack_read(node: Any, names: Names) -> StackRead | None:
    """Return how a value is read from a parameter; None if it is anything else than entries of one."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node):
        own = operand_of(node, names)
        if own is not None and own.is_parameter:
            break
        row = operator_of(node)
        followed = row.rule in _FOLLOWED or row.hands_on or spelling_of(node) == "unbind"
        if node.op not in ("call_function", "call_method") or not followed or not node.args:
            return None
        chain.append(node)
        node = node.args[0]
    else:
        return None
    dims: list[int | None] = list(range(own.ndim))
    routing: Routing | None = None
    for step in reversed(chain):
        if spelling_of(step) == "unbind":
            continue
        found = _unbound(step, dims) if _takes_unbound(step) else _through(step, dims, names)
        if found is None:
            return None
        if 0 in dims and 0 not in found:
            routing = _picks(step, dims, own.shape[0])
            if routing is None:
                return None
        dims = found
    return StackRead(own, tuple(dims), routing, chain[-1] if chain else None)


def spelling_of(node: fx.Node) -> str:
    """Return the bare name of what a node calls; "" if it calls nothing."""
    return spelling(node) if node.op in ("call_function", "call_method") else ""


def _takes_unbound(step: fx.Node) -> bool:
    source = step.args[0]
    return step.target is operator.getitem and isinstance(source, fx.Node) and spelling_of(source) == "unbind"


def _unbound(step: fx.Node, dims: list[int | None]) -> list[int | None] | None:
    source, index = step.args
    assert isinstance(source, fx.Node)
    taken = split_axis(source)
    return dims[:taken] + dims[taken + 1 :] if isinstance(index, int) else None


def _through(step: fx.Node, dims: list[int | None], names: Names) -> list[int | None] | None:
    """Return the parameter's axes behind one call, as its rule tells them; None if it takes a part of an axis."""
    site = Site(step, None, names, {})
    row = site.operator
    if row.hands_on or row.rule is None:
        return dims if row.hands_on else None
    x, out = site.x, site.out
    found: list[int | None] = [None] * out.ndim
    for relation in row.rule(site):
        if isinstance(relation, Same) and relation.a.owner == x.owner and relation.b.owner == out.owner:
            found[relation.b.dim] = dims[relation.a.dim]
    lost = {dim for dim in dims if dim is not None} - {0} - set(found)
    return None if lost else found


def _picks(step: fx.Node, dims: list[int | None], experts: int) -> Routing | None:
    """Return how a call picks entries along the first axis of a stack."""
    if dims[0] != 0:
        return None
    index: Any = step.args[1] if len(step.args) > 1 else None
    if operator_of(step).rule is select:
        taken = Argument(1, "dim", 0).given(step), Argument(2, "index").given(step)
        return Routing("one", experts, at=taken[1] % experts) if taken[0] == 0 and isinstance(taken[1], int) else None
    first, *others = index if isinstance(index, (tuple, list)) else (index,)
    if any(entry is not None and entry is not Ellipsis and entry != slice(None) for entry in others):
        return None
    if isinstance(first, int):
        return Routing("one", experts, at=first % experts)
    if is_computed(first) and first.meta["val"].ndim == 1 and not first.meta["val"].dtype.is_floating_point:
        return Routing("ids", experts, by=first.name)
    return None


def grouped_product(site: Site) -> Iterator[Relation]:
    """y[s, o] = sum_i x[s, i] W[e(s), i, o], where the rows s are sorted by expert e and offsets tell where each expert's rows end."""
    x, offsets = site.operand(0, "input"), site.argument(2, "offs")
    read = stack_read(site.argument(1, "weight"), site.names)
    whole = read is not None and read.routing is None and None not in read.dims and len(read.dims) == 3
    if x is None or x.ndim != 2 or read is None or not whole or read.dims[0] != 0 or not isinstance(offsets, fx.Node):
        yield from site.all_opaque("a grouped product whose weights are computed, or whose groups are not experts")
        return
    if site.argument(3, "bias") is not None:
        yield from site.all_opaque("a grouped product with a bias among its arguments")
        return
    routing = Routing("offsets", read.parameter.shape[0], by=offsets.name)
    yield Same(x.axis(0), site.out.axis(0))
    yield Opaque(read.axis(0), _WHOLE_EXPERTS)
    yield from _layer(site, x.axis(-1), site.out.axis(-1), read.axis(1), read.axis(2), routing, routing)


def expert_linear(site: Site, read: StackRead) -> Iterator[Relation]:
    """y[..., o] = sum_i W[e, o, i] x[..., i] + b[e, o] for one expert e."""
    x, out, routing = site.x, site.out, read.routing
    assert routing is not None
    given = Argument(2, "bias").given(site.node)
    bias = stack_read(given, site.names)
    if given is not None and (bias is None or bias.routing != routing):
        yield from site.all_opaque("the layer's weight is one expert's, and its bias is not")
        return
    yield from (Same(x.axis(dim), out.axis(dim)) for dim in range(x.ndim - 1))
    own = operand_of(given, site.names) if isinstance(given, fx.Node) else None
    if own is not None:
        yield Same(out.axis(-1), own.axis(0))
    yield from _layer(site, x.axis(-1), out.axis(-1), read.axis(1), read.axis(0), routing, routing, bias)


def expert_product(site: Site, read: StackRead, other: Operand, *, weight_first: bool) -> Iterator[Relation] | None:
    """Return the relations of x @ W or W @ x, where W holds the weights of one expert, of each row's expert, or of all.

    None if the product has another form.
    """
    out, back, dims = site.out, 2 if weight_first else 1, read.dims
    inner, outer = (-1, -2) if weight_first else (-2, -1)
    if None in dims[-2:] or other.ndim < 2 or out.ndim < 2:
        return None
    kept = Same(other.axis(-1 if weight_first else -2), out.axis(-1 if weight_first else -2))
    source, made = other.axis(-back), out.axis(outer)
    experts = read.parameter.shape[0]
    if read.routing is not None and read.routing.kind == "one" and len(dims) == 2:
        ahead = [Same(other.axis(dim), out.axis(dim)) for dim in range(other.ndim - 2)]
        return iter(
            [*ahead, kept, *_layer(site, source, made, read.axis(inner), read.axis(outer), read.routing, read.routing)]
        )
    if len(dims) != 3:
        return None
    if read.routing is not None and read.routing.kind == "ids" and other.ndim == 3:
        rows = Same(other.axis(0), out.axis(0))
        return iter(
            [rows, kept, *_layer(site, source, made, read.axis(inner), read.axis(outer), read.routing, read.routing)]
        )
    if read.routing is None and dims[0] == 0:
        makes = Routing("axis", experts, at=-3)
        has_own = other.ndim > 2 and other.shape[-3] == experts
        reads = makes if has_own else Routing("all", experts)
        ahead = [Same(other.axis(-3), out.axis(-3))] if has_own else []
        ahead += [Same(other.axis(-n), out.axis(-n)) for n in range(4, other.ndim + 1)]
        along: list[Relation] = [Same(read.axis(0), out.axis(-3)), Opaque(read.axis(0), _WHOLE_EXPERTS), *ahead, kept]
        return iter([*along, *_layer(site, source, made, read.axis(inner), read.axis(outer), reads, makes)])
    return None


def expert_einsum(site: Site, equation: str, operands: list[Operand], nodes: list[Any]) -> Iterator[Relation] | None:
    """Return the relations of an einsum of a value and the weights of all experts; None if it is something else.

    In "bnei,eih->bneh" e counts experts, i is summed over and h is made.
    """
    left, _, right = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    reads = [stack_read(node, site.names) for node in nodes]
    stacks = [n for n, read in enumerate(reads) if read is not None and read.routing is None and len(read.dims) == 3]
    if len(letters) != 2 or len(stacks) != 1 or any(len(set(part)) < len(part) for part in (*letters, right)):
        return None
    read, x = reads[stacks[0]], operands[1 - stacks[0]]
    own, others = letters[stacks[0]], letters[1 - stacks[0]]
    assert read is not None
    if 0 not in read.dims:
        return None
    expert = own[read.dims.index(0)]
    summed = [letter for letter in own if letter in others and letter not in right]
    made = [letter for letter in own if letter in right and letter not in others]
    made = [letter for letter in made if letter != expert]
    if expert not in right or len(summed) != 1 or len(made) != 1 or set(own) != {expert, summed[0], made[0]}:
        return None
    if any(letter not in right for letter in others if letter != summed[0]):
        return None
    out = site.out
    makes = Routing("axis", out.shape[right.index(expert)], at=right.index(expert) - out.ndim)
    reads_at = Routing("axis", makes.experts, at=others.index(expert) - x.ndim) if expert in others else None
    shared: list[Relation] = [
        Same(x.axis(dim), out.axis(right.index(letter))) for dim, letter in enumerate(others) if letter != summed[0]
    ]
    stack = read.axis(own.index(expert))
    along: list[Relation] = [Same(stack, out.axis(right.index(expert))), Opaque(stack, _WHOLE_EXPERTS)]
    layer = _layer(
        site,
        x.axis(others.index(summed[0])),
        out.axis(right.index(made[0])),
        read.axis(own.index(summed[0])),
        read.axis(own.index(made[0])),
        reads_at or Routing("all", makes.experts),
        makes,
    )
    return iter([*shared, *along, *layer])


def _layer(
    site: Site,
    source: Axis,
    out: Axis,
    columns: Axis,
    rows: Axis,
    reads: Routing,
    makes: Routing,
    bias: StackRead | None = None,
) -> Iterator[Relation]:
    total = ""
    if bias is None:
        bias, total = _added_behind(site, makes)
    yield Contracts(source, columns, bias.parameter if bias else None, routing=reads, total=total)
    yield Produces(out, rows, routing=makes)


def _added_behind(site: Site, routing: Routing) -> tuple[StackRead | None, str]:
    """Return the experts' bias that is added to the call's value, and the name of the sum; None and "" if there is none."""
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        row = operator_of(user)
        if row.joins == "addition":
            others = [argument for argument in user.all_input_nodes if argument is not node]
            plain = len(others) == 1 and not user.kwargs and len(user.args) == 2
            read = stack_read(others[0], site.names) if plain else None
            own = (
                read is not None and read.parameter.ndim == 2 and (read.routing is not None) != (routing.kind == "axis")
            )
            return (read, user.name) if own else (None, "")
        if spelling_of(user) != "squeeze" and not row.casts and not row.hands_on:
            break
        node = user
    return None, ""
