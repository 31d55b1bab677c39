"""Export a network to one ONNX file with a dynamic batch axis, and check it in ONNX Runtime before it gets its name."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vbpfx.data.inputs import Inputs, argument_names
from vbpfx.display.quiet import quiet_python
from vbpfx.errors import ExportError, first_line, root_cause
from vbpfx.graph.capture import share_parameters
from vbpfx.graph.edit import finish
from vbpfx.graph.fake import propagate_shapes
from vbpfx.graph.frontends import dynamic_shapes, neutral_results
from vbpfx.graph.precision import full_float32
from vbpfx.graph.run import outputs_of
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import PARITY, require_close
from vbpfx.outputs.fields import path_name, result_paths
from vbpfx.plans.records import Plan
from vbpfx.storage.files import Write, write_atomically

# The batch sizes at which the file is compared with the network.
_CHECKED_BATCHES = (1, 2, 5)


def export_onnx(network: nn.Module, inputs: Inputs, path: str | Path, *, plan: Plan | None = None) -> Path:
    """Write a network as ONNX with a dynamic batch axis, and check the file before it gets its name.

    There are three checks. The ONNX checker accepts the file. ONNX Runtime agrees with PyTorch to 1e-4 (largest
    difference divided by largest output) at batch sizes 1, 2 and 5. Every narrowed weight of the plan is stored at its
    small shape and none at its dense shape, judging by names and by use.

    Args:
        network: the network, in eval mode.
        inputs: example inputs.
        plan: the plan that the network was narrowed by. Without it, shapes are not checked.

    Raises:
        ExportError: the network cannot be exported, or the file fails a check. Nothing is written then.
        ArtifactError: the path cannot be written.
    """
    write_atomically({Path(path): onnx_writer(network, inputs, plan=plan)})
    return Path(path)


def onnx_writer(network: nn.Module, inputs: Inputs, *, plan: Plan | None = None) -> Write:
    """Return a function that writes and checks the file of :func:`export_onnx`, for writing several files at once.

    Raises:
        ExportError: the network cannot be exported. The returned function raises it, too, if a check fails.
    """
    # the exporter names keyword inputs by their order in the signature
    inputs = replace(
        inputs, kwargs={n: inputs.kwargs[n] for n in argument_names(network, inputs) if n in inputs.kwargs}
    )
    try:
        program = _to_program(network, inputs.resized(2))
    except Exception as error:  # the exporter and the model may raise any exception
        cause = root_cause(error)
        raise ExportError(
            f"torch.onnx cannot export the network: {type(cause).__name__}: {first_line(cause)}"
        ) from error

    def write(temporary: Path) -> None:
        try:
            program.save(str(temporary), external_data=False)
            onnx.checker.check_model(str(temporary))
            _check_shapes(initializer_shapes(temporary), weight_names(temporary), network, plan)
            _check_outputs(temporary, network, inputs)
        except (ExportError, OSError):
            raise
        except Exception as error:  # ONNX Runtime and the checker have exceptions of their own
            raise ExportError(f"the exported file does not run: {type(error).__name__}: {first_line(error)}") from error

    return write


def _exportable(network: nn.Module, example: Inputs) -> nn.Module:
    """Return a copy that shares the network's parameters, with fused attention in a form that the exporter accepts.

    The exporter decomposes attention. It supports only four axes, and its result has another memory layout than the
    fused kernel's. A view that was traced behind the kernel relies on that layout, so the result is made contiguous.
    """
    network = share_parameters(network)
    if not isinstance(network, fx.GraphModule):
        return network
    graph = network.graph
    if not all("val" in node.meta for node in graph.nodes if node.op != "output"):  # a graph from vbpfx.load
        propagate_shapes(network, example)
    for target in (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default):
        for node in graph.find_nodes(op="call_function", target=target):
            users = list(node.users)
            tracer = fx.proxy.GraphAppendingTracer(graph)
            with graph.inserting_before(node.next):
                result: Any = fx.Proxy(node, tracer)
                ndim = node.meta["val"].ndim
                tensors = [n for n in node.all_input_nodes if n.meta["val"].ndim == ndim]
                if ndim != 4 and tensors == node.all_input_nodes and 2 < len(tensors) == len(node.args):
                    operands: Any = [fx.Proxy(n, tracer) for n in tensors]
                    ahead = [operands[0].size(dim) for dim in range(ndim - 3)]
                    four = [x.flatten(0, ndim - 4) if ndim > 4 else x.unsqueeze(0) for x in operands]
                    result = F.scaled_dot_product_attention(*four, **node.kwargs)
                    result = result.unflatten(0, ahead) if ndim > 4 else result.squeeze(0)
                result = torch.clone(result, memory_format=torch.contiguous_format)
            for user in users:
                user.replace_input_with(node, result.node)
            if not node.users:
                graph.erase_node(node)
    finish(network)
    return network


def _to_program(network: nn.Module, example: Inputs) -> torch.onnx.ONNXProgram:
    shapes = dynamic_shapes(network, example, batch=torch.export.Dim.DYNAMIC)
    if example.args and isinstance(example.args[-1], dict) and not example.kwargs:
        # the exporter would take a trailing dictionary for the keyword arguments
        name = argument_names(network, example)[-1]
        example = Inputs(example.args[:-1], {name: example.args[-1]})
    exportable = _exportable(network, example)
    with quiet_python(), neutral_results(exportable):
        program = torch.onnx.export(
            exportable,
            example.args,
            kwargs=example.kwargs,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _name_outputs(program, _output_names(network, example))
    return program


def _output_names(network: nn.Module, example: Inputs) -> list[str]:
    """Return the names of the network's results, in order, or an empty list if they have none.

    A name is a dictionary key or the name of a field, with indices inside of it behind a dot.
    """
    with torch.no_grad(), full_float32():
        paths = [path for path, _ in result_paths(example.run(network))]
    return [path_name(path) for path in paths] if all(path and isinstance(path[0], str) for path in paths) else []


def _name_outputs(program: torch.onnx.ONNXProgram, names: list[str]) -> None:
    """Give the file's outputs these names. An inner value that already has one of them is renamed."""
    graph = program.model.graph
    inner = {value.name: value for node in graph.all_nodes() for value in node.outputs if value not in graph.outputs}
    given = {*graph.initializers, *(value.name for value in graph.inputs)}
    taken = {*inner, *given, *names}
    if len(names) != len(graph.outputs) or len({id(value) for value in graph.outputs}) < len(names):
        return
    for value, name in zip(graph.outputs, names, strict=True):
        if name in given:
            name = name if value in graph.inputs else _free(f"{name}_output", taken)
        elif name in inner:
            inner[name].name = _free(f"{name}_inner", taken)
        value.name = name


