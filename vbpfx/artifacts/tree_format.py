"""Write the structure of a network's arguments and results as JSON, and read it back safely.

PyTorch's tree specifications describe how tensors are nested in tuples, lists and dictionaries. PyTorch's own reader
imports names that it finds in the text. The format here names nothing to import: a leaf is ``"leaf"``, and everything
else is a dictionary with one key.

    {"tuple": [...]}   {"list": [...]}   {"dict": [[key, ...], ...]}   {"ordered": [[key, ...], ...]}
    {"fields": [[name, ... or null], ...]}        named fields: a dataclass, such as the results of transformers
    {"namedtuple": [name, [[field, ...], ...]]}   a named tuple
    {"returned": [name, [...]]}                   the result of a torch operator, such as ``torch.return_types.max``

A dataclass is read back as :class:`vbpfx.outputs.fields.Fields`, and a named tuple as a new class with the same name and
fields.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import keyword
from collections import OrderedDict, namedtuple
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vbpfx.errors import ArtifactError
from vbpfx.outputs.fields import Fields, is_record

_LEAF = "leaf"
_MAPPINGS: dict[str, type] = {"dict": dict, "ordered": OrderedDict}
_SEQUENCES: dict[str, type] = {"tuple": tuple, "list": list}


@functools.cache
def _returned() -> dict[str, type]:
    """Return the classes of named results of torch's operators, by name."""
    return {kind.__name__: kind for kind in torch.return_types.all_return_types}


def spec_to_json(spec: pytree.TreeSpec) -> Any:
    """Return a tree specification as plain data.

    Raises:
        ArtifactError: the specification holds a container that this format cannot describe.
    """
    leaves = [torch.empty(0) for _ in range(spec.num_leaves)]
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    met: list[int] = []

    def described(value: Any) -> Any:
        if id(value) in places:
            met.append(places[id(value)])
            return _LEAF
        kind = type(value)
        for name, plain in _SEQUENCES.items():
            if kind is plain:
                return {name: [described(entry) for entry in value]}
        for name, plain in _MAPPINGS.items():
            if kind is plain and all(type(key) in (str, int) for key in value):
                return {name: [[key, described(entry)] for key, entry in value.items()]}
        if _returned().get(kind.__name__) is kind:
            return {"returned": [kind.__name__, [described(entry) for entry in value]]}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {
                "namedtuple": [kind.__name__, [[n, described(v)] for n, v in zip(value._fields, value, strict=True)]]
            }
        if isinstance(value, Fields) or is_record(value):
            names = (
                list(vars(value)) if isinstance(value, Fields) else [field.name for field in dataclasses.fields(value)]
            )
            entries = {name: getattr(value, name) for name in names}
            return {"fields": [[n, None if entry is None else described(entry)] for n, entry in entries.items()]}
        raise ArtifactError(_indescribable(kind))

    data = described(pytree.tree_unflatten(leaves, spec))
    if met != list(range(len(leaves))):  # a class keeps tensors somewhere else than in its fields
        raise ArtifactError(_indescribable(spec.type))
    spec_from_json(data)  # raises an error now if it could not be read back
    return data


def _indescribable(kind: type) -> str:
    return (
        f"an argument or the result of the network is a {kind.__module__}.{kind.__qualname__}, which a file cannot describe: let "
        f"forward take and return tensors in tuples, lists, dictionaries, named tuples or dataclasses, or load the artifact "
        f"into the model's own class"
    )


def spec_from_json(data: Any) -> pytree.TreeSpec:
    """Return the tree specification that :func:`spec_to_json` was called on.

    Names in the data are looked up only in fixed lists, and never imported.

    Raises:
        ArtifactError: the data does not describe a structure of the containers in this format.
    """
    if isinstance(data, str) and data != _LEAF:
        data = _of_old_text(data)
    return pytree.tree_structure(_example(data))


def _example(data: Any) -> Any:
    """Return a value of the described structure whose leaves are zeros."""
    if data == _LEAF:
        return 0
    match data:
        case {"tuple": list(entries)}:
            return tuple(map(_example, entries))
        case {"list": list(entries)}:
            return list(map(_example, entries))
        case {"dict": list(entries)}:
            return {_key(key): _example(value) for key, value in entries}
        case {"ordered": list(entries)}:
            return OrderedDict((_key(key), _example(value)) for key, value in entries)
        case {"fields": list(entries)}:
            return Fields(**{field_name(n): None if value is None else _example(value) for n, value in entries})
        case {"namedtuple": [name, list(entries)]}:
            return named_tuple(name, [n for n, _ in entries])(*(_example(value) for _, value in entries))
        case {"returned": [name, list(entries)]} if name in _returned():
            return _returned()[name](map(_example, entries))
    raise ArtifactError(
        f"the graph's arguments or results are described as {str(data)[:80]}, which is not a structure of tuples, lists, dictionaries and "
        f"named fields; save the network again"
    )


def _key(key: Any) -> str | int:
    if type(key) in (str, int):
        found: str | int = key
        return found
    raise ArtifactError(
        f"the graph's arguments or results hold a dictionary with the key {key!r}, which is not text or number"
    )


def field_name(name: Any) -> str:
    """Return the name if it is allowed for a field.

    Raises:
        ArtifactError: the name is not an identifier, or begins with an underscore.
    """
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_"):
        return name
    raise ArtifactError(
        f"the graph holds the field {name!r}: names of fields are identifiers that do not begin with an underscore"
    )


def named_tuple(name: Any, fields: Sequence[Any]) -> type[tuple[Any, ...]]:
    """Return a new named tuple class.

    Raises:
        ArtifactError: a name is not allowed, or there are two fields of the same name.
    """
    names = [field_name(field) for field in fields]
    if len(set(names)) < len(names):
        raise ArtifactError(f"the graph holds a named tuple with two fields of the same name: {', '.join(names)}")
    made: type[tuple[Any, ...]] = namedtuple(field_name(name), names)  # type: ignore[misc]
    return made


_OLD_SEQUENCES = {"builtins.tuple": "tuple", "builtins.list": "list"}
_OLD_MAPPINGS = {"builtins.dict": "dict", "collections.OrderedDict": "ordered"}


def _of_old_text(text: str) -> Any:
    """Return this format's data from a text in PyTorch's own format, which earlier versions wrote.

    Only tuples, lists and dictionaries are accepted.
    """
    version, tree = json.loads(text)
    if version != 1:
        raise ArtifactError(
            f"the saved network describes the arguments of its graph in format {version!r}, and only format 1 can be read here. Save the network again"
        )
    return _translated(tree)


def _translated(tree: Any) -> Any:
    kind, entries = tree["type"], [_translated(child) for child in tree["children_spec"]]
    if kind is None and not entries:
        return _LEAF
    if kind in _OLD_SEQUENCES:
        return {_OLD_SEQUENCES[kind]: entries}
    if kind in _OLD_MAPPINGS:
        keys = json.loads(tree["context"])
        return {_OLD_MAPPINGS[kind]: [[key, value] for key, value in zip(keys, entries, strict=True)]}
    raise ArtifactError(
        f"the graph's arguments or results hold a {kind}, which an earlier version of vbpfx wrote down by its name; names in files are no "
        f"longer looked up: prune and save the network again, or pass into= a model of the pruned class"
    )
