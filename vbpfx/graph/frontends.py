"""Front ends: the only file that traces.

Both make the same kind of object, a ``torch.fx.GraphModule``:

- ``"symbolic"``, :class:`torch.fx.Tracer`: keeps the module structure, ``train()`` / ``eval()`` and the
  parameter names.
- ``"export"``, :func:`torch.export.export`: an ATen graph, for models whose Python control flow stops
  symbolic tracing.

What is a graph of known layers and operators already is not traced again: its own graph is taken, with its nodes' names.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vbpfx.data.inputs import Inputs, argument_names, holds_tensor, model_device
from vbpfx.errors import CaptureError
from vbpfx.graph.fields import without_classes
from vbpfx.rules.ops import is_registered

# Modules of torch.nn that run others in their own code.
_COMPOSITE = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer,
    nn.DataParallel, nn.parallel.DistributedDataParallel,
)  # fmt: skip


class _Tracer(fx.Tracer):
    """fx's tracer, but composite modules of ``torch.nn`` are traced through, so that a block inside is seen."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule):  # no Python code, so nothing to trace
            return True
        return is_registered(m) or (not isinstance(m, _COMPOSITE) and super().is_leaf_module(m, module_qualified_name))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """As fx's own, which goes through all modules whenever a parameter is read."""
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


def _trace_symbolic(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError("the model itself has forward hooks, which symbolic tracing would drop")
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    parameters = inspect.signature(model.forward).parameters
    absent = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in bound and parameter.default is not inspect.Parameter.empty
    }
    constants = {name: value for name, value in bound.items() if not holds_tensor(value)}
    tracer = _Tracer()
    if isinstance(model, fx.GraphModule) and _is_flat(model, tracer):
        return _own_graph(model)
    graph = tracer.trace(model, concrete_args=absent | constants)
    _order_arguments(graph)
    for node in graph.nodes:
        # fx renames an argument that it specialises (mask -> mask_1); callers keep the model's own name.
        if node.op == "placeholder":
            node.target = next((n for n in absent | constants if node.target in (n, f"{n}_1")), node.target)
    _follow_inputs(graph, model_device(model), {name for name, value in bound.items() if isinstance(value, Tensor)})
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _is_flat(model: fx.GraphModule, tracer: fx.Tracer) -> bool:
    """Whether the graph calls leaves alone, so that nothing in it is left to trace."""
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"} - {INPUT_GUARDS}
    return all(tracer.is_leaf_module(model.get_submodule(name), name) for name in called)


def _own_graph(model: fx.GraphModule) -> fx.GraphModule:
    """A graph as it is, for shapes to be written on; without what only checks the inputs."""
    graph = copy.deepcopy(model.graph)
    _drop_input_checks(graph)
    _order_arguments(graph)
    own = fx.GraphModule(model, graph, type(model).__name__)
    own.meta.update(model.meta)
    return own


# What torch.export calls the module that holds the guards on inputs.
INPUT_GUARDS = "_guards_fn"


def _drop_input_checks(graph: fx.Graph) -> None:
    """Erase what torch.export inserts to check inputs: it has no effect on the result and binds the graph to a precision."""
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten._assert_tensor_metadata.default, INPUT_GUARDS) and not node.users:
            graph.erase_node(node)


def _follow_inputs(graph: fx.Graph, device: torch.device, names: Collection[Any]) -> None:
    """Make tensors on the inputs' device, wherever that is, where tracing wrote down the one that the model was on.

    Args:
        device: of the model.
        names: the arguments that are tensors.
    """
    same = {device, torch.device(device.type)}
    nodes = [node for node in graph.nodes if same & set(filter(_is_device, (*node.args, *node.kwargs.values())))]
    inputs = graph.find_nodes(op="placeholder")
    given = next((node for node in inputs if node.target in names), None)
    if not nodes or given is None:
        return
    with graph.inserting_after(inputs[-1]):
        asked = graph.call_function(getattr, (given, "device"))
    for node in nodes:
        node.args = tuple(asked if _is_device(v) and v in same else v for v in node.args)
        node.kwargs = {name: asked if _is_device(v) and v in same else v for name, v in node.kwargs.items()}


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device)


