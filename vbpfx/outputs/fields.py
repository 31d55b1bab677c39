"""The tensors of a network's result, each with its name; and ``Fields``, named results that replace a model's dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import tensors_in


class Fields(Mapping[str, Any]):
    """Named values in order: ``result.logits``, ``result["logits"]`` and ``result[0]`` are the same.

    It replaces a dataclass result, such as the ``ModelOutput`` of transformers, wherever that class may be missing or
    unknown: in saved networks, and in graphs for exporters. As in transformers, a field without a value is None as an
    attribute. Iteration, indices and :func:`torch.utils._pytree.tree_flatten` skip it.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getitem__(self, key: Any) -> Any:
        present = _present(self)
        return present[key] if isinstance(key, str) else tuple(present.values())[key]

    def __iter__(self) -> Iterator[str]:
        return iter(_present(self))

    def __len__(self) -> int:
        return len(_present(self))

    def __repr__(self) -> str:
        return f"Fields({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _present(fields: Fields) -> dict[str, Any]:
    return {name: value for name, value in vars(fields).items() if value is not None}


def _flatten(fields: Fields) -> tuple[list[Any], Any]:
    context = [(name, value is not None) for name, value in vars(fields).items()]
    return list(_present(fields).values()), tuple(context)


def _flatten_with_keys(fields: Fields) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flatten(fields)
    names = [name for name, there in context if there]
    return [(pytree.GetAttrKey(name), value) for name, value in zip(names, values, strict=True)], context


def _unflatten(values: Iterable[Any], context: Any) -> Fields:
    left = iter(values)
    return Fields(**{name: next(left) if there else None for name, there in context})


pytree.register_pytree_node(
    Fields, _flatten, _unflatten, serialized_type_name="vbpfx.Fields", flatten_with_keys_fn=_flatten_with_keys
)


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass, which PyTorch's pytrees treat as a leaf."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def without_classes(value: Any) -> Any:
    """Return the value with dataclass instances replaced by :class:`Fields`, which PyTorch's pytrees can flatten."""

    def neutral(leaf: Any) -> Any:
        if not is_record(leaf):
            return leaf
        return Fields(**{entry.name: without_classes(getattr(leaf, entry.name)) for entry in dataclasses.fields(leaf)})

    return pytree.tree_map(neutral, value)


def result_paths(output: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Return the tensors of a network's result in order, each with its path of keys, field names and indices."""
    try:
        found = pytree.tree_flatten_with_path(without_classes(output))[0]
    except ValueError:  # a container that does not name its entries
        return [((place,), tensor) for place, tensor in enumerate(tensors_in(output))]
    return [(tuple(map(_step, path)), leaf) for path, leaf in found if isinstance(leaf, Tensor)]


def _step(key: Any) -> Any:
    match key:
        case pytree.MappingKey():
            return str(key.key)
        case pytree.GetAttrKey():
            return key.name
    return getattr(key, "idx", str(key))


def path_name(path: tuple[Any, ...]) -> str:
    """Return a tensor's path as one word, such as ``boxes.low`` or ``hidden_states.0``."""
    return ".".join(map(str, path))
