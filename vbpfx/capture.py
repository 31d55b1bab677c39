"""Capture: a model becomes a graph whose nodes know their shapes. The only file that traces.

Two front ends make the same kind of object, a ``torch.fx.GraphModule``:

- ``"symbolic"``, :class:`torch.fx.Tracer`: keeps the module structure, ``train()`` / ``eval()`` and the
  parameter names.
- ``"export"``, :func:`torch.export.export`: an ATen graph, for models whose Python control flow stops
  symbolic tracing.

What is a graph of known layers and operators already is not traced again: its own graph is taken, with its nodes' names.

Nothing is traced on the caller's model: both work on a copy of its modules that shares every tensor, so
no mode, hook or attribute of the original changes even for a moment.

Shapes come from one run on fake tensors (:mod:`vbpfx.fake`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from vbpfx.errors import CaptureError, first_line
from vbpfx.fake import has_fixed_batch, propagate_shapes, run_fake
from vbpfx.inputs import Inputs, argument_names, as_inputs, holds_tensor, model_device
from vbpfx.ops import is_registered

Model = TypeVar("Model", bound=nn.Module)
Frontend = Literal["auto", "symbolic", "export"]

_NOT_USER_CODE = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_module: the graph; it shares its parameters with the model and is in eval mode. Every
            node's ``meta["val"]`` holds its value as fake tensors.
        reference: the model in its own class: a copy of its modules that shares their tensors, in eval mode.
        frontend: what traced it, or ``"onnx"`` where it came from a file.
        inputs: the example inputs.
        batch: the size that stands for the batch axis in ``meta["val"]``; None where the graph
            works for the example's own batch size only.
        fingerprint: hash of the model's structure (names, shapes, module classes).
    """

    graph_module: fx.GraphModule
    reference: nn.Module
    frontend: Literal["symbolic", "export", "onnx"]
    inputs: Inputs
    batch: int | None
    fingerprint: str

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes by name, in order."""
        return {node.name: node for node in self.graph_module.graph.nodes}

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates per node and sample, nodes that have none left out.

        Counted by :mod:`torch.utils.flop_counter` (matrix products and convolutions, attention's two
        products included; norms, activations and biases count nothing), where one MAC is two flops.
        """
        if self.batch is None:
            return self._count_macs(self.inputs.batch_size or 1)
        try:
            return self._count_macs(1)
        except Exception:  # BatchNorm on batch statistics, for one, refuses a single sample
            return self._count_macs(self.batch)

    def _count_macs(self, samples: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        with FlopCounterMode(display=False) as counter, _unfused_attention():

            def count(node: fx.Node, run: Callable[[], Any]) -> Any:
                before = counter.get_total_flops()
                value = run()
                if spent := counter.get_total_flops() - before:
                    counts[node.name] = spent // (2 * samples)
                return value

            run_fake(self.graph_module, self.inputs, samples, count)
        return counts


def capture(model: nn.Module, example_inputs: Any, *, frontend: Frontend = "auto") -> Captured:
    """Trace a model into a graph whose nodes know their shapes, with a dynamic batch axis.

    Args:
        model: any module, on any device; it is left exactly as it was.
        example_inputs: one batch: a tensor, a mapping of keyword arguments, a sequence of positional
            arguments, or ``(args, kwargs)``. Only shapes and dtypes matter here.
        frontend: ``"symbolic"``, ``"export"``, or ``"auto"``: symbolic first, then export.

    Raises:
        CaptureError: neither front end can trace it (the message names the line of the model's source
            that stopped it), or the model computes in float16 on the CPU.
    """
    if frontend not in ("auto", "symbolic", "export"):
        raise CaptureError(f"frontend={frontend!r} is unknown; use 'auto', 'symbolic' or 'export'")
    require_module(model)
    _refuse_half_on_cpu(model)
    _refuse_training_operators(model)
    reference = share_parameters(model)
    inputs = as_inputs(example_inputs, reference).to(model_device(model))
    if not inputs.tensors:
        raise CaptureError("the example inputs hold no tensor; pass one batch as the model takes it")
    failures: list[str] = []
    for name, trace in _FRONTENDS.items():
        if frontend not in ("auto", name):
            continue
        try:
            graph_module = trace(reference, inputs)
            with quiet_logging():
                batch = propagate_shapes(graph_module, inputs, fixed=has_fixed_batch(reference, inputs))
        except Exception as error:  # tracing runs the model's own code, which can raise anything
            failures.append(f"{name}: {_explain(error, reference)}")
            continue
        return Captured(graph_module, reference, name, inputs, batch, fingerprint(model))
    raise CaptureError(
        f"{type(model).__name__} could not be traced with inputs ({inputs.describe()}).\n  "
        + "\n  ".join(failures)
        + "\nTry: check that the model runs on these inputs; make the named line independent of tensor "
        "values; or pass the traceable part of the model alone."
    )


def captured_file(graph_module: fx.GraphModule, inputs: Inputs) -> Captured:
    """A graph that was not traced but made from a file, as if it had been captured; it is its own reference.

    Raises:
        CaptureError: it does not run on the inputs.
    """
    _refuse_half_on_cpu(graph_module)
    try:
        with quiet_logging():
            batch = propagate_shapes(graph_module, inputs)
    except Exception as error:  # whatever the operators raise
        raise CaptureError(
            f"the file's graph does not run on inputs ({inputs.describe()}): {first_line(error)}"
        ) from error
    return Captured(graph_module, graph_module, "onnx", inputs, batch, fingerprint(graph_module))


def require_module(model: Any) -> None:
    """Raise a CaptureError for anything that is no ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}; wrap functions in a module")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters and persistent buffers and the module classes."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict(keep_vars=True).items()
             if isinstance(tensor, Tensor)]  # fmt: skip
    lines += [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _refuse_half_on_cpu(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16 and parameter.device.type == "cpu":
            raise CaptureError(
                f"the model computes in float16 on the CPU (parameter {name}), where many operators do not exist "
                f"and sums overflow; prune model.float() (or .bfloat16(), or on a GPU) and call .half() on the result"
            )


def share_parameters(model: Model) -> Model:
    """A copy of the modules that shares their parameters, in eval mode; buffers, which forward may write, are copied."""
    # an embedding with max_norm writes to its weight in forward
    written = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None}
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in written} | plain_tensors(model)
    try:
        shared = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); remove the attribute "
            f"that copy.deepcopy cannot copy (a lock, a generator, an open file) before pruning"
        ) from error
    shared.eval()
    return shared


def plain_tensors(model: nn.Module) -> dict[int, Tensor]:
    """A deepcopy memo for tensors that are neither parameters nor buffers: deepcopy cannot copy computed ones."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in attributes if isinstance(value, Tensor)}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


class _Tracer(fx.Tracer):
    """fx's tracer, but composite modules of ``torch.nn`` are traced through, so that a block inside is seen."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        composite = isinstance(
            m,
            (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.TransformerDecoder),
        )
        return is_registered(m) or (not composite and super().is_leaf_module(m, module_qualified_name))


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


# Operator -> where it says that it trains.
_TRAINS = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}


def _refuse_training_operators(model: nn.Module) -> None:
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
    with warnings.catch_warnings(), _unfused_attention(), quiet_logging(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph = exported.graph
    _drop_input_checks(graph)
    # Rebuilt as a plain GraphModule: what torch.export returns refuses train() and eval().
    return fx.GraphModule(exported, graph, type(model).__name__)


def dynamic_shapes(model: nn.Module, example: Inputs, batch: Any) -> dict[str, Any]:
    """What torch.export may leave open, by argument: the batch axis, and every axis of token ids and masks.

    Texts differ in length too; such an axis stays open wherever the model lets it.
    """

    def dynamic(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        lengths = {} if leaf.is_floating_point() else dict.fromkeys(range(leaf.ndim), torch.export.Dim.AUTO)
        return lengths | ({0: batch} if example.is_batched(leaf) else {})

    args, kwargs = pytree.tree_map(dynamic, (example.args, example.kwargs))
    return dict(zip(argument_names(model, example), args, strict=False)) | dict(kwargs)


@contextmanager
def _unfused_attention() -> Iterator[None]:
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


_FRONTENDS: Mapping[Literal["symbolic", "export"], Callable[[nn.Module, Inputs], fx.GraphModule]] = {
    "symbolic": _trace_symbolic,
    "export": _trace_export,
}


def _explain(error: Exception, model: nn.Module) -> str:
    """The error's first line and the innermost line of code that is neither torch's nor ours."""
    text = first_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if os.path.exists(frame.filename) and not frame.filename.startswith(_NOT_USER_CODE):
            return f"{type(error).__name__}: {text}\n    at {frame.filename}:{frame.lineno}: {frame.line}"
    try:
        place = f"{inspect.getsourcefile(type(model))}:{inspect.getsourcelines(type(model).forward)[1]}"
    except (OSError, TypeError):
        place = type(model).__qualname__
    return f"{type(error).__name__}: {text}\n    in the forward of {place}"
