"""Export a network as an ``ExportedProgram``, with a dynamic batch axis or as a replacement for another program.

A program states the structure of its inputs, and which sizes are fixed, which are open and in what range, and which are
equal. :class:`Contract` reads this from a program. Its replacement is exported anew under the same contract, never
patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs, argument_names
from vbpfx.display.quiet import quiet_logging, quiet_warnings
from vbpfx.errors import CalibrationError, CaptureError, ExportError, first_line
from vbpfx.graph.capture import share_parameters
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.frontends import dynamic_shapes
from vbpfx.graph.run import outputs_of
from vbpfx.outputs.differences import TOLERANCES, require_close


@dataclass(frozen=True)
class Contract:
    """The inputs that a program accepts.

    Attributes:
        module: the program as a graph without its guards.
        inputs: example inputs, in the structure with which the program was exported.
        names: the names of the inputs' leaves, in order.
        leaves: what the program states about each leaf: a fake tensor, or the fixed value of an argument that is not a
            tensor.
        ranges: symbol of an open size -> the smallest and the largest size, None if there is no largest.
    """

    module: fx.GraphModule
    inputs: Inputs
    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    ranges: dict[sympy.Symbol, tuple[int, int | None]]

    @classmethod
    def of(cls, program: ExportedProgram) -> Contract:
        """Read the contract of a program.

        Raises:
            CaptureError: the object is not a program, or it cannot be turned into a module, or it writes to its buffers
                or inputs.
        """
        if not isinstance(program, ExportedProgram):
            raise CaptureError(
                f"expected a torch.export.ExportedProgram, got {type(program).__name__}; export the model with "
                f"torch.export.export(model.eval(), args), or prune the model itself with vbpfx.prune"
            )
        try:
            module = program.module(check_guards=False)
        except Exception as error:  # the program is in another dialect
            raise CaptureError(f"the program cannot be made a module again: {first_line(error)}") from error
        assert isinstance(module, fx.GraphModule)
        _refuse_writes(program, module)
        if program.example_inputs is None:
            raise CaptureError(
                "the program holds no example inputs, which exporting anew needs: set program.example_inputs"
            )
        args, kwargs = program.example_inputs
        values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
        given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        leaves = tuple(a.value if isinstance(a, ConstantArgument) else values[a.name] for a in given)
        ranges = {
            symbol: (
                int(found.lower) if found.lower.is_Integer else 0,
                int(found.upper) if found.upper.is_Integer else None,
            )
            for symbol, found in program.range_constraints.items()
            if isinstance(symbol, sympy.Symbol)
        }
        example = Inputs(tuple(args), dict(kwargs)).map(torch.clone)  # a view would keep its whole base tensor alive
        return cls(module, example, tuple(a.name for a in given), leaves, ranges)

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        """The open sizes in the form that ``torch.export.export`` takes, with the same equalities and ranges."""
        known: dict[sympy.Symbol, Any] = {}

        def sizes(leaf: Any) -> dict[int, Any] | None:
            if not isinstance(leaf, Tensor):
                return None
            shape: Sequence[Any] = leaf.shape
            return {axis: self._dim(n.node.expr, known) for axis, n in enumerate(shape) if isinstance(n, torch.SymInt)}

        structure = pytree.tree_structure((self.inputs.args, self.inputs.kwargs))
        args, kwargs = pytree.tree_unflatten([sizes(leaf) for leaf in self.leaves], structure)
        return dict(zip(argument_names(self.module, self.inputs), args, strict=False)) | dict(kwargs)

    def _dim(self, size: sympy.Expr, known: dict[sympy.Symbol, Any]) -> Any:
        """Return a size as torch.export's ``Dim``: a symbol, or a multiple of one plus a number; else ``Dim.AUTO``."""
        symbols = sorted(size.free_symbols, key=str)
        if len(symbols) != 1 or not size.is_polynomial(*symbols) or sympy.degree(size, symbols[0]) != 1:
            return Dim.AUTO
        factor, rest = size.coeff(symbols[0]), size.subs(symbols[0], 0)
        if symbols[0] not in known:
            low, high = self.ranges.get(symbols[0], (0, None))
            known[symbols[0]] = Dim(str(symbols[0]), min=low or None, max=high)
        dim = known[symbols[0]]
        dim = dim if factor == 1 else int(factor) * dim
        return dim if rest == 0 else dim + int(rest)

    def require(self, inputs: Inputs, number: int) -> None:
        """Raise a CalibrationError if the program does not accept a batch.

        Args:
            inputs: the batch.
            number: the batch's number, counted from 1.
        """
        try:
            given = graph_arguments(self.module, inputs)
        except (TypeError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"batch {number} (counted from 1) does not fit the program: {first_line(error)}\n  this batch: "
                f"{inputs.describe()}\n  the program's example: {self.inputs.describe()}"
            ) from error
        found: dict[sympy.Symbol, int] = {}
        for name, leaf, value in zip(self.names, self.leaves, given, strict=True):
            if wrong := self._misfit(leaf, value, found):
                raise CalibrationError(
                    f"batch {number} (counted from 1) does not fit the program: {name} {wrong}\n  this batch: {inputs.describe()}"
                )

    def _misfit(self, leaf: Any, value: Any, found: dict[sympy.Symbol, int]) -> str:
        """Return what is wrong with a value, or "" if it fits. Record the sizes of symbols in ``found``."""
        if not isinstance(leaf, Tensor):
            if isinstance(value, Tensor) or (not isinstance(leaf, torch.SymInt) and value != leaf):
                return f"is {leaf!r} in the program, a {type(value).__name__} in the batch"
            return ""
        if not isinstance(value, Tensor):
            return f"is a tensor in the program, a {type(value).__name__} in the batch"
        if value.ndim != leaf.ndim:
            return f"has {value.ndim} axes, the program takes {leaf.ndim}"
        for axis, (expected, size) in enumerate(zip(leaf.shape, value.shape, strict=True)):
            if not isinstance(expected, torch.SymInt):
                if expected != size:
                    return f"has size {size} on axis {axis}, and the program only accepts {expected}: export it with a dynamic size there"
                continue
            symbol = expected.node.expr
            if not isinstance(symbol, sympy.Symbol):
                continue
            low, high = self.ranges.get(symbol, (0, None))
            if size < low or (high is not None and size > high):
                return f"has size {size} on axis {axis}, the program takes {low} to {'any' if high is None else high}"
            if found.setdefault(symbol, size) != size:
                return f"has size {size} on axis {axis}, where an equal size before is {found[symbol]}"
        return ""


