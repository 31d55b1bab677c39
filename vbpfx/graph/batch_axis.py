"""Find the batch axis of every input by running the model, instead of assuming it.

A hypothesis names an axis for each tensor. It is tested with two runs: one on three samples along these axes, and one
on two of them in another order. If the axes hold samples, the outputs have three and two entries along some axis, and a
sample's values are the same in both. The second run both leaves samples out and changes their order. So time is not
mistaken for the batch in a causal network, which only looks back, nor in a network that ignores the order of its
inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, Place
from vbpfx.display.quiet import quiet_python
from vbpfx.graph.frontends import unfused_attention
from vbpfx.graph.precision import full_float32
from vbpfx.graph.run import outputs_of
from vbpfx.outputs.differences import relative_error, tolerance_of

# The number of samples in a run, and the most hypotheses that are tried about one axis, and in total.
_SAMPLES, _MOST_PER_AXIS, _MOST = 3, 6, 12


class _Follows(IntEnum):
    """How an output depends on the samples, from the weakest to the strongest evidence for a batch axis."""

    NOT = 0
    IN_SIZE = 1  # the size follows, the values differ: samples influence one another
    IN_PART = 2  # one output follows exactly, and another is a value of the whole batch, such as a mean
    EXACTLY = 3


def find_batch_axes(
    model: nn.Module, inputs: Inputs, likely: Sequence[Mapping[Place, int | None]] | None = None
) -> Inputs:
    """Return the inputs with the batch axis of every tensor (:attr:`vbpfx.data.inputs.Inputs.axes`).

    The first axis of the tensors is tried first, so it is chosen for a network that treats all axes alike. Then come
    the second axis, and combinations of axes with the same length. If no axis holds independent samples, the first axis
    is taken if sizes follow it in every input and output. Such samples are coupled, for example by a norm over the
    batch or by random numbers (:attr:`vbpfx.data.inputs.Inputs.coupled`). Otherwise there is no batch axis: the nodes
    of a graph are not samples.

    Args:
        model: a copy that may be run, since a run may change it. On the meta device only sizes are compared.
        inputs: a batch on the model's device. If the model does not run on it, the inputs are returned unchanged.
        likely: possible axes, the most likely first. By default they are guessed from the sizes.
    """
    if inputs.axes is not None or inputs.is_empty or not inputs.tensors:
        return inputs
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    given = inputs.map(lambda t: t.to("meta")) if on_meta else inputs
    with torch.random.fork_rng(_cuda_devices(inputs)), quiet_python(), unfused_attention(), full_float32():
        found: dict[_Follows, Inputs] = {}
        for axes in itertools.islice(hypotheses(given) if likely is None else likely, _MOST):
            follows = _test(model, replace(given, axes=axes))
            stated = likely is not None or _is_first_axis_of_all(given, axes)
            if follows is _Follows.IN_SIZE and not on_meta and not stated:
                continue
            found.setdefault(follows, replace(inputs, axes=axes, coupled=follows is _Follows.IN_SIZE and not on_meta))
            if follows is _Follows.EXACTLY:
                break
        found.pop(_Follows.NOT, None)
        if found:
            return found[max(found)]
        try:
            outputs_of(model, given)
        except Exception:  # the model may raise any exception
            return inputs
    return replace(inputs, axes=dict.fromkeys(inputs.placed))


def hypotheses(inputs: Inputs) -> Iterator[dict[Place, int | None]]:
    """Yield possible batch axes for all tensors, the most likely first."""
    shapes = {place: t.shape for place, t in inputs.placed.items() if t.ndim and t.layout is torch.strided}
    seen: list[dict[Place, int | None]] = []
    for anchor, shape in shapes.items():
        for axis in range(min(2, len(shape))):

            def choices(place: Place, anchor: Place = anchor, axis: int = axis) -> list[int | None]:
                if place == anchor:
                    return [axis]
                alike = [dim for dim, size in enumerate(shapes[place]) if size == shapes[anchor][axis]]
                return [*sorted(alike, key=lambda dim: dim != axis), None]

            for chosen in itertools.islice(itertools.product(*map(choices, shapes)), _MOST_PER_AXIS):
                axes = dict.fromkeys(inputs.placed) | dict(zip(shapes, chosen, strict=True))
                if axes not in seen:
                    seen.append(axes)
                    yield axes


def _is_first_axis_of_all(inputs: Inputs, axes: Mapping[Place, int | None]) -> bool:
    return all(axes[place] == 0 for place, tensor in inputs.placed.items() if tensor.ndim)


def _test(model: nn.Module, inputs: Inputs) -> _Follows:
    """Return how the model's outputs depend on the samples along the axes of the inputs."""
    size = inputs.batch_size
    assert size
    count = min(size, _SAMPLES)
    others = [0, 0] if count == 1 else [1, 0, 1] if count == 2 else [count - 1, 0]
    few = inputs.first(count)
    try:
        base, other = outputs_of(model, few), outputs_of(model, few.select(others))
    except Exception:  # the model may raise any exception
        return _Follows.NOT
    if len(base) != len(other):
        return _Follows.NOT
    found = [_follows(a, b, count, others) for a, b in zip(base, other, strict=True)]
    sizes = [f for f in found if f is not None]
    if not sizes or any(f is _Follows.NOT for f in sizes):
        return _Follows.NOT
    return min(sizes) if _Follows.EXACTLY in sizes or _Follows.IN_SIZE in sizes else _Follows.NOT


def _follows(base: Tensor, other: Tensor, count: int, others: Sequence[int]) -> _Follows | None:
    """Return how one output depends on the samples; None if it is the same in both runs.

    ``base`` is the output for ``count`` samples, ``other`` the output for those of them with the indices ``others``.
    """
    if base.ndim != other.ndim:
        return _Follows.NOT
    changed = [dim for dim in range(base.ndim) if base.shape[dim] != other.shape[dim]]
    if not changed:
        return None if _same(base, other) else _Follows.IN_PART
    index = torch.tensor(others, device=base.device)
    expected = [base]
    for dim in changed:
        factor, rest = divmod(base.shape[dim], count)
        if rest or other.shape[dim] != factor * len(others):
            return _Follows.NOT
        # the batch axis may be merged with another axis, before or behind it
        shapes = (((count, factor), 0), ((factor, count), 1))
        expected = [
            torch.unflatten(part, dim, shape).index_select(dim + place, index).flatten(dim, dim + 1)
            for part in expected
            for shape, place in shapes
        ]
    return _Follows.EXACTLY if any(_same(part, other) for part in expected) else _Follows.IN_SIZE


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether values of the same shape are equal up to rounding; on the meta device they always are."""
    if one.is_meta or not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return relative_error([other], [one], both_nan=True) <= tolerance_of([one.dtype])


def _cuda_devices(inputs: Inputs) -> list[Any]:
    return list({t.device for t in inputs.tensors if t.is_cuda})
