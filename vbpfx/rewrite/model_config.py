"""The configuration of a narrowed model, made true again.

A model of Hugging Face is built from its ``config``: what is saved with ``save_pretrained`` loads only where the
configuration describes the narrowed widths. Which entry does is not looked up by name: entries that hold a dense width
are tried, and an entry is right if the class, built anew from the configuration, then has the shapes of the narrowed
model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vbpfx.records import Plan

Shapes = dict[str, tuple[int, ...]]


def has_config(model: nn.Module) -> bool:
    """Whether the model is one that its class builds from ``config`` alone."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def describe_widths(model: nn.Module, plan: Plan) -> list[str]:
    """Make ``model.config`` describe the narrowed model, in place, as far as its entries can.

    Where the configuration only knows biases on all layers of a block or on none (Llama's ``mlp_bias``), the layers
    that had none get zeros.

    Args:
        model: the narrowed model.
        plan: what narrowed it.

    Returns:
        Names of the parameters that the configuration cannot describe; none of them where it is true.
    """
    widths = {(entry.block.width, len(entry.kept)) for entry in plan.blocks}
    wanted = _shapes(model)
    config = model.config
    wrong = _wrong(model, config, wanted)
    while wrong:
        tried = [(_wrong(model, changed, wanted), changed) for changed in _changes(config, widths)]
        better = [(left, changed) for left, changed in tried if left is not None and len(left) < len(wrong)]
        if not better:
            break
        wrong, config = min(better, key=lambda entry: len(entry[0]))
    if wrong:
        return sorted(wrong)
    model.config = config
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = _within(config, type(module.config)) or module.config
    _add_zero_biases(model, _built_shapes(model, config))
    return []


def _changes(config: Any, widths: set[tuple[int, int]]) -> Iterator[Any]:
    """The configuration with one entry changed, for every entry that may hold a dense width."""
    for path, value in _entries(config):
        for before, after in widths:
            if isinstance(value, bool):
                if "bias" in path[-1] and not value:
                    yield _with(config, path, True)
            elif value == before or (value is None and path[-1].startswith("n_")):
                yield _with(config, path, after)
            elif isinstance(value, float) and value > 1:
                # a ratio to some other width, of which the class takes the integer part
                yield _with(config, path, value * (after + 0.5) / before)
            elif isinstance(value, int) and value * after % before == 0:
                yield _with(config, path, value * after // before)


def _entries(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number of a configuration and of those inside it, with its path."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _entries(value, (*path, name))
        elif not name.startswith("_") and (value is None or isinstance(value, (bool, int, float))):
            yield (*path, name), value


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    changed = copy.deepcopy(config)
    owner = changed
    for name in path[:-1]:
        owner = getattr(owner, name)
    try:
        setattr(owner, path[-1], value)
    except Exception:  # configurations check their entries' types and raise what they like
        return config
    return changed


def _wrong(model: nn.Module, config: Any, wanted: Shapes) -> set[str] | None:
    """Parameters whose shape is another, or that the class does not have; None where the class cannot be built."""
    try:
        built = _built_shapes(model, config)
    except Exception:  # an impossible configuration raises whatever the class raises
        return None
    missing = {name for name in built.keys() - wanted.keys() if not name.endswith("bias")}
    return {name for name, shape in wanted.items() if built.get(name) != shape} | missing


def _built_shapes(model: nn.Module, config: Any) -> Shapes:
    with torch.device("meta"):
        return _shapes(type(model)(copy.deepcopy(config)))


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _within(config: Any, kind: type) -> Any:
    """The configuration of that class: this one, or one inside it."""
    if type(config) is kind:
        return config
    inner = (value for value in vars(config).values() if hasattr(value, "to_dict"))
    return next((found for found in (_within(value, kind) for value in inner) if found is not None), None)


def _add_zero_biases(model: nn.Module, built: Shapes) -> None:
    for name in built.keys() - _shapes(model).keys():
        owner, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(owner)
        layer.register_parameter(attribute, nn.Parameter(layer.weight.new_zeros(built[name])))
