"""Choose parameter names for the initializers of an ONNX file.

A name that says where its tensor belongs is kept. Exporters give meaningless names to weights that they transposed and
to tensors that several layers share. Such a tensor is named after the module whose code made the call if the file
records it, and otherwise after the node that reads the tensor.
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir
from torch import nn

_SCOPES = "pkg.torch.onnx.name_scopes"
_ROLES = {
    "MatMul": {0: "weight", 1: "weight"},
    "Gemm": {1: "weight", 2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Add": {0: "bias", 1: "bias"},
    "Gather": {0: "weight"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "RMSNormalization": {1: "weight"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
}

# Names that are a number, by itself or after a letter or a generic word: 297, onnx::MatMul_123, w_17, _v_15, val_3.
_SAYS_NOTHING = re.compile(
    r"(onnx::|_)*((\w|val|const|constant|tensor|param|initializer|weight|bias|" + "|".join(_ROLES) + r")_?)?\d+",
    re.IGNORECASE,
)


def suggested(stored: str, node: ir.Node, index: int, *, alone: bool) -> str:
    """Return a parameter name for the tensor that a node reads as its input number ``index``.

    Args:
        stored: the tensor's name in the file.
        alone: whether the tensor becomes one parameter only.
    """
    if alone and "." in stored:
        return stored
    role = _ROLES.get(node.op_type.removeprefix("Fused"), {}).get(index)
    scope = _scope(node) or (str(node.name or "").strip("/") if not alone or _SAYS_NOTHING.fullmatch(stored) else "")
    return f"{scope}.{role or stored.rpartition('/')[2]}" if scope else stored


def _scope(node: ir.Node) -> str:
    """Return the path of the module whose code made the call, or "" if the file does not record it."""
    if scopes := node.metadata_props.get(_SCOPES):
        try:
            return str(ast.literal_eval(scopes)[-2])
        except (ValueError, SyntaxError, IndexError, TypeError):
            return ""
    joined: list[str] = []
    for atom in (node.name or "").strip("/").split("/")[:-1]:
        if joined and atom.startswith(f"{joined[-1]}."):  # "blocks/blocks.0" names a list and its entry: keep the entry
            joined[-1] = atom
        else:
            joined.append(atom)
    return ".".join(joined)


def free_name(name: str, root: nn.Module) -> str:
    """Return the name in a form that a new parameter of the module can have, with a number added if it is taken.

    Dots separate submodules.
    """
    atoms = [re.sub(r"\W", "_", atom) for atom in name.split(".")]
    atoms = [f"{atom}_" if hasattr(nn.Module(), atom) else atom for atom in atoms if atom] or ["tensor"]
    path, last = ".".join(atoms[:-1]), atoms[-1]
    taken, number = last, 1
    while not _is_free(root, path, taken):
        number += 1
        taken = f"{last}_{number}"
    return f"{path}.{taken}".lstrip(".")


def _is_free(root: nn.Module, path: str, last: str) -> bool:
    owner: object = root
    for atom in path.split(".") if path else ():
        if not hasattr(owner, atom):
            return True
        owner = getattr(owner, atom)
        if not isinstance(owner, nn.Module):  # a parameter already has the name that the submodule would need
            return False
    return not hasattr(owner, last)


def register(root: nn.Module, name: str, tensor: nn.Parameter | object) -> None:
    """Register a tensor under a dotted name, and create the submodules that the name needs."""
    path, _, last = name.rpartition(".")
    owner = root
    for atom in path.split(".") if path else ():
        if not hasattr(owner, atom):
            owner.add_module(atom, nn.Module())
        owner = owner.get_submodule(atom)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)  # type: ignore[arg-type]
