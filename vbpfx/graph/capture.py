"""Capture: trace a model into a graph whose nodes know their shapes.

The caller's model itself is never traced. The front ends (:mod:`vbpfx.graph.frontends`) work on a copy of its modules
that shares the parameters, so no mode, hook or attribute of the original changes, not even for a moment.

Shapes come from one run on fake tensors (:mod:`vbpfx.graph.fake`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from vbpfx.data.inputs import Inputs, Place, as_inputs, holds_tensor, model_device
from vbpfx.display.quiet import quiet_logging, quiet_python
from vbpfx.errors import CalibrationError, CaptureError, first_line
from vbpfx.graph.batch_axis import find_batch_axes
from vbpfx.graph.fake import has_fixed_batch, propagate_shapes, spent_by_node
from vbpfx.graph.frontends import FRONTENDS, refuse_training_operators, unfused_attention
from vbpfx.graph.packed import unpack
from vbpfx.graph.recurrent import STAND_IN, recurrent_flops
from vbpfx.graph.regions import AutocastRegionError
from vbpfx.graph.source import line_of_error
from vbpfx.rules.experts import grouped_product
from vbpfx.rules.table import operator_of

Model = TypeVar("Model", bound=nn.Module)
Frontend = Literal["auto", "symbolic", "export"]


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the flops of attention, given the shapes that torch's flop counter passes."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Operators that older versions of torch do not count.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_UNCOUNTED: dict[Any, Callable[..., int]] = (
    {} if _CPU_ATTENTION in flop_registry else {_CPU_ATTENTION: _cpu_attention_flops}
)
_UNCOUNTED[STAND_IN.overloadpacket] = recurrent_flops


def _grouped_product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the flops of a grouped product: every row is multiplied by the matrix of its expert. Arguments are shapes."""
    return int(2 * math.prod(x) * weight[-1])


def _grouped_products(graph: fx.Graph) -> dict[Any, Callable[..., int]]:
    """Return operator -> flops for grouped products that torch does not count: its own, and those that another library registers."""
    called = {n.target.overloadpacket for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)
              and operator_of(n).rule is grouped_product}  # fmt: skip
    if hasattr(torch.ops.aten, "_grouped_mm"):
        called.add(torch.ops.aten._grouped_mm)
    return {packet: _grouped_product_flops for packet in called if packet not in flop_registry}