def _free(name: str, taken: set[str]) -> str:
    """Return the name, with underscores added until it is free, and add it to ``taken``."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def initializer_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape for every tensor that is stored in an ONNX file."""
    return {stored.name: tuple(stored.dims) for stored in onnx.load(str(path)).graph.initializer}


# The inputs that are operands of a product; and the operators behind which a tensor still has the same values, in
# another layout.
_OPERANDS = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Gather": (0,)}
_LAYOUTS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})


def weight_names(path: str | Path) -> set[str]:
    """Return the names of the stored tensors that products read, directly or in another layout."""
    graph = onnx.load(str(path)).graph
    source = {tensor.name: tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        if node.op_type in _LAYOUTS and node.input[0] in source:
            source |= dict.fromkeys(node.output, source[node.input[0]])
        read = range(len(node.input)) if node.op_type == "Einsum" else _OPERANDS.get(node.op_type, ())
        found |= {source[node.input[i]] for i in read if node.input[i] in source}
    return found


def _check_shapes(stored: dict[str, tuple[int, ...]], weights: set[str], network: nn.Module, plan: Plan | None) -> None:
    """Check that the narrowed weights are stored at their small shapes, and none at its dense shape.

    A tensor with the name of a parameter or buffer must have the shape of that parameter or buffer, in any layout. All
    others were made by the exporter, which may rename, transpose and flatten a weight. Of these, only tensors that
    products read are considered.

    Args:
        stored: name -> shape of the tensors in the file.
        weights: the names of the tensors that products read.
    """
    own = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    dense = {name: list(shape) for name, shape in own.items()}
    for entry in plan.blocks if plan else ():
        for parameter in entry.block.parameters:
            if parameter.name in dense:
                dense[parameter.name][parameter.axis] += entry.lost(parameter)
    named = set(own) | {name for name, _ in network.named_buffers(remove_duplicate=False)}
    made = [stored[name] for name in weights - named]
    counts = {math.prod(shape) for shape in made}
    foreign = {_layout_free(shape) for shape in made} - _shapes_of_its_own(network)
    constant = _constant_parameters(network)
    for name, shape in own.items():
        if tuple(dense[name]) == shape or len(shape) < 2:
            continue
        found = {_layout_free(stored[name])} if name in stored else set()
        if _layout_free(dense[name]) in found | foreign:
            raise ExportError(f"the ONNX file holds a tensor of shape {tuple(dense[name])}, the dense {name}")
        small = _layout_free(stored[name]) == _layout_free(shape) if name in stored else math.prod(shape) in counts
        if not small and name not in constant:
            raise ExportError(f"the ONNX file holds no tensor of shape {shape}, which {name} has after pruning")


def _shapes_of_its_own(network: nn.Module) -> set[tuple[int, ...]]:
    """Return the shapes of the narrowed network's parameters and buffers, and of values that depend on no input."""
    found = {_layout_free(tensor.shape) for tensor in (*network.parameters(), *network.buffers())}
    if isinstance(network, fx.GraphModule):
        computed = _computed(network)
        values = [node.meta.get("val") for node in network.graph.nodes if node not in computed]
        found |= {_layout_free(value.shape) for value in values if isinstance(value, Tensor)}
    return found


def _computed(network: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values depend on an input."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _constant_parameters(network: nn.Module) -> set[str]:
    """Return the parameters that are only used in constants. The exporter may store the constants instead of them."""
    if not isinstance(network, fx.GraphModule):
        return set()
    meeting: set[str] = set()
    for node in _computed(network):
        if node.op == "call_module":
            meeting |= {f"{node.target}.{n}" for n, _ in network.get_submodule(str(node.target)).named_parameters()}
        meeting |= {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
    return {name for name, _ in network.named_parameters()} - meeting


def _layout_free(shape: Any) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _check_outputs(path: Path, network: nn.Module, inputs: Inputs) -> None:
    session = open_session(path)
    for samples in _CHECKED_BATCHES:
        batch = inputs.resized(samples)
        expected = [tensor.cpu() for tensor in outputs_of(network, batch)]
        require_close(run_session(session, batch), expected, PARITY, partial(_unlike_pytorch, samples=samples))


def _unlike_pytorch(error: float, samples: int) -> ExportError:
    return ExportError(
        f"ONNX Runtime differs from PyTorch by {error:.2e} of the output's size at batch {samples} (allowed "
        f"{PARITY:.0e}); nothing was written"
    )
