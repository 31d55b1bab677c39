"""Write a GraphModule as JSON and read it back, without pickle and without the model's class.

Nodes are written as names and arguments, and leaf modules as their class in ``torch.nn`` and their plain attributes.
Tensors are saved in safetensors files beside the JSON. Reading a file never runs code from it:

- The target of a call must be a function on tensors (listed by ``torch.overrides``), an arithmetic operator, an ATen
  operator or a public Tensor method.
- A module must be of a class in ``torch.nn.modules``.
- A container must be one of those that :mod:`vbpfx.artifacts.tree_format` lists.
- Every name that enters the generated code must be an identifier.

All targets and classes are looked up in lists that are made before the file is read. So nothing is imported because a
file names it.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import math
import operator
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _assert_is_none

from vbpfx.artifacts.tree_format import field_name, named_tuple, spec_from_json, spec_to_json
from vbpfx.errors import ArtifactError
from vbpfx.outputs.fields import Fields

_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "is_cuda", "data",
                         "requires_grad"})  # fmt: skip
_FORBIDDEN = frozenset({"load", "save", "from_file"})
# Methods that read or convert a tensor, and that are not ATen operators.
_METHODS = frozenset({"size", "dim", "numel", "ndimension", "type", "float", "double", "half", "bfloat16", "int", "long",
                      "bool", "cpu", "cuda", "is_floating_point", "reshape_as", "new_tensor", "unflatten"})  # fmt: skip
# Attributes in which a recurrent layer keeps its weights a second time.
_MADE_OF_WEIGHTS = {"_flat_weights", "_flat_weight_refs"}
_VARIABLE = re.compile(r"\*{0,2}[A-Za-z_]\w*")
_PATH = re.compile(r"[^\"'\\\r\n{}]+")


def graph_to_json(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Return the graph and its modules as plain data, without the tensors.

    Raises:
        ArtifactError: the graph holds something that is neither plain data nor an operator of torch.
    """
    graph = graph_module.graph
    codegen, persistent = graph._codegen, graph_module.state_dict().keys()
    data: dict[str, Any] = {
        "nodes": [_node_to_json(node) for node in graph.nodes],
        "modules": {
            name: _module_to_json(name, module)
            for name, module in graph_module.named_modules()
            if name and type(module) is not nn.Module
        },
        "buffers": {name: name in persistent for name, _ in graph_module.named_buffers(remove_duplicate=False)},
        "name": type(graph_module).__name__,
    }
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        info = codegen.pytree_info
        assert info.out_spec is not None
        data["pytree"] = {
            "arguments": list(info.orig_args),
            "in": spec_to_json(info.in_spec),
            "out": spec_to_json(info.out_spec),
        }
    return data


def graph_from_json(data: dict[str, Any], tensors: dict[str, Tensor], tied: dict[str, str]) -> fx.GraphModule:
    """Return the GraphModule that :func:`graph_to_json` was called on, in eval mode.

    Args:
        tensors: every parameter and buffer by name.
        tied: for tensors with several names, every further name -> its name in ``tensors``.

    Raises:
        ArtifactError: the data names something that a saved network may not hold.
    """
    _check_names(data, [*tensors, *tied])
    root = nn.Module()
    for name in sorted(data["modules"], key=lambda path: path.count(".")):
        _install(root, name, _module_from_json(name, data["modules"][name]))
    registered: dict[str, Tensor] = {
        name: tensor if name in data["buffers"] else nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    for name, tensor in (*registered.items(), *((name, registered[first]) for name, first in tied.items())):
        owner, _, attribute = name.rpartition(".")
        holder = _holder(root, owner)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(attribute, tensor)
        else:
            holder.register_buffer(attribute, tensor, persistent=data["buffers"][name])
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        target = _target_from_json(entry["op"], entry["target"])
        installed = {"get_attr": tensors.keys() | tied.keys(), "call_module": data["modules"].keys()}
        if target not in installed.get(entry["op"], {target}):
            raise ArtifactError(f"node {entry['name']} names {target}, which the artifact does not hold")
        args, kwargs = (_value_from_json(entry[key], nodes) for key in ("args", "kwargs"))
        if target is getattr and not (len(args) == 2 and args[1] in _ATTRIBUTES):
            raise ArtifactError(f"the graph reads attribute {args[1:]}, which a saved network may not read")
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        nodes[entry["name"]] = node
    if "pytree" in data:
        described = data["pytree"]
        specs = (spec_from_json(described["in"]), spec_from_json(described["out"]))
        graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(described["arguments"], *specs)))
    graph.lint()
    return fx.GraphModule(root, graph, data["name"]).eval()


