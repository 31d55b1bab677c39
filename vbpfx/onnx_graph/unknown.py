"""ONNX operators that are in no table, such as control flow: each becomes a call that ONNX Runtime computes.

Such a call is one function in the fx graph. The table of :mod:`vbpfx.rules.ops` does not know it either, so every axis
of its inputs and outputs is refused under the operator's name. That includes values that its subgraphs read from the
graph around them. The rest of the network is analysed as usual. The shapes of the call's outputs come from runs of the
file at several batch sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from vbpfx.data.inputs import Inputs
from vbpfx.errors import CaptureError, first_line
from vbpfx.onnx_graph.builder import Array, Builder, Constant, Value, is_setting, widened
from vbpfx.onnx_graph.file import true_inputs
from vbpfx.onnx_graph.runtime import session_with
from vbpfx.onnx_session.session import open_session

_RECURRENT = ("LSTM", "GRU", "RNN")
# The file is run at these batch sizes to learn the shapes of its values. Two runs determine how the shapes depend on
# the batch size, assuming that they do so linearly; the third run checks this.
_PROBED_BATCHES = (2, 3, 5)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """A value's dtype, and its shape at every batch size at which the file was run."""

    dtype: np.dtype[Any]
    shapes: list[Shape]


class Probe:
    """Run a model at several batch sizes, to learn the shapes of values that cannot be inferred otherwise.

    Args:
        folder: the folder of the model's external data.
        inputs: one batch, keyed by the names of the inputs.
    """

    def __init__(self, model: ir.Model, folder: Path, inputs: Inputs) -> None:
        self.model, self.folder = model, folder
        sizes = _PROBED_BATCHES if inputs.batch_size else ()
        batches = [inputs, *(inputs.resized(size) for size in sizes if size != inputs.batch_size)]
        self._feeds = [{name: tensor.cpu().numpy() for name, tensor in batch.kwargs.items()} for batch in batches]
        self._seen: dict[str, Seen] = {}

    def look_at(self, nodes: Sequence[ir.Node]) -> None:
        """Run the file to learn the inputs and outputs of these nodes, unless they are known already.

        Raises:
            CaptureError: ONNX Runtime cannot run the file, or a value is not a tensor of numbers.
        """
        given = {str(value.name) for value in true_inputs(self.model)}
        values = dict.fromkeys(v for node in nodes for v in (*operands(node), *made_by(node)) if not _is_stored(v))
        names = [str(value.name) for value in values if str(value.name) not in self._seen]
        if not names:
            return
        wanted = [name for name in names if name not in given]
        session = session_with(self.model, self.folder, wanted)
        runs: list[dict[str, Any]] = []
        for feeds in self._feeds:
            try:
                runs.append(feeds | dict(zip(wanted, session.run(wanted, feeds) if wanted else [], strict=True)))
            except Exception as error:  # ONNX Runtime has many classes of exceptions
                if not runs:
                    raise CaptureError(
                        f"ONNX Runtime cannot compute the values {', '.join(map(repr, wanted))} of this file: {first_line(error)}"
                    ) from error
                self._feeds = self._feeds[: len(runs)]  # the file is fixed to its batch size
                break
        for name in names:
            if not all(isinstance(run[name], np.ndarray) and run[name].dtype.kind in "biuf" for run in runs):
                raise CaptureError(f"its value {name!r} is not a tensor of numbers")
            self._seen[name] = Seen(runs[0][name].dtype, [run[name].shape for run in runs])

    def seen(self, value: ir.Value) -> Seen:
        """Return the dtype and shapes of a value that :meth:`look_at` has found."""
        return self._seen[str(value.name)]


def operands(node: ir.Node) -> list[ir.Value]:
    """Return all values that a node reads, including those that its subgraphs read from the graph around them."""
    read: dict[ir.Value, None] = {value: None for value in node.inputs if value is not None}
    for body in _bodies(node):
        inside = {*body.inputs, *body.initializers.values(), *(out for inner in body for out in inner.outputs)}
        used = [*body.outputs, *(value for inner in body for value in operands(inner))]
        read |= {value: None for value in used if value not in inside}
    return list(read)


