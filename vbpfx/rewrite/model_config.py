"""Correct the configuration of a narrowed Hugging Face model.

A Hugging Face model is built from its ``config``, so what ``save_pretrained`` writes can only be loaded if the
configuration describes the narrowed widths. The right entry is not looked up by name. Instead, entries that hold a
dense width are tried: an entry is right if the class, built anew from the changed configuration, has the shapes of the
narrowed model. One entry cannot describe layers of different widths. This is found by comparing the blocks that the
entry decides, without building anything.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vbpfx.plans.records import BlockPlan, Plan

Shapes = dict[str, tuple[int, ...]]
# The path of a configuration entry, and its new value.
Change = tuple[tuple[str, ...], float]
Changes = tuple[Change, ...]

# The largest number of an entry's values that are tried. The class cannot be built if heads do not divide a width.
_TRIALS = 3


def has_config(model: nn.Module) -> bool:
    """Return whether the model is a Hugging Face model, which its class builds from ``config`` alone."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def describe_widths(model: nn.Module, plan: Plan) -> list[str]:
    """Change ``model.config`` in place so that it describes the narrowed model, as far as its entries allow.

    Every entry that may hold a width is tried once. The shapes that change show which blocks the entry decides, and a
    value is considered further only if it is right for all of these blocks. So the class is built about as often as the
    configuration has such entries, however many layers it describes.

    Some configurations can only give biases to all layers of a block or to none (Llama's ``mlp_bias``). Then layers
    that had no bias get zeros.

    Args:
        model: the narrowed model.
        plan: the plan that it was narrowed by.

    Returns:
        The names of the parameters that the configuration cannot describe. The list is empty if it describes all of
        them.
    """
    wanted, trials = _shapes(model), _Trials(model)
    wrong = _wrong(trials.shapes(()), wanted)
    if wrong is None:  # the class is not built from its configuration alone
        return sorted(_widths_by_axis(plan).keys() & wanted.keys()) or sorted(wanted)
    changes: Changes = ()
    candidates = _candidates(trials, plan) if wrong else []
    while wrong:
        further = [(*changes, one) for one in candidates if one[0] not in dict(changes)]
        tried = [(_wrong(trials.shapes(more), wanted), more) for more in further]
        better = [(left, more) for left, more in tried if left is not None and len(left) < len(wrong)]
        if not better:
            return sorted(wrong)
        wrong, changes = min(better, key=lambda entry: len(entry[0]))
    config = model.config = trials.config(changes)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = _within(config, type(module.config)) or module.config
    _add_zero_biases(model, trials.shapes(changes) or {})
    return []