def export_program(network: nn.Module, inputs: Inputs, *, like: ExportedProgram | None = None) -> ExportedProgram:
    """Export a network in eval mode as an ``ExportedProgram``, and check the program against the network.

    Args:
        network: the network.
        inputs: example inputs. The program's batch axis is dynamic, and so are other axes of varying length if the
            model allows.
        like: the program to replace. The new program takes the same inputs, with the same open sizes, ranges and
            structure, and ``inputs`` is ignored.

    Raises:
        ExportError: torch.export cannot export the network, or the program computes something else.
        CaptureError: :class:`Contract` cannot read ``like``.
    """
    if like is None:
        example = inputs.resized(2)
        shapes = dynamic_shapes(network, example, batch=Dim.DYNAMIC)
    else:
        contract = Contract.of(like)
        example, shapes = contract.inputs, contract.dynamic_shapes
        network = _with_kinds(network, like)
    try:
        with quiet_warnings(), quiet_logging():
            program = torch.export.export(network, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the exporter and the model may raise any exception
        raise ExportError(
            f"torch.export cannot export the network: {type(error).__name__}: {first_line(error)}"
        ) from error
    _require_equal(program, network, example)
    return program


def _with_kinds(network: nn.Module, like: ExportedProgram) -> nn.Module:
    """Return a copy that shares the parameters, with the same kinds of tensors as ``like``.

    A ``torch.fx.GraphModule`` turns every tensor into a persistent buffer. Constants become plain attributes again, and
    buffers persistent or not, as in ``like``.
    """
    signature = like.graph_signature
    network = share_parameters(network)
    for name, value in list(network.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        holder = network.get_submodule(owner)
        if name in signature.non_persistent_buffers:
            holder.register_buffer(attribute, value, persistent=False)
        elif name in like.constants and name not in signature.buffers:
            delattr(holder, attribute)
            setattr(holder, attribute, value)
    return network


def _require_equal(program: ExportedProgram, network: nn.Module, example: Inputs) -> None:
    expected = outputs_of(network, example)
    allowed = max((TOLERANCES.get(t.dtype, 0.0) for t in expected), default=0.0)
    require_close(
        outputs_of(program.module(), example),
        expected,
        allowed,
        lambda error: ExportError(
            f"the program differs from the network by {error:.2e} of the output's size (allowed {allowed:.0e})"
        ),
    )


def _refuse_writes(program: ExportedProgram, module: fx.GraphModule) -> None:
    """Refuse a program that keeps state: it computes something else at every call, so statistics of it mean nothing."""
    signature = program.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values(), *_written(module)]
    if written:
        raise CaptureError(
            f"the program writes to {', '.join(dict.fromkeys(written))} when it runs; prune the model before it gets a cache or "
            f"a running mean, or export model.eval()"
        )


def _written(module: fx.GraphModule) -> Sequence[str]:
    """Return the names of the buffers and inputs that in-place operators change, directly or through a view."""
    root: dict[fx.Node, fx.Node] = {}
    written = []
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            root[node] = node
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, fx.Node):
                continue
            root[node] = root[value]
            values = argument.alias_info.is_write and node.target is not torch.ops.aten.detach_.default
            if values and root[value].op in ("get_attr", "placeholder"):
                written.append(str(root[value].target))
        root.setdefault(node, node)
    return written