@dataclass(frozen=True)
class FixedSize:
    """A size of an input that is fixed in the graph, although the model accepts other sizes.

    Attributes:
        place: the place of the tensor among the inputs.
        axis: the axis of that tensor.
        size: the fixed length of the axis.
        where: a sentence that names the line of the model's code that fixed it, or "" if the line was not found.
    """

    place: Place
    axis: int
    size: int
    where: str = ""

    def __str__(self) -> str:
        name, number = self.place
        which = f"input {name + 1}" if isinstance(name, int) else f"input {name}"
        return f"{which}{f' (tensor {number + 1} in it)' if number else ''}, axis {self.axis}: {self.size}"


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_module: the graph, in eval mode. It shares its parameters with the model. Every node's ``meta["val"]``
            holds its value as fake tensors.
        reference: the model in its own class: a copy of its modules in eval mode that shares their parameters.
        frontend: the front end that traced the model, or ``"onnx"`` if the graph comes from a file.
        inputs: the example inputs.
        batch: the size that stands for the batch axis in ``meta["val"]``, or None if the graph works only for the batch
            size of the example.
        fingerprint: a hash of the model's structure (names, shapes, module classes).
        fixed: input sizes, except the batch size, that the graph has fixed although the model accepts others.
            :func:`vbpfx.prune` finds them on a few batches. A narrowed graph raises AssertionError at other sizes.
    """

    graph_module: fx.GraphModule
    reference: nn.Module
    frontend: Literal["symbolic", "export", "onnx"]
    inputs: Inputs
    batch: int | None
    fingerprint: str
    fixed: tuple[FixedSize, ...] = ()

    @property
    def divisible(self) -> bool:
        """Whether the graph accepts any number of samples and treats each independently, so that batches may be cut."""
        return self.batch is not None and not self.inputs.coupled

    def require_sizes(self, inputs: Inputs) -> None:
        """Check that a batch has the sizes that are fixed in the graph.

        Args:
            inputs: a batch.

        Raises:
            CalibrationError: the batch has another size.
        """
        placed = inputs.placed
        for fixed in self.fixed:
            tensor = placed.get(fixed.place)
            if tensor is not None and fixed.axis < tensor.ndim and tensor.shape[fixed.axis] != fixed.size:
                raise CalibrationError(
                    f"a batch has another size than the one that the graph was captured at ({fixed}): {inputs.describe()}. "
                    f"{fixed.where}Pass open_sizes=True, or the batches as a list, so that the size can stay open; or bring all batches to "
                    f"one size"
                )

    def samples_axis(self, value: str | Tensor) -> int | None:
        """Return the batch axis of a value, which may be merged with another axis; None if it has no batch axis.

        The batch size in ``meta["val"]`` is a large prime, so a size is a multiple of it only if it contains the batch.

        Args:
            value: a node's name, or its value in ``meta["val"]``, or a part of that value.
        """
        shape = (self.nodes[value].meta["val"] if isinstance(value, str) else value).shape
        return next((dim for dim, size in enumerate(shape) if self.batch and size and size % self.batch == 0), None)

    @property
    def flags(self) -> dict[str, Any]:
        """The arguments that hold no tensor and are not None, with their values. The graph accepts no other values."""
        bound = inspect.signature(self.reference.forward).bind(*self.inputs.args, **self.inputs.kwargs)
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            else:
                given[name] = value
        return {name: value for name, value in given.items() if value is not None and not holds_tensor(value)}

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes by name, in order."""
        return {node.name: node for node in self.graph_module.graph.nodes}

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates per node and sample, without the nodes that have none.

        They are counted by :mod:`torch.utils.flop_counter`, with one MAC for two flops. It counts matrix products and
        convolutions, including the two products of attention, but no norms, activations and biases.
        """
        if self.batch is None:
            return self._count_macs(self.inputs.batch_size or 1)
        try:
            return self._count_macs(1)
        except Exception:  # a single sample may be refused, for example by BatchNorm on batch statistics
            return self._count_macs(self.batch)

    def _count_macs(self, samples: int) -> dict[str, int]:
        counted = _UNCOUNTED | _grouped_products(self.graph_module.graph)
        with FlopCounterMode(display=False, custom_mapping=counted) as counter, unfused_attention():
            flops = spent_by_node(self.graph_module, self.inputs, samples, counter.get_total_flops)
        return {name: spent // (2 * samples) for name, spent in flops.items()}


def capture(
    model: nn.Module, example_inputs: Any, *, frontend: Frontend = "auto", samples: int | None = None
) -> Captured:
    """Trace a model into a graph whose nodes know their shapes, with a dynamic batch axis.

    The batch axis of every input is found by a few runs of the model (:mod:`vbpfx.graph.batch_axis`).

    Args:
        model: any module, on any device. It is not changed.
        example_inputs: one batch: a tensor, a mapping of keyword arguments, a sequence of positional
            arguments, or ``(args, kwargs)``. Only shapes and dtypes matter here.
        frontend: ``"symbolic"``, ``"export"``, or ``"auto"``, which tries symbolic first, then export.
        samples: the most samples of the batch to keep; by default all.

    Raises:
        CaptureError: neither front end can trace the model (the message names the line of the model's source that
            stopped it), or the model computes in float16 on the CPU.
    """
    if frontend not in ("auto", "symbolic", "export"):
        raise CaptureError(f"frontend={frontend!r} is unknown; use 'auto', 'symbolic' or 'export'")
    require_module(model)
    _refuse_half_on_cpu(model)
    _refuse_sparse_weights(model)
    _refuse_fake(model)
    refuse_training_operators(model)
    reference = share_parameters(model)
    inputs = as_inputs(example_inputs, reference).to(model_device(model))
    _require_arguments(reference, inputs)
    _require_plain_tensors(inputs)
    fixed = has_fixed_batch(reference, inputs)
    if not fixed:
        inputs = find_batch_axes(share_parameters(model), inputs)
        inputs = inputs if samples is None else inputs.first(samples)
    failures: list[str] = []
    for name, trace in FRONTENDS.items():
        if frontend not in ("auto", name):
            continue
        try:
            graph_module = trace(reference, inputs)
            with quiet_logging():
                batch = propagate_shapes(graph_module, inputs, fixed=fixed)
            unpack(graph_module)
        except AutocastRegionError as error:
            line = line_of_error(error)
            raise CaptureError(f"{type(model).__name__}: {error}" + (f"\n    at {line}" if line else "")) from error
        except Exception as error:  # tracing runs the model's own code, which can raise anything
            failures.append(f"{name}: {explain(error, reference)}")
            continue
        return Captured(graph_module, reference, name, inputs, batch, fingerprint(model))
    raise CaptureError(
        f"{type(model).__name__} could not be traced with inputs ({inputs.describe()}).\n  "
        + "\n  ".join(failures)
        + "\nTry: check that the model runs on these inputs; make the named line independent of tensor "
        "values; or pass the traceable part of the model alone."
    )


def _require_arguments(model: nn.Module, inputs: Inputs) -> None:
    """Raise a CaptureError if the batch is a single object that the model does not accept, or that holds no tensor."""
    takes = ", ".join(inspect.signature(model.forward).parameters) or "nothing"
    alone = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
    if isinstance(alone, Mapping) and inputs.tensors:
        try:
            with torch.no_grad(), quiet_python():
                inputs.to(model_device(model)).run(share_parameters(model))
        except Exception as error:  # the model may raise any exception
            keys = [str(key) for key in alone]
            taken = ", ".join(f"batch[{key!r}]" for key in keys[:1])
            raise CaptureError(
                f"the batch is a dictionary with the keys {', '.join(keys)}, and forward takes {takes}: as these do not match, the "
                f"dictionary was passed as one argument, and the model raised an error ({first_line(error)}). State the arguments: "
                f"inputs=lambda batch: (({taken},), {{}})"
            ) from error
    if inputs.tensors:
        return
    attributes = _tensor_attributes(alone)
    if attributes:
        passed = ", ".join(f"batch.{name}" for name in attributes[:2]) + ("," if len(attributes) < 2 else "")
        raise CaptureError(
            f"the batch is a {type(alone).__name__}, an object whose tensors are its attributes {', '.join(attributes)}, and forward takes "
            f"{takes}. A graph's inputs are tensors: say which are passed, inputs=lambda batch: (({passed}), {{}}), and where forward "
            f"takes the object itself, wrap the model in a module that takes the tensors and puts it together"
        )
    raise CaptureError("the example inputs hold no tensor; pass one batch as the model takes it")


def _tensor_attributes(value: Any) -> list[str]:
    """Return the names of an object's attributes that are tensors, looked up in its own ``keys`` if it has them."""
    keys = getattr(value, "keys", None)
    names = keys() if callable(keys) else keys if keys is not None else getattr(value, "__dict__", ())
    return [str(name) for name in names if isinstance(getattr(value, str(name), None), Tensor)]