def _bodies(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def made_by(node: ir.Node) -> list[ir.Value]:
    """Return the outputs that a node computes. Optional outputs that it does not compute have no name."""
    return [value for value in node.outputs if value.name]


def _is_stored(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def unknown(b: Builder, probe: Probe, why: str = "") -> tuple[Value, ...]:
    """Add a call of ONNX Runtime for the current node, which has no torch function, and return its outputs.

    Args:
        why: if the operator is in a table, the reason why its row does not support this use of it.

    Raises:
        CaptureError: ONNX Runtime cannot run the file, or an input or output of the node is not a tensor.
    """
    node = b.node
    probe.look_at([node])
    constants = {v: c for v in operands(node) if isinstance(c := b.values[v], Constant)}
    settings = {str(value.name): constant.array for value, constant in constants.items() if is_setting(constant)}
    read = [value for value in operands(node) if str(value.name) not in settings]
    dtypes = {
        str(value.name): constants[value].array.dtype if value in constants else probe.seen(value).dtype
        for value in read
    }
    cases = [
        Case(
            *(
                [tuple(probe.seen(v).shapes[i]) for v in values if v not in constants]
                for values in (read, made_by(node))
            )
        )
        for i in range(len(probe.seen(made_by(node)[0]).shapes))
    ]
    computed = [value not in constants for value in read]
    run = _SingleNode(node, b.imports, dtypes, settings)
    kinds = [torch.from_numpy(widened(np.empty(0, probe.seen(value).dtype))).dtype for value in made_by(node)]
    call = OnnxCall(node, run, computed, cases, kinds, why)
    result = b.emit(call, *(b.anything_read(value) for value in read), *_subgraph_weights(b))
    if len(kinds) == 1:
        return tuple(result for _ in node.outputs)
    numbers = {value: number for number, value in enumerate(made_by(node))}
    return tuple(b.emit(operator.getitem, result, numbers.get(value, 0)) for value in node.outputs)


def _subgraph_weights(b: Builder) -> list[fx.Node]:
    """Return nodes for the weights inside the node's subgraphs, which are never narrowed but can be found by name."""
    found = []
    for body in _bodies_within(b.node):
        for value in body.initializers.values():
            array = None if value.const_value is None else value.const_value.numpy()
            if array is not None and array.ndim > 1 and array.dtype.kind == "f":
                b.values[value] = Constant(array, value)
                found.append(b.anything_read(value))
    return found


def _bodies_within(node: ir.Node) -> list[ir.Graph]:
    """Return the node's subgraphs and, recursively, the subgraphs of the nodes in them."""
    return [graph for body in _bodies(node) for graph in (body, *(g for n in body for g in _bodies_within(n)))]


@dataclass(frozen=True)
class Case:
    """The shapes of a node's inputs and outputs at one batch size."""

    read: list[Shape]
    made: list[Shape]


class OnnxCall:
    """One node of the file as a function of tensors, named after its operator, which the analysis does not know.

    ONNX Runtime computes no derivatives, so a backward pass through the call raises RuntimeError.
    """

    __module__ = "onnx"

    def __init__(
        self,
        node: ir.Node,
        run: Callable[[Sequence[Tensor]], list[Tensor]],
        computed: Sequence[bool],
        cases: Sequence[Case],
        kinds: Sequence[torch.dtype],
        why: str,
    ) -> None:
        name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        self.__name__ = f"{name} ({why})" if why else name
        self.refusal = _refusal(node)
        self.run, self.computed, self.cases, self.kinds = run, computed, cases, kinds

    def __deepcopy__(self, memo: Any) -> OnnxCall:
        return self  # copies of a graph share it, as they share any function

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the node's output, or a tuple of several.

        The last arguments are the weights inside its subgraphs, and are ignored.
        """
        tensors = tensors[: len(self.computed)]
        if detect_fake_mode(tensors) is not None:
            read = [tuple(t.shape) for t, computed in zip(tensors, self.computed, strict=True) if computed]
            found = tuple(torch.empty(s, dtype=k) for s, k in zip(self._shapes(read), self.kinds, strict=True))
        else:
            found = _Underivable.apply(self._values, *tensors)
        return found if len(self.kinds) > 1 else found[0]

    def _values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(value.to(kind) for value, kind in zip(self.run(tensors), self.kinds, strict=True))

    def _shapes(self, read: list[Shape]) -> list[Shape]:
        for case in self.cases:
            if case.read == read:
                return case.made
        first, *others = self.cases
        made = [_on_the_line(first, others[0], case.read) for case in others] if len(others) > 1 else []
        found = _on_the_line(first, others[0], read) if made == [case.made for case in others] and made else None
        if found is None:
            raise CaptureError(
                f"the shapes of its outputs for inputs of shapes {read} are not known: they depend on more than the batch size"
            )
        return found


def _refusal(node: ir.Node) -> str:
    """Return why nothing that the node reads, computes or holds is narrowed.

    The reason is "" if there is nothing more to say than that the operator is in no table.
    """
    if node.op_type in _RECURRENT:
        return f"the recurrent layer {node.op_type} reads or makes it, and keeps its widths"
    if _bodies(node):
        return (
            f"operator {node.op_type} is not in the operator table, so nothing that its subgraphs read, compute or hold is "
            f"narrowed"
        )
    return ""


def _on_the_line(first: Case, second: Case, read: list[Shape]) -> list[Shape] | None:
    """Return a node's output shapes, by linear interpolation or extrapolation from two cases.

    Return None if the input sizes do not lie on the line through the two cases.
    """
    sizes, others, wanted = (sum(shapes, ()) for shapes in (first.read, second.read, read))
    if not len(sizes) == len(others) == len(wanted):
        return None
    shares = {Fraction(c - a, b - a) for a, b, c in zip(sizes, others, wanted, strict=True) if a != b}
    same = all(a == c for a, b, c in zip(sizes, others, wanted, strict=True) if a == b)
    if len(shares) != 1 or not same:
        return None
    (share,) = shares
    found = [
        tuple(a + share * (b - a) for a, b in zip(*pair, strict=True))
        for pair in zip(first.made, second.made, strict=True)
    ]
    if any(size.denominator != 1 or size < 0 for shape in found for size in shape):
        return None
    return [tuple(int(size) for size in shape) for shape in found]


class _SingleNode:
    """A callable that runs one node as a model of its own in ONNX Runtime."""

    def __init__(
        self,
        node: ir.Node,
        imports: Mapping[str, int],
        dtypes: Mapping[str, np.dtype[Any]],
        settings: Mapping[str, Array],
    ) -> None:
        self.node, self.imports, self.dtypes, self.settings = node, dict(imports), dtypes, settings
        self.made = [str(value.name) for value in made_by(node)]

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None)
            for name, dtype in self.dtypes.items()
        ]
        graph = helper.make_graph(
            [ir.serde.serialize_node(self.node)],
            "node",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in self.made],
            [numpy_helper.from_array(array, name) for name, array in self.settings.items()],
        )
        imports = [helper.make_opsetid(domain, version) for domain, version in self.imports.items()]
        return open_session(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = zip(tensors, self.dtypes.items(), strict=True)
        feeds = {name: t.detach().cpu().numpy().astype(dtype, copy=False) for t, (name, dtype) in given}
        return [torch.from_numpy(widened(np.asarray(array))) for array in self.session.run(self.made, feeds)]


class _Underivable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return run(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("an operator of ONNX Runtime has no derivative")
