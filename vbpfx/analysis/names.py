"""Names: the names of parameters in the model's state dict, and the modules whose code makes a call."""

from __future__ import annotations

from collections import defaultdict

from torch import fx, nn

from vbpfx.graph.capture import named_tensors
from vbpfx.rules.axes import Names


def is_layer(node: fx.Node, weight: str) -> bool:
    """Return whether a call is a layer of torch.nn: a call of the module, or one that export traced inside it."""
    if node.op == "call_module":
        return True
    path, layer = enclosing_module(node)
    return layer.startswith("torch.nn.modules.") and path == weight.rpartition(".")[0]


def enclosing_module(node: fx.Node) -> tuple[str, str]:
    """Return the path and the class of the innermost module whose code made the call; empty strings if unknown."""
    if node.op == "call_module":
        return str(node.target), ""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    path, layer = stack[-1]
    name = layer if isinstance(layer, str) else f"{layer.__module__}.{layer.__qualname__}"
    return path.removeprefix("L['self'].").removeprefix("L['self']"), name


def parameter_names(graph_module: fx.GraphModule, reference: nn.Module) -> tuple[Names, dict[str, list[str]]]:
    """Return the names of the graph's parameters in the model's state dict, and the tensors with several names."""
    all_names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(reference).items():
        all_names[id(tensor)].append(name)
    of_attribute: dict[str, str] = {}
    of_module: dict[str, dict[str, str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            of_module[str(node.target)] = {key: all_names[id(t)][0] for key, t in own if id(t) in all_names}
        elif node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            value = getattr(graph_module.get_submodule(owner), attribute, None)
            if id(value) in all_names:
                of_attribute[str(node.target)] = all_names[id(value)][0]
    return Names(of_attribute, of_module), {
        names[0]: names for names in all_names.values() if len({_place(reference, name) for name in names}) > 1
    }


def _place(model: nn.Module, name: str) -> tuple[int, str]:
    """Return the module and the attribute of a parameter, equal for two names that are only two paths to one module."""
    owner, _, attribute = name.rpartition(".")
    return id(model.get_submodule(owner)), attribute