def _check_names(data: dict[str, Any], tensors: list[str]) -> None:
    """Raise an ArtifactError unless all names are identifiers or paths: fx writes them into code that it compiles."""
    nodes = data["nodes"]
    variables = [data["name"], *data.get("pytree", {}).get("arguments", ())]
    variables += [entry["name"] for entry in nodes]
    variables += [entry["target"] for entry in nodes if entry["op"] == "placeholder"]
    variables += [key for entry in nodes for key, _ in entry["kwargs"]["dict"]]
    for name in variables:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name) or keyword.iskeyword(name):
            raise ArtifactError(f"the graph holds the name {name!r}, which is not an identifier")
    for path in [*data["modules"], *tensors]:
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ArtifactError(f"the graph holds the path {path!r}, which is not a path of a module or tensor")


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_to_json(node),
        "args": _value_to_json(node.args, node.name),
        "kwargs": _value_to_json(node.kwargs, node.name),
    }


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Return every function that a saved graph may call, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for place, functions in torch.overrides.get_overridable_functions().items():
        if isinstance(place, type(torch)):  # a module; methods of Tensor are called by name instead
            for function in functions:
                found[f"{place.__name__}.{function.__name__}"] = function
    found |= {f"operator.{name}": getattr(operator, name) for name in operator.__all__ if name.islower()}
    found |= {f"math.{name}": getattr(math, name) for name in ("sqrt", "floor", "ceil", "prod")}
    for callers in ("attrgetter", "itemgetter", "methodcaller", "call"):
        found.pop(f"operator.{callers}", None)
    factories = ("arange", "zeros", "ones", "full", "linspace", "empty", "eye")  # they take no tensor
    found |= {f"torch.{name}": getattr(torch, name) for name in factories}
    found |= {"getattr": getattr, "torch._assert": torch._assert, "assert_is_none": _assert_is_none, "fields": Fields}
    return {name: function for name, function in found.items() if name.rpartition(".")[2] not in _FORBIDDEN}


def _target_to_json(node: fx.Node) -> Any:
    target = node.target
    if isinstance(target, str):
        _target_from_json(node.op, target)  # raises an error now if it could not be read back
        return target
    if target is getattr and node.args[1] not in _ATTRIBUTES:
        raise ArtifactError(
            f"node {node.name} reads the attribute {node.args[1]}, which a saved network may not read; capture with "
            f"frontend='export', or load the artifact into the model's own class"
        )
    if isinstance(target, type) and dataclasses.is_dataclass(target) and not node.args:
        for name in node.kwargs:
            field_name(name)
        return "fields"  # every dataclass is read back as Fields
    if isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields"):
        named_tuple(target.__name__, target._fields)
        return {"namedtuple": [target.__name__, list(target._fields)]}
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    for name, function in _functions().items():
        if function is target:
            return name
    raise ArtifactError(
        f"node {node.name} calls {getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}, which is no "
        f"operator of torch; the graph alone cannot be saved: capture with frontend='export', or load the artifact "
        f"into the model's own class"
    )


def _target_from_json(op: str, target: Any) -> Any:
    if isinstance(target, dict) and op == "call_function":
        return named_tuple(*target["namedtuple"])
    if not isinstance(target, str):
        raise ArtifactError(f"the graph calls {target!r}, which a saved network may not call")
    if op == "call_method":
        operators = target in _METHODS or hasattr(torch.ops.aten, target)
        if target.startswith("_") or target in _FORBIDDEN or not (operators and hasattr(Tensor, target)):
            raise ArtifactError(f"the graph calls Tensor.{target}, which is not an operator on a tensor")
        return target
    if op != "call_function":
        return target
    if "::" in target:
        namespace, _, rest = target.partition("::")
        name, _, overload = rest.rpartition(".")
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" and name not in _FORBIDDEN else None
        found = getattr(packet, overload, None)
        if not isinstance(found, torch._ops.OpOverload):
            raise ArtifactError(f"the graph calls {target}, which is not an operator of this PyTorch")
        return found
    if target not in _functions():
        raise ArtifactError(
            f"the graph calls {target}, and this is not one of the functions that a saved network may call"
        )
    return _functions()[target]