def _require_plain_tensors(inputs: Inputs) -> None:
    """Raise a CaptureError for sparse and nested tensors among the arguments, which cannot be traced."""
    for (name, _), tensor in inputs.placed.items():
        if tensor.layout is not torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            which = f"number {name + 1}" if isinstance(name, int) else name
            raise CaptureError(
                f"argument {which} is a sparse or nested tensor ({kind}, {tuple(tensor.shape)}), which cannot be traced: pass "
                f"it as a plain tensor (tensor.to_dense()), or its parts (indices and values; an edge list) with a model that puts "
                f"them together by index_add or scatter_add"
            )


def captured_file(graph_module: fx.GraphModule, inputs: Inputs) -> Captured:
    """Return a graph that was made from a file, not traced, as a captured model that is its own reference.

    Raises:
        CaptureError: the graph does not run on the inputs.
    """
    _refuse_half_on_cpu(graph_module)
    try:
        with quiet_logging():
            batch = propagate_shapes(graph_module, inputs)
    except Exception as error:  # operators may raise any exception
        raise CaptureError(
            f"the graph of the file fails on these inputs ({inputs.describe()}): {first_line(error)}. Compare their names, shapes and types with the inputs that the file declares"
        ) from error
    return Captured(graph_module, graph_module, "onnx", inputs, batch, fingerprint(graph_module))


