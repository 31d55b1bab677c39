"""Names: what the initializers of a file are called as parameters of a module.

A name that says where its tensor belongs stays. Exporters give weights that they transposed, and tensors that several
layers came to share, names that say nothing; these are named after the module whose code made the call, where the file tells,
and after the node that reads them otherwise.
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

# A number, by itself or behind a letter or what exporters call any value: 297, onnx::MatMul_123, w_17, _v_15, val_3.
_SAYS_NOTHING = re.compile(
    r"(onnx::|_)*((\w|val|const|constant|tensor|param|initializer|weight|bias|" + "|".join(_ROLES) + r")_?)?\d+",
    re.IGNORECASE,
)


def suggested(stored: str, node: ir.Node, index: int, *, alone: bool) -> str:
    """A name for what a node reads as its input of that index.

    Args:
        stored: its name in the file.
        alone: whether the tensor has no other name as a parameter.
    """
    if alone and "." in stored:
        return stored
    role = _ROLES.get(node.op_type.removeprefix("Fused"), {}).get(index)
    scope = _scope(node) or (str(node.name or "").strip("/") if not alone or _SAYS_NOTHING.fullmatch(stored) else "")
    return f"{scope}.{role or stored.rpartition('/')[2]}" if scope else stored


def _scope(node: ir.Node) -> str:
    """Path of the module whose code made the call; empty where the file does not say."""
    if scopes := node.metadata_props.get(_SCOPES):
        try:
            return str(ast.literal_eval(scopes)[-2])
        except (ValueError, SyntaxError, IndexError, TypeError):
            return ""
    joined: list[str] = []
    for atom in (node.name or "").strip("/").split("/")[:-1]:
        if joined and atom.startswith(f"{joined[-1]}."):  # blocks/blocks.0: a list and its entry
            joined[-1] = atom
        else:
            joined.append(atom)
    return ".".join(joined)


def free_name(name: str, root: nn.Module) -> str:
    """The name, or a little more, as one that a parameter of the module can have: dots are modules, and nothing has it."""
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
        if not isinstance(owner, nn.Module):  # a parameter has the name of a module
            return False
    return not hasattr(owner, last)


def register(root: nn.Module, name: str, tensor: nn.Parameter | object) -> None:
    """Enter a tensor under a dotted name; modules on the way are made."""
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
