"""Which axis of every input is the batch: found by running the model, not assumed.

A hypothesis names an axis for each tensor. It is tested by three samples along these axes, and by two of them in another
order: where the axes hold samples, the output has three and two entries along some axis, and a sample's values are the same in
both. One run leaves samples out and changes their order, so that time is not taken for the batch by a network that only looks
back, nor by one to which the order of its inputs is all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, Place, tensors_in
from vbpfx.graph.frontends import unfused_attention, unheard
from vbpfx.graph.precision import full_float32
from vbpfx.outputs.differences import relative_error, tolerance_of

# So many samples are run, and of more hypotheses about one axis, or in all, no more are tried.
_SAMPLES, _MOST_PER_AXIS, _MOST = 3, 6, 12


class _Follows(IntEnum):
    """How an output follows the samples, from the least to the most."""

    NOT = 0
    IN_SIZE = 1  # other values: samples influence one another
    IN_PART = 2  # exactly, and beside it stands a mean over the batch
    EXACTLY = 3


def find_batch_axes(
    model: nn.Module, inputs: Inputs, likely: Sequence[Mapping[Place, int | None]] | None = None
) -> Inputs:
    """The inputs with the axis of every tensor that holds the samples (:attr:`vbpfx.data.inputs.Inputs.axes`).

    The first axis is tried first, so that a network that treats all entries alike has its batch there; then the second; then
    every tensor's own axis of the same length. Where no axis holds samples that are independent of one another, the first
    is taken if sizes follow it in every input and output (:attr:`vbpfx.data.inputs.Inputs.coupled`: a norm over the batch,
    random numbers), and none otherwise: the nodes of a graph are not samples.

    Args:
        model: a copy that may be run: whatever it writes to stays written. On the meta device sizes alone are compared.
        inputs: a batch on the model's device. A model that does not run on it has its batch where nobody has looked.
        likely: the axes that come into question, the likeliest first; by default what the sizes suggest.
    """
    if inputs.axes is not None or inputs.is_empty or not inputs.tensors:
        return inputs
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    given = inputs.map(lambda t: t.to("meta")) if on_meta else inputs
    with torch.random.fork_rng(_cuda_devices(inputs)), unheard(), unfused_attention(), full_float32():
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
            _run(model, given)
        except Exception:  # the model's own operators raise whatever they raise
            return inputs
    return replace(inputs, axes=dict.fromkeys(inputs.placed))


def hypotheses(inputs: Inputs) -> Iterator[dict[Place, int | None]]:
    """Axes for all tensors, the likeliest first."""
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
    """How the model's output follows the samples along the axes."""
    size = inputs.batch_size
    assert size
    count = min(size, _SAMPLES)
    others = [0, 0] if count == 1 else [1, 0, 1] if count == 2 else [count - 1, 0]
    few = inputs.first(count)
    try:
        base, other = _run(model, few), _run(model, few.select(others))
    except Exception:  # likewise
        return _Follows.NOT
    if len(base) != len(other):
        return _Follows.NOT
    found = [_follows(a, b, count, others) for a, b in zip(base, other, strict=True)]
    sizes = [f for f in found if f is not None]
    if not sizes or any(f is _Follows.NOT for f in sizes):
        return _Follows.NOT
    return min(sizes) if _Follows.EXACTLY in sizes or _Follows.IN_SIZE in sizes else _Follows.NOT


def _follows(base: Tensor, other: Tensor, count: int, others: Sequence[int]) -> _Follows | None:
    """How one output follows ``count`` samples, of which the other run had ``others``; None for what does not depend on them."""
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
        # where the samples' axis is merged with another it may stand before or behind it
        shapes = (((count, factor), 0), ((factor, count), 1))
        expected = [
            torch.unflatten(part, dim, shape).index_select(dim + place, index).flatten(dim, dim + 1)
            for part in expected
            for shape, place in shapes
        ]
    return _Follows.EXACTLY if any(_same(part, other) for part in expected) else _Follows.IN_SIZE


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether values are equal to rounding; on the meta device whatever has the same shape."""
    if one.is_meta or not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return relative_error([other], [one], both_nan=True) <= tolerance_of([one.dtype])


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(inputs.run(model))


def _cuda_devices(inputs: Inputs) -> list[Any]:
    return list({t.device for t in inputs.tensors if t.is_cuda})
