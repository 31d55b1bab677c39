"""Make numbers that a model's code reads from its own parameters and buffers constants of the graph.

While torch.export traces, it knows only the shapes of tensors, and stops where the code makes a decision by a number
from a tensor. So such numbers are read from the model's real tensors (:class:`KnownNumbers`). Some torch operators turn
a tensor into a number themselves. The graph then has a node for it, which is replaced by the number
(:func:`fold_numbers`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from vbpfx.errors import CaptureError
from vbpfx.graph.source import line_of_call, line_of_node
from vbpfx.graph.tidy import replace_by

_READS = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "is_nonzero",
                    "equal", "allclose"})  # fmt: skip
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson", "dropout", "exponential", "uniform")
_IN_PLACE = frozenset(
    f"__{name}__" for name in operator.__all__ if name.startswith("i") and hasattr(Tensor, f"__{name}__")
)


class KnownNumbers(TorchFunctionMode):
    """A context in which code can read numbers from the model's tensors, and from tensors computed from these alone.

    After the first write to such a tensor, no number is known any more, because the value would depend on the time of
    reading.

    Args:
        model: the model. Its tensors may be replaced by fake ones later; their values at this moment are used.

    Attributes:
        unknown: the first line of code that read a number from any other tensor, or "" if there was none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._written, self.unknown = model, False, ""
        self._values = {name: tensor.detach() for name, tensor in _tensors(model).items()}
        self._known_tensors: dict[int, tuple[Tensor, str]] = {}
        self._made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call of the model's code, or read a number. Record how results are computed from known tensors."""
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors:
            return func(*args, **kwargs)
        makers = {id(tensor): None if self._written else self._maker(tensor) for tensor in tensors}
        if name in _READS and None in makers.values():
            self.unknown = self.unknown or line_of_call()
        if makers[id(tensors[0])] is not None and _writes(name, kwargs):
            self._written = True
        if self._written or None in makers.values() or any(part in name for part in _RANDOM):
            return func(*args, **kwargs)

        def compute() -> Any:
            real = pytree.tree_map_only(Tensor, lambda tensor: makers[id(tensor)](), (args, kwargs))  # type: ignore[misc]
            return func(*real[0], **real[1])

        if name in _READS:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return compute()
        made = func(*args, **kwargs)
        for place, leaf in enumerate(pytree.tree_leaves(made)):
            if isinstance(leaf, Tensor):
                self._made[id(leaf)] = leaf, functools.partial(_leaf, compute, place)
        return made

    def _maker(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """Return a function that computes a tensor's values, or None if they are not known."""
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        if next((tensor is not _at(self._model, name) for tensor, name in self._known_tensors.values()), True):
            # torch.export has replaced the model's tensors
            self._known_tensors = {id(tensor): (tensor, name) for name, tensor in _tensors(self._model).items()}
        found = self._known_tensors.get(id(tensor))
        return None if found is None else functools.partial(self._values.__getitem__, found[1])


def _leaf(compute: Callable[[], Any], place: int) -> Tensor:
    leaf: Tensor = pytree.tree_leaves(compute())[place]
    return leaf


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor for a model's parameters, buffers, and attributes that are tensors."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            found |= {f"{path}.{name}": value for name, value in tensors.items() if isinstance(value, Tensor)}
    return found


def _at(model: nn.Module, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute, None)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call changes its first tensor in place."""
    changes = name.endswith("_") and not name.startswith("__")
    return changes or name == "__setitem__" or name in _IN_PLACE or kwargs.get("out") is not None


_NUMBER_OF = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
_CHECKS = (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range.default,
           torch.ops.aten.sym_constrain_range_for_size.default)  # fmt: skip


def fold_numbers(graph_module: fx.GraphModule, line: str) -> None:
    """Replace nodes that read a number from the graph's own parameters and buffers by that number.

    Args:
        graph_module: the graph, which is changed in place.
        line: the line of the model's code that reads a number from any other tensor, for the error message; may be "".

    Raises:
        CaptureError: a number comes from a value that depends on the inputs, or from a tensor that the graph writes to.
    """
    graph = graph_module.graph
    reading = [node for node in graph.nodes if node.target in _NUMBER_OF]
    if not reading:
        return
    written = {root for node in graph.nodes if _is_mutable(node) for root in _behind(node.args[0])}
    for node in reading:
        behind = _behind(node)
        if not all(map(_is_constant, behind)) or not written.isdisjoint(behind):
            place = line or line_of_node(node)
            raise CaptureError(
                "the model's code reads a number from a tensor whose values are not known before it runs (.item(), int(), float(), "
                "or an operator that takes numbers)" + (f"\n    at {place}" if place else "")
            )
        with torch.no_grad():
            replace_by(node, _value(node, graph_module))
    for node in list(graph.nodes):
        if node.op != "call_function" or node.all_input_nodes:
            continue
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif getattr(node.target, "__module__", "") in ("_operator", "math"):  # arithmetic on the new numbers
            replace_by(node, node.target(*node.args, **node.kwargs))


def _behind(node: Any) -> set[fx.Node]:
    """Return a node and all nodes that its value is computed from."""
    found: set[fx.Node] = set()
    waiting = [node] if isinstance(node, fx.Node) else []
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return found


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and bool(node.args)


def _is_constant(node: fx.Node) -> bool:
    """Return whether a node's value is the same in every run, provided that its inputs are."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return known and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


def _value(node: Any, graph_module: fx.GraphModule) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph_module)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _value(n, graph_module))
    return node.target(*args, **kwargs)