class _Trials:
    """Builds the class from changed configurations, each once, and returns the shapes of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._class, self.dense = type(model), model.config
        self._built: dict[Changes, Shapes | None] = {}

    def config(self, changes: Changes) -> Any:
        """Return a copy of the configuration with these changes, leaving out those that it rejects."""
        changed = copy.deepcopy(self.dense)
        for path, value in changes:
            owner = changed
            for name in path[:-1]:
                owner = getattr(owner, name)
            with contextlib.suppress(Exception):  # a configuration checks its entries, and may raise any exception
                setattr(owner, path[-1], value)
        return changed

    def shapes(self, changes: Changes) -> Shapes | None:
        """Return the shapes of all parameters and buffers, or None if the class cannot be built with these changes."""
        if changes not in self._built:
            try:
                with torch.device("meta"):
                    self._built[changes] = _shapes(self._class(self.config(changes)))
            except Exception:  # for an impossible configuration the class may raise any exception
                self._built[changes] = None
        return self._built[changes]


def _candidates(trials: _Trials, plan: Plan) -> list[Change]:
    """Return changes of single entries that may be right for all blocks whose shapes the entry decides."""
    pairs = dict.fromkeys(_widths(entry) for entry in plan.blocks)
    by_axis, dense = _widths_by_axis(plan), trials.shapes(())
    assert dense is not None
    found = []
    for path, value in _entries(trials.dense):
        possible: dict[float, tuple[int, int]] = {}  # new value of the entry -> a width before and after
        for pair in pairs:
            changed = _changed(path[-1], value, *pair)
            if changed is not None:
                possible.setdefault(changed, pair)
        trying = (trials.shapes(((path, changed),)) for changed in itertools.islice(possible, _TRIALS))
        built = next((shapes for shapes in trying if shapes is not None), None)
        if built is None or any(not name.endswith("bias") for name in built.keys() ^ dense.keys()):
            continue  # the built class has other parameters than the model
        touched = [
            by_axis[name][axis]
            for name in built.keys() & dense.keys() & by_axis.keys()
            for axis, (old, new) in enumerate(zip(dense[name], built[name], strict=False))
            if old != new and axis in by_axis[name]
        ]
        flag = isinstance(value, bool)
        if not touched and not (flag and built.keys() != dense.keys()):
            continue
        found += [
            (path, changed)
            for changed, pair in possible.items()
            if flag or all(any(_agree(pair, other) for other in widths) for widths in touched)
        ]
    return found


def _changed(name: str, value: Any, before: int, after: int) -> float | None:
    """Return the new value of an entry if it stands for a width that changes from ``before`` to ``after``.

    Return None if the entry cannot stand for this width.
    """
    if isinstance(value, bool):
        return True if "bias" in name and not value else None
    if value == before or (value is None and name.startswith("n_")):
        return after
    if isinstance(value, float) and value > 1:
        # a ratio: the class multiplies it with another width and rounds down; the half makes the result exactly ``after``
        return value * (after + 0.5) / before
    if isinstance(value, int) and value * after % before == 0:
        return value * after // before
    return None


def _agree(pair: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether one entry may describe both changes of a width, given as (before, after).

    It may if both keep the same share of the width, up to a rounding by one.
    """
    (before, after), (width, kept) = pair, other
    return abs(width * after - kept * before) <= (0 if width == before else before)


def _widths_by_axis(plan: Plan) -> dict[str, dict[int, set[tuple[int, int]]]]:
    """Return parameter -> axis -> the widths, before and after, of the blocks on that axis."""
    found: dict[str, dict[int, set[tuple[int, int]]]] = {}
    for entry in plan.blocks:
        for parameter in entry.block.parameters:
            widths = found.setdefault(parameter.name, {}).setdefault(parameter.axis, set())
            widths.add(_widths(entry))
    return found


def _widths(entry: BlockPlan) -> tuple[int, int]:
    """Return the width of a block before and after; that of one expert if the block is a stack."""
    experts = entry.block.groups if entry.block.has_experts else 1
    return entry.block.width // experts, entry.width // experts


def _entries(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every number in a configuration and in nested configurations."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _entries(value, (*path, name))
        elif not name.startswith("_") and (value is None or isinstance(value, (bool, int, float))):
            yield (*path, name), value


def _wrong(built: Shapes | None, wanted: Shapes) -> set[str] | None:
    """Return the names of parameters that have another shape or are missing on one side.

    Return None if the class could not be built.
    """
    if built is None:
        return None
    missing = {name for name in built.keys() - wanted.keys() if not name.endswith("bias")}
    return {name for name, shape in wanted.items() if built.get(name) != shape} | missing


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _within(config: Any, kind: type) -> Any:
    """Return the configuration of the given class: this one, or one nested in it. None if there is none."""
    if type(config) is kind:
        return config
    inner = (value for value in vars(config).values() if hasattr(value, "to_dict"))
    return next((found for found in (_within(value, kind) for value in inner) if found is not None), None)


def _add_zero_biases(model: nn.Module, built: Shapes) -> None:
    for name in built.keys() - _shapes(model).keys():
        owner, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(owner)
        layer.register_parameter(attribute, nn.Parameter(layer.weight.new_zeros(built[name])))