def require_module(model: Any) -> None:
    """Raise a CaptureError for anything that is not a ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}; wrap functions in a module")


def _wrappers() -> dict[type[nn.Module], str]:
    """Return class -> attribute for modules that wrap another module, which is in that attribute.

    They run it on several devices, in several processes, or compiled.
    """
    found: dict[type[nn.Module], str] = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    # Importing torch._dynamo takes seconds. If there is a compiled module, it is imported already.
    if compiler := sys.modules.get("torch._dynamo"):
        found[compiler.OptimizedModule] = "_orig_mod"
    return found


# Wrappers that hide the Python code -> what to pass instead of them.
_WRAPPERS = {
    nn.DataParallel: "the model in it, model.module",
    nn.parallel.DistributedDataParallel: "the model in it, model.module",
    torch.jit.ScriptModule: "the module that the script was made of: TorchScript has no Python code to trace",
}


def require_code_and_numbers(model: nn.Module) -> None:
    """Raise a CaptureError for a wrapper without code to trace, or for weights that are quantised or have no values."""
    wrappers = dict(_WRAPPERS)
    # Importing torch._dynamo takes seconds. If the model is compiled, it is imported already.
    if compiler := sys.modules.get("torch._dynamo"):
        wrappers[compiler.OptimizedModule] = "the model that was compiled, model._orig_mod, and compile the result"
    for wrapper, instead in wrappers.items():
        if isinstance(model, wrapper):
            raise CaptureError(f"the model is a {type(model).__name__}; pass {instead}")
    _refuse_divided(model)
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise CaptureError(
                f"{name} is a {type(parameter.data).__name__}, quantised or otherwise no plain tensor: prune the plain model, and "
                f"quantise the result"
            )
        if parameter.is_meta:
            raise CaptureError(
                f"{name} is on the meta device and has no numbers: load the weights first, or prune from files "
                f"(vbpfx.prune_files)"
            )


_GATHER = (
    "gather it into the plain model first: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) gives its weights whole, and a model that was never divided takes them"
)


def _refuse_divided(model: nn.Module) -> None:
    """Raise a CaptureError for a model whose weights are sharded over processes."""
    modules = {name: sys.modules.get(name) for name in ("torch.distributed.fsdp", "torch.distributed.tensor")}
    if fsdp := modules["torch.distributed.fsdp"]:
        for name, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                where = f"module {name}" if name else "the model"
                raise CaptureError(f"{where} is divided over processes (FullyShardedDataParallel): {_GATHER}")
    if tensor := modules["torch.distributed.tensor"]:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, tensor.DTensor):
                raise CaptureError(f"{name} is divided over processes (a DTensor, as FSDP2 makes them): {_GATHER}")


def _refuse_fake(model: nn.Module) -> None:
    """Raise a CaptureError if the model holds fake tensors, which an earlier trace has left behind."""
    for path, module in model.named_modules():
        attributes = {**vars(module), **module._parameters, **module._buffers}
        for attribute, value in attributes.items():
            if not attribute.startswith("_") or isinstance(value, Tensor):
                leaves = (
                    value
                    if isinstance(value, (list, tuple))
                    else value.values()
                    if isinstance(value, dict)
                    else (value,)
                )
                if any(isinstance(leaf, FakeTensor) for leaf in leaves):
                    name = f"{path}.{attribute}".lstrip(".")
                    raise CaptureError(
                        f"{name} holds a fake tensor, which has no numbers: forward stores a tensor there, and an earlier trace "
                        f"(torch.export, torch.fx) has left its own. Set it to None, or make the model anew, before pruning"
                    )


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the names and shapes of all parameters and persistent buffers, and the module classes."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict(keep_vars=True).items()
             if isinstance(tensor, Tensor)]  # fmt: skip
    lines += [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _refuse_half_on_cpu(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16 and parameter.device.type == "cpu":
            raise CaptureError(
                f"the model computes in float16 on the CPU (parameter {name}). In float16 on the CPU, many operators do not exist, and sums overflow. Prune model.float() (or model.bfloat16(), or the model on a GPU), and call .half() on the result"
            )


def _refuse_sparse_weights(model: nn.Module) -> None:
    """Refuse sparse parameters, which have no rows and columns to cut, and sparse buffers that torch cannot copy.

    Torch can copy only sparse buffers in COO layout.
    """
    for name, parameter in model.named_parameters():
        if "sparse" in str(parameter.layout):
            raise CaptureError(
                f"parameter {name} of the model is sparse ({_layout(parameter)}), and a sparse weight cannot be narrowed: prune the "
                f"model with it as a plain tensor (tensor.to_dense()), and make it sparse again behind that"
            )
    for name, buffer in model.named_buffers():
        if "sparse" in str(buffer.layout) and buffer.layout != torch.sparse_coo:
            raise CaptureError(
                f"buffer {name} of the model is sparse ({_layout(buffer)}) in a layout that torch cannot copy: keep it as "
                f"tensor.to_sparse_coo(), or as a plain tensor (tensor.to_dense())"
            )


def _layout(tensor: Tensor) -> str:
    return f"{str(tensor.layout).removeprefix('torch.')}, {tuple(tensor.shape)}"


def share_parameters(model: Model) -> Model:
    """Return a copy of a model, in eval mode, that shares its parameters.

    Buffers are copied, since forward may write to them. The copy of a language model makes no cache of keys and values,
    which is not part of a single forward pass. In the copy, ``DataParallel``, ``DistributedDataParallel`` and compiled
    modules run the module that they wrap.
    """
    # the forward of an embedding with max_norm writes to its weight
    written = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None}
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in written} | plain_tensors(model)
    try:
        shared = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); remove the attribute "
            f"that copy.deepcopy cannot copy (a lock, a generator, an open file) before pruning"
        ) from error
    wrappers = _wrappers()
    for module in shared.modules():
        for wrapper, attribute in wrappers.items():
            if isinstance(module, wrapper):
                module.forward = partial(_call, getattr(module, attribute))
        config: Any = vars(module).get("config")  # only the instance's own config is a copy, that of a class is not
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return shared.eval()


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def on_cpu(model: Model) -> Model:
    """Return the model itself if all of it is on the CPU, otherwise a copy on the CPU in eval mode."""
    if all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return model
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu(), p.requires_grad) for p in model.parameters()}
    memo |= {key: tensor.cpu() for key, tensor in plain_tensors(model).items()}
    return copy.deepcopy(model, memo).to("cpu").eval()


def plain_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Return a memo for ``copy.deepcopy`` with copies of tensors that are neither parameters nor buffers.

    Deepcopy itself cannot copy tensors that were computed with gradients.
    """
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in attributes if isinstance(value, Tensor)}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor for all parameters and buffers. A shared tensor appears under each of its names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """Return one parameter or buffer by any of its names, without collecting all others like :func:`named_tensors`."""
    owner, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), attribute)
    return found


def explain(error: Exception, model: nn.Module) -> str:
    """Return the first line of an error, and the line of code that raised it."""
    if isinstance(error, CaptureError):  # our own errors already name the place
        return str(error)
    text = first_line(error)
    if line := line_of_error(error):
        return f"{type(error).__name__}: {text}\n    at {line}"
    try:
        place = f"{inspect.getsourcefile(type(model))}:{inspect.getsourcelines(type(model).forward)[1]}"
    except (OSError, TypeError):
        place = type(model).__qualname__
    return f"{type(error).__name__}: {text}\n    in the forward of {place}"
