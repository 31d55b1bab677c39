"""Batches: from whatever a data loader yields to the arguments of a forward call."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vbpfx.data.decoder import with_decoder_inputs
from vbpfx.errors import CalibrationError

LABELS = "labels"  # what a mapping calls them; a model that is given them returns a loss


def named_labels(batch: Any) -> Any:
    """The ``labels`` of a batch that is a mapping, which :func:`as_inputs` leaves out; None where there are none."""
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    return batch.get(LABELS) if isinstance(batch, Mapping) else None


# An argument, by its place or its name, and which of the tensors in it.
Place = tuple[int | str, int]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call; tensors may be nested in tuples, lists and dictionaries.

    Attributes:
        args, kwargs: the arguments.
        axes: which axis of each tensor holds the samples; None for a tensor that is not one of every sample. Where nobody has
            looked (None for all of them), it is taken to be the first axis of every tensor that is as long there as the
            first tensor. :func:`vbpfx.graph.batch_axis.find_batch_axes` looks.
        coupled: samples influence one another, so that no part of a batch says what the model makes of the whole.
        open: further axes whose sizes are to stay open, because batches differ there.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: Mapping[Place, int | None] | None = None
    coupled: bool = False
    open: frozenset[tuple[Place, int]] = frozenset()

    @property
    def named(self) -> list[tuple[int | str, Any]]:
        """Every argument with its place or its name, in order."""
        return [*enumerate(self.args), *self.kwargs.items()]

    @property
    def leaves(self) -> list[Any]:
        """Every value among the arguments, nested ones included, in order."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    @property
    def placed(self) -> dict[Place, Tensor]:
        """Every tensor among the arguments with its place, in order."""
        found = ((name, [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]) for name, value in self.named)
        return {(name, number): tensor for name, tensors in found for number, tensor in enumerate(tensors)}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return list(self.placed.values())

    @property
    def batch_axes(self) -> dict[Place, int]:
        """The axis of the samples of every tensor that has one."""
        if self.axes is not None:
            return {place: axis for place in self.placed if (axis := self.axes.get(place)) is not None}
        samples = next((t.shape[0] for t in self.tensors if t.ndim), None)
        return {place: 0 for place, t in self.placed.items() if t.ndim and t.shape[0] == samples}

    @property
    def batch_size(self) -> int | None:
        """How many samples there are; None where no tensor has an axis of samples."""
        placed = self.placed
        return next((placed[place].shape[axis] for place, axis in self.batch_axes.items()), None)

    @property
    def is_empty(self) -> bool:
        """Whether there is a batch axis, and no sample on it."""
        return self.batch_size == 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with the function applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def each(self, function: Callable[[Any, int | None], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every value in them replaced by what the function makes of it and its axis of samples."""
        axes: Mapping[Any, int] = self.batch_axes
        return self.by_place(lambda leaf, place: function(leaf, axes.get(place)))

    def by_place(self, function: Callable[[Any, Place | None], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every value in them replaced by what the function makes of it and its place, where it is a tensor."""

        def of(name: int | str, value: Any) -> Any:
            number = itertools.count()
            return pytree.tree_map(
                lambda leaf: function(leaf, (name, next(number)) if isinstance(leaf, Tensor) else None), value
            )

        return tuple(of(n, v) for n, v in enumerate(self.args)), {n: of(n, v) for n, v in self.kwargs.items()}

    def along(self, other: Inputs) -> Inputs:
        """The same arguments with samples on the axes that another batch of the model has them on."""
        if other.axes is None:
            return self
        axes, own = dict(other.axes), list(self.placed)
        if axes.keys() != set(own) and len(axes) == len(own):  # the same arguments, by name here and by place there
            axes = dict(zip(own, axes.values(), strict=True))
        return replace(self, axes=axes, coupled=other.coupled)

    def first(self, samples: int) -> Inputs:
        """At most that many samples of the batch."""
        return self.samples(0, samples)

    def samples(self, start: int, stop: int) -> Inputs:
        """Those samples of the batch."""
        return self._along_samples(lambda t, axis: t[(slice(None),) * axis + (slice(start, stop),)])

    def select(self, index: Sequence[int]) -> Inputs:
        """The samples of those numbers, in that order."""
        return self._along_samples(lambda t, axis: t.index_select(axis, torch.tensor(index, device=t.device)))

    def resized(self, samples: int) -> Inputs:
        """The batch repeated or cut to exactly that many samples."""
        size = self.batch_size
        return self.select([number % size for number in range(samples)]) if size else self

    def _along_samples(self, function: Callable[[Tensor, int], Tensor]) -> Inputs:
        args, kwargs = self.each(lambda leaf, axis: leaf if axis is None else function(leaf, axis))
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device) -> Inputs:
        """The same arguments with every tensor on the device."""
        # who asks for numbers on the CPU reads them at once, and would read before they are there
        return self.map(lambda t: t.to(device, non_blocking=device.type != "cpu"))

    def run(self, network: nn.Module) -> Any:
        """What the network makes of the batch; of copies, since a model may write into its input."""
        own = self.map(torch.clone)
        # not network(...): fx's own wrapper prints the generated code when a batch does not fit
        return nn.Module.__call__(network, *own.args, **own.kwargs)

    @property
    def sample(self) -> str:
        """Sizes of one sample, such as 3x224x224, with the names of the arguments where there are several."""
        axes = self.batch_axes
        sizes = {
            name: "x".join(str(size) for dim, size in enumerate(value.shape) if dim != axes.get((name, 0)))
            or "a number"
            for name, value in self.named
            if isinstance(value, Tensor)
        }
        return ", ".join(size if len(sizes) == 1 else f"{name} {size}" for name, size in sizes.items())

    @property
    def unlabelled(self) -> Inputs:
        """The same without an argument that is called ``labels``."""
        return replace(self, kwargs={name: value for name, value in self.kwargs.items() if name != LABELS})

    def describe(self) -> str:
        """Shapes and dtypes, for messages."""
        parts = []
        for name, value in self.named:
            tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
            parts += [f"{name}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
        return "; ".join(parts) or "no tensors"


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU where it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of the model's numbers: that of its first floating-point parameter; torch's default where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += tensors_in([getattr(leaf, entry.name, None) for entry in dataclasses.fields(leaf)])
    return found


def holds_tensor(value: Any) -> bool:
    """Whether the value is a tensor, or a nested structure with one in it."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def all_axes(inputs: Inputs) -> frozenset[tuple[Place, int]]:
    """Every axis of every tensor."""
    return frozenset((place, axis) for place, tensor in inputs.placed.items() for axis in range(tensor.ndim))


def unlike_axes(batches: Sequence[Inputs]) -> frozenset[tuple[Place, int]]:
    """The axes on which batches differ in length."""
    shapes = [{place: tuple(tensor.shape) for place, tensor in batch.placed.items()} for batch in batches]
    return frozenset(
        (place, axis)
        for place, shape in shapes[0].items()
        for axis, size in enumerate(shape)
        if any(len(other := s.get(place, shape)) == len(shape) and other[axis] != size for s in shapes[1:])
    )


def argument_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """The parameter names of ``model.forward`` that the inputs fill, in order."""
    return list(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)


def _binds(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _are_labels(value: Any, batch_size: int | None) -> bool:
    return (
        isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and value.shape[0] == batch_size
    )


def _are_targets(value: Any, batch_size: int | None) -> bool:
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return False
    between_positions = value.ndim == 2 and value.shape[0] == value.shape[1]  # a mask of attention
    return value.shape[0] == batch_size and not between_positions


# What may be labels or an optional argument.
_EXPLICIT = "; where it is {other}, say so: inputs=lambda batch: {arguments}"
LEFT_OUT = (
    "the second entry of a batch, one integer per sample, is left out as labels, though forward takes an argument {name} there"
    + _EXPLICIT.format(other="that argument", arguments="((batch[0], batch[1]), {{}})")
)
_PASSED_ON = (
    "the second entry of a batch, floating-point numbers per sample, is passed to forward as its optional argument {name}"
    + _EXPLICIT.format(other="a target of training", arguments="((batch[0],), {{}})")
)


class Labelled(NamedTuple):
    """A batch of which it is known that the second entry is labels."""

    inputs: Any
    labels: Any


def as_inputs(batch: Any, model: nn.Module) -> Inputs:
    """The arguments that ``model.forward`` takes, from one batch.

    A tensor is the one argument. A mapping is keyword arguments (or, where the signature does not take
    its keys, the one argument); its ``labels`` are left out unless ``forward`` demands them; of a model
    with an encoder and a decoder, what the decoder reads is made of them where the batch does not say it (:mod:`vbpfx.data.decoder`). A sequence is positional arguments, from which labels are left out:
    what ``forward`` cannot take, or a second entry that is one integer per sample. ``(args, kwargs)``
    with a tuple and a dictionary is taken as it is.

    Where ``forward`` takes a second argument and does without, the second of two entries may be either. One integer per sample is
    left out as labels (:func:`left_out` says so). Floating-point numbers per sample are passed on as the argument, with a
    warning.
    """
    if isinstance(batch, Inputs):
        return batch
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items()}
        unlabelled = {name: value for name, value in kwargs.items() if name != LABELS}
        if unlabelled and _binds(signature, (), unlabelled):
            kwargs = with_decoder_inputs(model, unlabelled, batch.get(LABELS))
        return Inputs((), kwargs) if _binds(signature, (), kwargs) else Inputs((batch,), {})
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
            return Inputs(batch[0], dict(batch[1]))
        entries = tuple(batch)
        first = Inputs(entries[:1], {})
        if len(entries) == 2 and _binds(signature, entries[:1], {}):
            optional = _binds(signature, entries, {}) and not isinstance(batch, Labelled)
            name = list(signature.parameters)[min(1, len(signature.parameters) - 1)]
            if _are_labels(entries[1], first.batch_size):
                entries = entries[:1]
            elif optional and _are_targets(entries[1], first.batch_size):
                warnings.warn(_PASSED_ON.format(name=name), stacklevel=2)
        while len(entries) > 1 and not _binds(signature, entries, {}):
            entries = entries[:-1]
        if len(entries) == 1 and isinstance(entries[0], Mapping):
            return as_inputs(entries[0], model)
        return Inputs(entries, {})
    return Inputs((batch,), {})


def left_out(batch: Any, model: nn.Module) -> tuple[str, Inputs] | None:
    """What :func:`as_inputs` leaves out of a batch as labels, though ``forward`` takes an argument there.

    Returns:
        the argument's name, and the arguments with it; None where there is no such entry.
    """
    if not isinstance(batch, (tuple, list)) or isinstance(batch, Labelled) or len(batch) != 2:
        return None
    both, signature = Inputs(tuple(batch), {}), inspect.signature(model.forward)
    labels = _are_labels(batch[1], Inputs((batch[0],), {}).batch_size)
    if not labels or not _binds(signature, both.args, {}) or not _binds(signature, both.args[:1], {}):
        return None
    return list(signature.parameters)[min(1, len(signature.parameters) - 1)], both


def reader(
    model: nn.Module, inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None
) -> Callable[[Any], Inputs]:
    """From a batch to its arguments: by the caller's function where there is one, else by :func:`as_inputs`.

    The function that is returned raises CalibrationError where the caller's returns something else than (args, kwargs).
    """

    def read(batch: Any) -> Inputs:
        if inputs is None:
            return as_inputs(batch, model)
        match inputs(batch):
            case (tuple() | list() as args, dict() as kwargs):
                return Inputs(tuple(args), kwargs)
            case other:
                raise CalibrationError(f"inputs= must return (args, kwargs), it returned a {type(other).__name__}")

    return read
