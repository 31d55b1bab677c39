"""Build a torch.fx graph from ONNX nodes, one after another.

Every value of the ONNX graph becomes one of three things: a node of the fx graph, a constant, or numbers computed from
sizes. The third kind comes from ``Shape`` and the arithmetic behind it. Such numbers become integers among a call's
arguments, as in a torch trace (``x.size(0)``), so that the analysis knows from which axis they were read.

Where the file computes in float16, the graph computes in float32. This avoids a rounding at every node, and sums that
overflow.

Initializers become parameters that share the file's memory, except for those in float16. A matrix is one parameter,
however often it is used. A vector (a bias, a scale) is a separate parameter for each use: exporters store equal vectors
once, but layers that are narrowed independently must not share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vbpfx.display.quiet import quiet_warnings
from vbpfx.errors import CaptureError
from vbpfx.onnx_graph.names import free_name, register, suggested

Array = npt.NDArray[Any]
ArgumentPath = tuple[str | int, ...]
# How a parameter relates to the tensor in the file: the same, its transpose, or flattened to a vector.
Layout = Literal["same", "transposed", "flat"]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the inputs.

    Attributes:
        value: the initializer or Constant that holds the tensor; None if the tensor was computed from constants.
        cast: the Cast node behind ``value``, if the file stores the tensor in another precision.
    """

    array: Array
    value: ir.Value | None = None
    cast: ir.Node | None = None


@dataclass(frozen=True, eq=False)
class Sizes:
    """Numbers of which some are computed from sizes: an array whose entries are numbers or nodes."""

    entries: Array


Value = fx.Node | Constant | Sizes


@dataclass(frozen=True)
class StatedNumber:
    """Where the file states a number.

    Attributes:
        node: the ONNX node that states it.
        where: the index of an input, or the name of an attribute.
        index: which entry of the input it is, of ``length`` entries.
    """

    node: ir.Node
    where: int | str
    index: int = 0
    length: int = 1


@dataclass
class FileTensor:
    """The tensor in the file that a parameter was made from.

    Attributes:
        value: the ONNX value of the tensor.
        shape, dtype: shape and dtype of the tensor in the file.
        layout: how the parameter relates to the tensor.
        computed: the precision in which the file computes with it. It differs from ``dtype`` if a Cast follows the
            tensor.
        cast: that Cast, if there is one.
        uses: the node inputs that the parameter stands for, as (node, index).
    """

    value: ir.Value
    shape: tuple[int, ...]
    layout: Layout
    dtype: np.dtype[Any]
    computed: np.dtype[Any]
    cast: ir.Node | None
    uses: list[tuple[ir.Node, int]] = field(default_factory=list)


