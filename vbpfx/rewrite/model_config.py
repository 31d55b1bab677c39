"""The configuration of a narrowed model, made true again.

A model of Hugging Face is built from its ``config``: what is saved with ``save_pretrained`` loads only where the
configuration describes the narrowed widths. Which entry does is not looked up by name: entries that hold a dense width
are tried, and an entry is right if the class, built anew from the configuration, then has the shapes of the narrowed
model. One number cannot say that layers have different widths: this is seen by comparing the blocks that an entry decides,
without building anything.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vbpfx.plans.records import Plan

Shapes = dict[str, tuple[int, ...]]
# An entry of a configuration, by its path, and what it becomes.
Change = tuple[tuple[str, ...], float]
Changes = tuple[Change, ...]

# So many values of an entry are tried where the class cannot be built with the first ones (widths that heads do not divide).
_TRIALS = 3


def has_config(model: nn.Module) -> bool:
    """Whether the model is one that its class builds from ``config`` alone."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def describe_widths(model: nn.Module, plan: Plan) -> list[str]:
    """Make ``model.config`` describe the narrowed model, in place, as far as its entries can.

    Every entry that may hold a width is tried once. What it changed says which blocks it is of, and only a value that is
    right for all of these is looked at further. So the class is built about as often as the configuration has such entries,
    however many layers it describes.

    Where the configuration only knows biases on all layers of a block or on none (Llama's ``mlp_bias``), the layers
    that had none get zeros.

    Args:
        model: the narrowed model.
        plan: what narrowed it.

    Returns:
        Names of the parameters that the configuration cannot describe; none of them where it is true.
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
    """What the class has for shapes when it is built from its configuration with some entries changed; each is built once."""

    def __init__(self, model: nn.Module) -> None:
        self._class, self.dense = type(model), model.config
        self._built: dict[Changes, Shapes | None] = {}

    def config(self, changes: Changes) -> Any:
        """The configuration with these changes, those that it takes."""
        changed = copy.deepcopy(self.dense)
        for path, value in changes:
            owner = changed
            for name in path[:-1]:
                owner = getattr(owner, name)
            with contextlib.suppress(Exception):  # configurations check their entries' types and raise what they like
                setattr(owner, path[-1], value)
        return changed

    def shapes(self, changes: Changes) -> Shapes | None:
        """Of all parameters and buffers; None where the class cannot be built so."""
        if changes not in self._built:
            try:
                with torch.device("meta"):
                    self._built[changes] = _shapes(self._class(self.config(changes)))
            except Exception:  # an impossible configuration raises whatever the class raises
                self._built[changes] = None
        return self._built[changes]


def _candidates(trials: _Trials, plan: Plan) -> list[Change]:
    """Changes of one entry each that may be right for all blocks whose shapes the entry decides."""
    pairs = dict.fromkeys((entry.block.width, len(entry.kept)) for entry in plan.blocks)
    by_axis, dense = _widths_by_axis(plan), trials.shapes(())
    assert dense is not None
    found = []
    for path, value in _entries(trials.dense):
        possible: dict[float, tuple[int, int]] = {}  # what the entry may become -> before and after of a width
        for pair in pairs:
            changed = _changed(path[-1], value, *pair)
            if changed is not None:
                possible.setdefault(changed, pair)
        trying = (trials.shapes(((path, changed),)) for changed in itertools.islice(possible, _TRIALS))
        built = next((shapes for shapes in trying if shapes is not None), None)
        if built is None or any(not name.endswith("bias") for name in built.keys() ^ dense.keys()):
            continue  # other parameters than the model has
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
    """What an entry becomes if it says a width that was ``before`` and is ``after``; None where it cannot say that."""
    if isinstance(value, bool):
        return True if "bias" in name and not value else None
    if value == before or (value is None and name.startswith("n_")):
        return after
    if isinstance(value, float) and value > 1:
        # a ratio to some other width, of which the class takes the integer part
        return value * (after + 0.5) / before
    if isinstance(value, int) and value * after % before == 0:
        return value * after // before
    return None


def _agree(pair: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one number may describe both changes of a width, (before, after): the same share of it, up to rounding by one."""
    (before, after), (width, kept) = pair, other
    return abs(width * after - kept * before) <= (0 if width == before else before)


def _widths_by_axis(plan: Plan) -> dict[str, dict[int, set[tuple[int, int]]]]:
    """Parameter -> axis -> the widths before and after of the blocks that lie on it."""
    found: dict[str, dict[int, set[tuple[int, int]]]] = {}
    for entry in plan.blocks:
        for parameter in entry.block.parameters:
            widths = found.setdefault(parameter.name, {}).setdefault(parameter.axis, set())
            widths.add((entry.block.width, len(entry.kept)))
    return found


def _entries(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number of a configuration and of those inside it, with its path."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _entries(value, (*path, name))
        elif not name.startswith("_") and (value is None or isinstance(value, (bool, int, float))):
            yield (*path, name), value


def _wrong(built: Shapes | None, wanted: Shapes) -> set[str] | None:
    """Parameters whose shape is another, or that the class does not have; None where the class cannot be built."""
    if built is None:
        return None
    missing = {name for name in built.keys() - wanted.keys() if not name.endswith("bias")}
    return {name for name, shape in wanted.items() if built.get(name) != shape} | missing


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