# Operator -> where it says that it trains.
_TRAINS = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}


def refuse_training_operators(model: nn.Module) -> None:
    """Raise a CaptureError for a graph whose operators say themselves that they train."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        place = _TRAINS.get(node.target)
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise CaptureError(
                f"the graph was exported in training mode (node {node.name} is {node.target} with training=True), which eval() "
                f"does not change: export model.eval()"
            )


# Where tensors stand among a call's arguments, by the names that torch gives them, and NumPy's names for torch's own.
_PLACES = {"input": 0, "tensors": 0, "other": 1, "mat2": 1}
_OF_ATTENTION = {"query": 0, "key": 1, "value": 2}
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def _order_arguments(graph: fx.Graph) -> None:
    """The same calls with their tensors as positional arguments, so that nobody behind this has to look in two places."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        places = _OF_ATTENTION if node.target is F.scaled_dot_product_attention else _PLACES
        while (name := next((n for n in kwargs if places.get(n) == len(args)), None)) is not None:
            args.append(kwargs.pop(name))
        if node.op == "call_method" or str(getattr(node.target, "__module__", "")).startswith(("torch", "None")):
            kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items()}
        node.args, node.kwargs = tuple(args), kwargs


def _trace_export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    # A batch of one would be specialised without a word; two samples keep the axis dynamic.
    if inputs.batch_size == 0:
        raise CaptureError("the example batch is empty, and torch.export runs the model: pass at least one sample")
    samples = max(2, inputs.batch_size or 2)
    example = inputs.resized(samples)
    shapes = dynamic_shapes(model, example, batch=torch.export.Dim.AUTO)
    # without gradients: a no_grad region within the model would become a subgraph of its own
    # and without the graph that it prints where the model's code depends on values
    with unheard(), unfused_attention(), torch.no_grad(), neutral_results(model):
        program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph = exported.graph
    _drop_input_checks(graph)
    given = {node.target for node in graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)}
    _follow_inputs(graph, model_device(model), given)
    # Rebuilt as a plain GraphModule: what torch.export returns refuses train() and eval().
    return fx.GraphModule(exported, graph, type(model).__name__)


@contextmanager
def neutral_results(model: nn.Module) -> Iterator[None]:
    """The model returns :class:`~vbpfx.graph.fields.Fields` for dataclasses, which torch.export takes for unknown objects otherwise."""
    own, before = model.forward, vars(model).get("forward")

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return without_classes(own(*args, **kwargs))

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


def dynamic_shapes(model: nn.Module, example: Inputs, batch: Any) -> dict[str, Any]:
    """What torch.export may leave open, by argument: the batch axis, and every axis of token ids and masks.

    Texts differ in length too; such an axis stays open wherever the model lets it.
    """

    def dynamic(leaf: Any, axis: int | None) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        lengths = {} if leaf.is_floating_point() else dict.fromkeys(range(leaf.ndim), torch.export.Dim.AUTO)
        return lengths | ({} if axis is None else {axis: batch})

    args, kwargs = example.each(dynamic)
    return dict(zip(argument_names(model, example), args, strict=False)) | dict(kwargs)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """The fused inference kernels of attention and encoder layers hide the products inside: do without."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """The exporters log what they try and give up; the error, if there is one, says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def unheard() -> Iterator[None]:
    """No warnings, no logging, and nothing on Python's standard output and error."""
    nothing = io.StringIO()
    with redirect_stdout(nothing), redirect_stderr(nothing), warnings.catch_warnings(), quiet_logging():
        warnings.simplefilter("ignore")
        yield


FRONTENDS: Mapping[Literal["symbolic", "export"], Callable[[nn.Module, Inputs], fx.GraphModule]] = {
    "symbolic": _trace_symbolic,
    "export": _trace_export,
}