class Builder:
    """Builds the fx graph. The operators of :mod:`vbpfx.onnx_graph` ask it for the inputs of the current node.

    Attributes:
        root, graph: the module with the parameters, and the fx graph, as built so far.
        opset, imports: the version of ONNX's own operators, and the versions of all domains.
        node, hint: the current ONNX node, and the name for the fx nodes that are made for it.
        values: ONNX value -> what it became.
        stored: parameter -> the tensor in the file.
        places: (fx node, path of an integer among its arguments) -> where the file states it, or None if it does not
            state it.
        made_by: fx node -> the ONNX nodes that it computes.
    """

    def __init__(self, opset: int, imports: Mapping[str, int]) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.opset, self.imports = opset, imports
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.node: ir.Node
        self.hint = "value"
        self.values: dict[ir.Value, Value] = {}
        self.stored: dict[str, FileTensor] = {}
        self.places: dict[tuple[str, ArgumentPath], StatedNumber | None] = {}
        self.made_by: dict[str, tuple[ir.Node, ...]] = {}
        self._parameters: dict[Any, fx.Node] = {}

    # ------------------------------------------------------------------ adding nodes

    def placeholder(self, value: ir.Value, example: Tensor) -> fx.Node:
        """Add an input of the model. A float16 input is converted to float32 before anything reads it."""
        node = self.graph.create_node("placeholder", str(value.name), name=str(value.name))
        node.target = node.name
        with self.mode:
            node.meta["val"] = torch.empty_like(example, device="cpu")
        self.values[value] = node
        if example.dtype == torch.float16:
            wide = self.graph.create_node("call_method", "to", (node, torch.float32), name=f"{node.name}_wide")
            with self.mode:
                wide.meta["val"] = node.meta["val"].to(torch.float32)
            self.values[value] = wide
        return node

    def emit(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a function, or of a method given by name. Its result is computed at once, on fake tensors."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs, name=self.hint)
        given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = getattr(given[0], target)(*given[1:], **named) if isinstance(target, str) else target(*given, **named)  # fmt: skip
        self.made_by[node.name] = (self.node,)
        return node

    def states(self, node: fx.Node, path: ArgumentPath, place: StatedNumber | None) -> None:
        """Record where the file states a number among a call's arguments."""
        if place is not None and isinstance(place.where, int) and self.has(place.where):
            place = replace(place, length=len(self.numbers(place.where)))
        self.places[node.name, path] = place

    # ------------------------------------------------------------------ the inputs of the current node

    def has(self, index: int) -> bool:
        """Return whether the node has the input."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Return the input as it is: a node, a constant or sizes."""
        value = self.node.inputs[index]
        assert value is not None
        return self.values[value]

    def tensor(self, index: int) -> fx.Node:
        """Return the input as a tensor node."""
        found = self.value(index)
        if isinstance(found, fx.Node):
            return found
        return self.sizes_tensor(found) if isinstance(found, Sizes) else self.parameter(index)

    def sizes_tensor(self, sizes: Sizes) -> fx.Node:
        """Return a node that makes a tensor of sizes."""
        dtype = torch.float32 if any(isinstance(number(e), float) for e in sizes.entries.flat) else torch.int64
        return self.emit(torch.tensor, sizes.entries.tolist(), dtype=dtype)

    def constant(self, index: int) -> Array | None:
        """Return the input's array if it is a constant, otherwise None."""
        found = self.value(index) if self.has(index) else None
        return found.array if isinstance(found, Constant) else None

    def numbers(self, index: int) -> list[Any]:
        """Return the input as a list of numbers and of nodes that compute numbers."""
        match self.value(index):
            case Constant(array=array):
                return list(array.reshape(-1).tolist())
            case Sizes(entries=entries):
                return list(entries.reshape(-1).tolist())
            case _:
                raise CaptureError(f"its input {index} is computed from values, where sizes or constants are expected")

    def integers(self, index: int, name: str) -> list[int] | None:
        """Return constant integers from an input or, in earlier opsets, an attribute. None if the node has neither."""
        if self.has(index):
            found = self.constant(index)
            if found is None:
                raise CaptureError(f"its {name} are computed; only constant ones are supported")
            return [int(entry) for entry in found.reshape(-1)]
        given = self.attribute(name)
        return None if given is None else [int(entry) for entry in given]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node, or ``default`` if the node does not have it."""
        found = self.node.attributes.get(name)
        if found is None or found.value is None:
            return default
        return found.as_string() if found.type == ir.AttributeType.STRING else found.value

    # ------------------------------------------------------------------ parameters

    def parameter(self, index: int, layout: Layout = "same", *, of: ir.Node | None = None) -> fx.Node:
        """Return a constant input as a parameter (floating-point numbers) or a buffer."""
        user = of or self.node
        value = user.inputs[index]
        assert value is not None
        return self._parameter(value, user, index, layout)

    def anything_read(self, value: ir.Value) -> fx.Node:
        """Return a value as a tensor node, whether the current node reads it itself or in one of its subgraphs."""
        found = self.values[value]
        if isinstance(found, fx.Node):
            return found
        return self.sizes_tensor(found) if isinstance(found, Sizes) else self._parameter(value, self.node, -1, "same")

    def _parameter(self, value: ir.Value, user: ir.Node, index: int, layout: Layout) -> fx.Node:
        constant = self.values[value]
        assert isinstance(constant, Constant)
        use = (user, index)
        layout = "same" if constant.array.ndim == 1 else layout
        matrix = is_matrix(constant.array) or constant.value is None
        key = (constant.value or constant, layout, constant.cast if matrix else (*use, value if index < 0 else None))
        if key not in self._parameters:
            alone = constant.value is not None and (matrix or len(constant.value.uses()) == 1)
            name = suggested(str((constant.value or value).name), user, index, alone=alone)
            learned = user.op_type != "BatchNormalization" or index < 3
            self._parameters[key] = self._register(free_name(name, self.root), constant, layout, learned)
        node = self._parameters[key]
        if str(node.target) in self.stored:
            self.stored[str(node.target)].uses.append(use)
        return node

    def _register(self, name: str, constant: Constant, layout: Layout, learned: bool) -> fx.Node:
        with quiet_warnings():  # torch warns that the file's memory is read-only; nothing writes to it
            tensor = torch.from_numpy(np.asarray(widened(constant.array)))
        tensor = tensor.T if layout == "transposed" else tensor.reshape(-1) if layout == "flat" else tensor
        register(self.root, name, nn.Parameter(tensor) if learned and tensor.is_floating_point() else tensor)
        if constant.value is not None:
            original = constant_of(constant.value)
            assert original is not None
            self.stored[name] = FileTensor(
                constant.value, constant.array.shape, layout, original.dtype, constant.array.dtype, constant.cast
            )
        node = self.graph.create_node("get_attr", name, name=name)
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        return node


def constant_of(value: ir.Value) -> Array | None:
    """Return the tensor of an initializer or a Constant, or None if the value is computed."""
    producer = value.producer()
    if producer is None:
        return None if value.const_value is None else value.const_value.numpy()
    if producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx"):
        return None
    attribute = next(iter(producer.attributes.values()))
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().numpy()
    if attribute.name.startswith("value_string") or attribute.name == "sparse_value":
        raise CaptureError(
            f"the constant {producer.name!r} stores its value in the attribute {attribute.name}, and this attribute is not supported"
        )
    return np.array(attribute.value, np.int64 if "int" in attribute.name else np.float32)


def widened(array: Array) -> Array:
    """Return the array in the precision in which the graph computes: float16 becomes float32."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def is_matrix(array: Array) -> bool:
    """Return whether the array has more than one axis longer than 1."""
    return sum(1 for size in array.shape if size > 1) > 1


def is_setting(constant: Constant) -> bool:
    """Return whether a constant is not a weight: a single number, integers, or computed from other constants."""
    return constant.value is None or constant.array.size == 1 or constant.array.dtype.kind not in "fV"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value."""
    return tuple(node.meta["val"].shape)


def number(entry: Any) -> Any:
    """Return the number that an entry is, or that it computes if it is a node."""
    return entry.meta["val"] if isinstance(entry, fx.Node) else entry


def one_entry(value: Value) -> Any | None:
    """Return the only entry of a constant or of sizes, or None if there is not exactly one."""
    if isinstance(value, Constant) and value.array.size == 1:
        return value.array.reshape(-1)[0].item()
    if isinstance(value, Sizes) and value.entries.size == 1:
        return value.entries.reshape(-1)[0]
    return None


def pairs(values: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split ONNX's pads, which list all begins and then all ends, into two lists."""
    half = len(values) // 2
    return list(values[:half]), list(values[half:])
