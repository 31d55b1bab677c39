"""Reuse the results of equal calls on fake tensors.

On fake tensors, equal arguments give equal results, and most calls of a network repeat. A call's key holds all that
determines its result's shapes, strides and dtypes: the operator, or the layer with its attributes, the shapes of the
arguments, and autocast. If anything else might matter (the user's own code, values of real tensors, hooks), the call
has no key and is always run. If such a call reshapes an argument in place, which may also be the result of other calls,
the whole graph must be run again with every call by itself. The cost of a call by a meter (its flops) is stored with
its result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from vbpfx.rules.calls import is_in_place
from vbpfx.rules.table import operator_of

_SIMPLE = (int, float, bool, str, complex, type(None), type(...), torch.dtype, torch.device, torch.layout,
           torch.memory_format)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _NoKeyError(Exception):
    """A call has no key, because something that the key cannot hold may determine its result."""


class ReshapedError(Exception):
    """A call has reshaped a tensor in place that may be the shared result of several calls."""


class Repeated:
    """The results of a graph's calls by their keys. Equal calls share one result, which nothing may reshape in place.

    Args:
        graph_module: the graph.
        meter: returns the cost of all calls that were actually run so far.

    Attributes:
        spent: the cost of all calls so far, as if each had been run.
    """

    def __init__(self, graph_module: fx.GraphModule, meter: Callable[[], int] = lambda: 0) -> None:
        self._results: dict[Hashable, tuple[Any, int]] = {}
        self._meter, self.spent = meter, 0
        self._usable = not any(
            operator_of(node).reshapes and is_in_place(node, None) for node in graph_module.graph.nodes
        )

    def run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Return the result of an earlier equal call, or run ``call`` and return its result.

        Args:
            operator: a function, the name of a method, or a layer.
            args, kwargs: its arguments. The object of a method comes first.
            call: runs the call on fake tensors.

        Raises:
            ReshapedError: the call was run, and reshaped an argument in place.
        """
        if not self._usable:
            return self._run(call)[0]
        try:
            if "out" in kwargs:
                raise _NoKeyError
            key = _operator(operator), _key(args), _key(kwargs), *map(_autocast, ("cpu", "cuda"))
        except _NoKeyError:
            return self._run(lambda: _watched(args, kwargs, call))[0]
        if key in self._results:
            value, spent = self._results[key]
            self.spent += spent
            return value
        value, spent = self._run(call)
        parts = value if type(value) in (tuple, list) else (value,)
        if all(type(part) is FakeTensor for part in parts):
            self._results[key] = value, spent
        return value

    def forget(self) -> None:
        """Drop all results, and run every call by itself from now on."""
        self._usable, self._results = False, {}

    def _run(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """Run a call; return its result and its cost."""
        before = self._meter()
        value = call()
        spent = self._meter() - before
        self.spent += spent
        return value, spent


def _watched(args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
    """Run a call and return its result; raise ReshapedError if it reshapes an argument in place."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    before = [_known(tensor) for tensor in tensors]
    value = call()
    if before != [_known(tensor) for tensor in tensors]:
        raise ReshapedError
    return value


def _known(tensor: Tensor) -> tuple[Any, ...]:
    strided = tensor.layout is torch.strided
    return tuple(tensor.shape), tensor.stride() if strided else None, tensor.layout, tensor.dtype, tensor.device


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _operator(operator: Any) -> Hashable:
    if isinstance(operator, str):
        return operator
    if isinstance(operator, nn.Module):
        return _layer(operator)
    package = str(getattr(operator, "__module__", "")).partition(".")[0]
    of_a_library = isinstance(operator, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    foreign = of_a_library and not str(operator).startswith("aten.")
    if foreign or package not in ("torch", "_operator", "None"):  # the __module__ of torch's builtins is None
        raise _NoKeyError
    return operator  # type: ignore[no-any-return]


def _layer(module: nn.Module) -> Hashable:
    """Return the key of a torch.nn layer: its class, its attributes, and the shapes of its tensors."""
    known = dict(vars(module))
    hooked = any(known.pop(hooks) for hooks in _HOOKS)
    if hooked or known.pop("_modules") or not type(module).__module__.startswith("torch.nn.modules."):
        raise _NoKeyError
    tensors = {**known.pop("_parameters"), **known.pop("_buffers")}
    described = tuple((name, None if t is None else _tensor(t)) for name, t in tensors.items())
    return type(module), described, _key({k: v for k, v in known.items() if not k.startswith("_")})


def _key(value: Any) -> Hashable:
    """Return the key of an argument. Equal numbers of different types have different keys."""
    kind = type(value)
    if kind in _SIMPLE:
        return kind, value
    if kind is FakeTensor and value.constant is None:
        return _tensor(value)
    if isinstance(value, (tuple, list)):
        return kind, *map(_key, value)
    if kind is slice:
        return kind, _key(value.start), _key(value.stop), _key(value.step)
    if isinstance(value, dict):
        return kind, *((name, _key(entry)) for name, entry in value.items())
    raise _NoKeyError


def _tensor(value: Tensor) -> Hashable:
    if value.layout is not torch.strided:
        raise _NoKeyError
    return tuple(value.shape), value.stride(), value.dtype, value.device
