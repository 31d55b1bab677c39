"""The symbolic front end: trace the model's own code with :class:`torch.fx.Tracer`, module by module."""

from __future__ import annotations

import builtins
import copy
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.data.inputs import Inputs, holds_tensor, model_device
from vbpfx.errors import CaptureError
from vbpfx.graph.fake import run_fake
from vbpfx.graph.regions import autocast_devices, autocast_state, inline_regions, refuse_autocast
from vbpfx.graph.repeated import Repeated
from vbpfx.graph.tidy import (
    INPUT_GUARDS,
    drop_input_checks,
    follow_inputs,
    is_plain,
    order_arguments,
    replace_by,
    require_constants,
)
from vbpfx.rules.table import entered

# Modules of torch.nn whose own code calls other modules.
_COMPOSITE = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer,
    nn.DataParallel, nn.parallel.DistributedDataParallel,
)  # fmt: skip


class _Tracer(fx.Tracer):
    """fx's tracer for a model and one batch.

    It traces into composite modules of ``torch.nn``, so that blocks inside them are found. Every argument of the batch
    gets a placeholder, including each entry that the batch passes to ``*args`` and ``**kwargs``.

    Attributes:
        tensors: the names of the placeholders that are tensors.
        constants: placeholder -> its value, for arguments that hold no tensor.
    """

    def __init__(self, inputs: Inputs, devices: Collection[str]) -> None:
        super().__init__()
        self._inputs, self._devices = inputs, devices
        self._outside = autocast_state(devices)
        self.tensors: set[str] = set()
        self.constants: dict[fx.Node, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule):  # it has no Python code that could be traced
            return True
        return entered(type(m)) is not None or (
            not isinstance(m, _COMPOSITE) and super().is_leaf_module(m, module_qualified_name)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Do the same as fx, but look parameters up by id, where fx searches all modules on every read."""
        if not isinstance(attr_val, nn.Parameter):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.root.named_parameters()}

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node as fx does, but refuse a call that autocast changes, since the graph would not record that."""
        if kind.startswith("call") and (inside := autocast_state(self._devices)) != self._outside:
            refuse_autocast(inside)
        return super().create_node(kind, *args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Create a placeholder for every argument of the batch, and for every argument that keeps its default."""
        model: Any = self.root
        signature = inspect.signature(model.forward)
        bound = signature.bind(*self._inputs.args, **self._inputs.kwargs)
        given, taken = bound.arguments, {*signature.parameters, *self._inputs.kwargs}
        kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
        # arguments in front of *args get no default, since the placeholders of *args have none
        further = bool(given.get(kinds.get(inspect.Parameter.VAR_POSITIONAL, ""), ()))
        optional = False
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                names = [_free(f"{name}_{i}", taken) for i in range(len(given.get(name, ())))]
                given[name] = tuple(map(self._argument, names, given.get(name, ())))
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                default = (None,) if optional else ()
                given[name] = {key: self._argument(key, value, default) for key, value in given.get(name, {}).items()}
            else:
                in_front = further and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
                has_default = parameter.default is not inspect.Parameter.empty and not in_front
                stated = parameter.default if has_default and is_plain(parameter.default) else None
                default = (stated,) if has_default or optional else ()
                optional |= has_default
                if name in given:
                    given[name] = self._argument(name, given[name], default)
                else:
                    self._argument(name, parameter.default, default)
        args, kwargs = bound.args, bound.kwargs
        return lambda: root_fn(model, *args, **kwargs), []

    def _argument(self, name: str, value: Any, default: tuple[Any, ...] = ()) -> Any:
        proxy = self.create_proxy("placeholder", name, default, {})
        if holds_tensor(value):
            self.tensors |= {name} if isinstance(value, Tensor) else set()
            return proxy
        self.constants[proxy.node] = value
        return value


def _free(name: str, taken: set[str]) -> str:
    """Return a name that is not taken, and add it to ``taken``."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def trace_symbolic(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Trace a model into a graph of its leaf modules and of the functions that its code calls.

    A model that is already a graph of known layers and operators is not traced again. Its own graph is used, and its
    nodes keep their names.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError(
            "the model itself has forward hooks, and symbolic tracing would drop them. Remove these hooks first"
        )
    device = model_device(model)
    tracer = _Tracer(inputs, autocast_devices(device))
    if isinstance(model, fx.GraphModule) and _is_flat(model, tracer):
        return _own_graph(model, autocast_devices(device))
    with _recorded_lengths(model):
        graph = tracer.trace(model)
    if not graph.output_node().all_input_nodes:
        raise CaptureError("symbolic tracing loses the output on the way")
    order_arguments(graph)
    follow_inputs(graph, device, tracer.tensors)
    require_constants(graph, tracer.constants)
    graph._tracer_cls = fx.Tracer  # unpickling the graph traces its code again, with fx's own tracer
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    return _with_lengths(traced, inputs)


def _is_flat(model: fx.GraphModule, tracer: _Tracer) -> bool:
    """Return whether the graph calls only leaf modules, so that nothing is left to trace."""
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"} - {INPUT_GUARDS}
    return all(tracer.is_leaf_module(model.get_submodule(name), name) for name in called)


def _own_graph(model: fx.GraphModule, devices: Collection[str]) -> fx.GraphModule:
    """Return a copy of a graph to which shapes can be written, without input checks and with its regions inlined."""
    graph = copy.deepcopy(model.graph)
    drop_input_checks(graph)
    order_arguments(graph)
    own = fx.GraphModule(model, graph, type(model).__name__)
    inline_regions(own, devices)
    own.meta.update(model.meta)
    return own


def _length(value: Any) -> Any:
    """Behave like ``len``; for a value that is being traced, add a call to the graph."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return builtins.len(value)


@contextmanager
def _recorded_lengths(model: nn.Module) -> Iterator[None]:
    """Replace ``len`` by :func:`_length` in the modules of the model's classes, as fx does for wrapped functions."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    files = {kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    names = [vars(sys.modules[file]) for file in sorted(files) if file in sys.modules]
    patched = [found for found in names if "len" not in found]
    for found in patched:
        found["len"] = _length
    try:
        yield
    finally:
        for found in patched:
            del found["len"]


def _with_lengths(traced: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Replace ``len`` in the graph: by ``x.size(0)`` for tensors, and by a number for tuples, lists and shapes."""
    lengths = traced.graph.find_nodes(op="call_function", target=len)
    if not lengths:
        return traced
    values: dict[fx.Node, Any] = {}

    def note(node: fx.Node, run: Callable[[], Any]) -> Any:
        values[node] = value = run()
        return value

    run_fake(traced, inputs, inputs.batch_size, note, Repeated(traced))
    for node in lengths:
        source: Any = node.args[0]
        if isinstance(values[source], Tensor):
            with traced.graph.inserting_before(node):
                replace_by(node, traced.graph.call_method("size", (source, 0)))
        else:
            replace_by(node, values[node])
    traced.recompile()
    return traced