def _value_to_json(value: Any, where: str) -> Any:
    """Return plain values as they are, and all others as a dictionary with one key that names the kind of value."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case str() | bool() | int() | float() | None:
            return value
        case list():
            return [_value_to_json(entry, where) for entry in value]
        case tuple():
            return {"tuple": [_value_to_json(entry, where) for entry in value]}
        case dict():
            return {"dict": [[_value_to_json(k, where), _value_to_json(v, where)] for k, v in value.items()]}
        case slice():
            return {"slice": [_value_to_json(entry, where) for entry in (value.start, value.stop, value.step)]}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {"torch": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case _ if value is Ellipsis:
            return {"ellipsis": True}
    raise ArtifactError(
        f"{where} holds a {type(value).__name__}, which cannot be saved because it is not plain data. Replace it with plain data, or remove it"
    )


def _value_from_json(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(entry, nodes) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "tuple":
            return tuple(_value_from_json(entry, nodes) for entry in content)
        case "dict":
            return {_value_from_json(k, nodes): _value_from_json(v, nodes) for k, v in content}
        case "slice":
            return slice(*(_value_from_json(entry, nodes) for entry in content))
        case "torch":
            return _of_torch(content)
        case "device":
            return torch.device(content)
        case "ellipsis":
            return Ellipsis
    raise ArtifactError(f"the graph holds a value of an unknown kind {kind!r}")


@functools.cache
def _constants() -> dict[str, Any]:
    """Return torch's dtypes, layouts and memory formats by name."""
    kinds = (torch.dtype, torch.layout, torch.memory_format)
    return {name: value for name, value in vars(torch).items() if isinstance(value, kinds)}


def _of_torch(name: Any) -> Any:
    # not getattr(torch, name), which tries to import a name that it does not find
    if name not in _constants():
        raise ArtifactError(f"the graph holds torch.{name}, which is not a dtype or layout")
    return _constants()[name]


def dtype_from_json(name: Any) -> torch.dtype:
    """Return the dtype that a file names.

    Raises:
        ArtifactError: there is no dtype of this name.
    """
    found = _of_torch(name)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"the graph holds torch.{name}, which is not a dtype")
    return found


@functools.cache
def _module_classes() -> dict[str, type[nn.Module]]:
    """Return the module classes of ``torch.nn`` that are imported with torch, by their full names."""
    files = [value for value in vars(nn.modules).values() if isinstance(value, types.ModuleType)]
    kinds = [kind for file in files for kind in vars(file).values() if isinstance(kind, type)]
    return {
        f"{kind.__module__}.{kind.__qualname__}": kind
        for kind in kinds
        if issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules.")
    }


def _module_to_json(name: str, module: nn.Module) -> dict[str, Any]:
    if _module_classes().get(f"{type(module).__module__}.{type(module).__qualname__}") is not type(module):
        raise ArtifactError(f"module {name} is a {type(module).__qualname__}, which is not a module of torch.nn")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ArtifactError(f"module {name} has forward hooks, which cannot be saved; remove them first")
    attributes = {}
    for key in vars(module).keys() - vars(nn.Module()).keys() - _MADE_OF_WEIGHTS:
        try:
            attributes[key] = _value_to_json(vars(module)[key], f"module {name}")
        except ArtifactError:
            if not key.startswith("_"):  # a private attribute may belong to another package, and is left out
                raise
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "attributes": dict(sorted(attributes.items())),
        "absent": [key for key, value in (module._parameters | module._buffers).items() if value is None],
    }


def _module_from_json(name: str, data: dict[str, Any]) -> nn.Module:
    found = _module_classes().get(data["class"])
    if found is None:
        raise ArtifactError(
            f"module {name} claims class {data['class']}, which is not a module of torch.nn in this PyTorch"
        )
    module: nn.Module = found.__new__(found)
    nn.Module.__init__(module)
    for key, value in data["attributes"].items():
        if key.startswith("__"):
            raise ArtifactError(f"module {name} sets {key}, which is not an attribute that a saved network may set")
        setattr(module, key, _value_from_json(value, {}))
    for key in data["absent"]:
        module.register_parameter(key, None)
    return module


def _holder(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a path; missing modules on the path are created as plain ones."""
    holder = root
    for part in path.split(".") if path else ():
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    return holder


def _install(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    _holder(root, owner).add_module(name, module)
