"""Convert the batches of any data loader to the arguments of a forward call."""

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

LABELS = "labels"  # the key of the labels in a mapping; a Hugging Face model that gets them returns a loss


def named_labels(batch: Any) -> Any:
    """Return the ``labels`` of a batch that is a mapping, or None. :func:`as_inputs` leaves them out."""
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    return batch.get(LABELS) if isinstance(batch, Mapping) else None


# The place of a tensor: the position or name of its argument, and its index among the tensors in the argument.
Place = tuple[int | str, int]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call. Tensors may be nested in tuples, lists and dictionaries.

    Attributes:
        args, kwargs: the arguments.
        axes: place of a tensor -> its batch axis, or None for a tensor that does not hold samples. If ``axes`` itself
            is None, they were not determined, and the first axis is assumed for all tensors that are as long there as
            the first tensor. :func:`vbpfx.graph.batch_axis.find_batch_axes` determines them.
        coupled: whether samples influence one another, so that the output for a part of a batch differs from that part
            of the output for the whole batch.
        open: further axes whose sizes the graph must leave open, because batches differ in them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: Mapping[Place, int | None] | None = None
    coupled: bool = False
    open: frozenset[tuple[Place, int]] = frozenset()

    @property
    def named(self) -> list[tuple[int | str, Any]]:
        """Every argument with its position or name, in order."""
        return [*enumerate(self.args), *self.kwargs.items()]

    @property
    def leaves(self) -> list[Any]:
        """Every value in the arguments, including nested ones, in order."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    @property
    def placed(self) -> dict[Place, Tensor]:
        """Every tensor in the arguments by its place, in order."""
        found = ((name, [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]) for name, value in self.named)
        return {(name, number): tensor for name, tensors in found for number, tensor in enumerate(tensors)}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor in the arguments, in order."""
        return list(self.placed.values())

    @property
    def batch_axes(self) -> dict[Place, int]:
        """The batch axis of every tensor that has one."""
        if self.axes is not None:
            return {place: axis for place in self.placed if (axis := self.axes.get(place)) is not None}
        samples = next((t.shape[0] for t in self.tensors if t.ndim), None)
        return {place: 0 for place, t in self.placed.items() if t.ndim and t.shape[0] == samples}

    @property
    def batch_size(self) -> int | None:
        """The number of samples, or None if no tensor has a batch axis."""
        placed = self.placed
        return next((placed[place].shape[axis] for place, axis in self.batch_axes.items()), None)

    @property
    def is_empty(self) -> bool:
        """Whether there is a batch axis of length zero."""
        return self.batch_size == 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the inputs with a function applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def each(self, function: Callable[[Any, int | None], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every value v replaced by ``function(v, its batch axis or None)``."""
        axes: Mapping[Any, int] = self.batch_axes
        return self.by_place(lambda leaf, place: function(leaf, axes.get(place)))

    def by_place(self, function: Callable[[Any, Place | None], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every value v replaced by ``function(v, its place, or None if v is no tensor)``."""

        def of(name: int | str, value: Any) -> Any:
            number = itertools.count()
            return pytree.tree_map(
                lambda leaf: function(leaf, (name, next(number)) if isinstance(leaf, Tensor) else None), value
            )

        return tuple(of(n, v) for n, v in enumerate(self.args)), {n: of(n, v) for n, v in self.kwargs.items()}

    def along(self, other: Inputs) -> Inputs:
        """Return the inputs with the batch axes of another batch of the same model."""
        if other.axes is None:
            return self
        axes, own = dict(other.axes), list(self.placed)
        # The same arguments may be passed by name in one batch and by position in the other.
        if axes.keys() != set(own) and len(axes) == len(own):
            axes = dict(zip(own, axes.values(), strict=True))
        return replace(self, axes=axes, coupled=other.coupled)

    def first(self, samples: int) -> Inputs:
        """Return the first samples of the batch, at most ``samples`` of them."""
        return self.samples(0, samples)

    def samples(self, start: int, stop: int) -> Inputs:
        """Return the samples from ``start`` up to, but not including, ``stop``."""
        return self._along_samples(lambda t, axis: t[(slice(None),) * axis + (slice(start, stop),)])

    def select(self, index: Sequence[int]) -> Inputs:
        """Return the samples with the given indices, in that order."""
        return self._along_samples(lambda t, axis: t.index_select(axis, torch.tensor(index, device=t.device)))

    def resized(self, samples: int) -> Inputs:
        """Return the batch repeated or cut to exactly that many samples."""
        size = self.batch_size
        return self.select([number % size for number in range(samples)]) if size else self

    def _along_samples(self, function: Callable[[Tensor, int], Tensor]) -> Inputs:
        args, kwargs = self.each(lambda leaf, axis: leaf if axis is None else function(leaf, axis))
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device) -> Inputs:
        """Return the inputs with every tensor on the device."""
        # copies to the CPU must be blocking: the caller reads the values at once, perhaps before they have arrived
        return self.map(lambda t: t.to(device, non_blocking=device.type != "cpu"))

    def run(self, network: nn.Module) -> Any:
        """Run a network on copies of the arguments, since a model may write into its inputs; return its output."""
        own = self.map(torch.clone)
        # network(...) of a GraphModule would print the generated code when a batch does not fit
        return nn.Module.__call__(network, *own.args, **own.kwargs)

    @property
    def sample(self) -> str:
        """The sizes of one sample, such as 3x224x224, with the names of the arguments if there are several."""
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
        """The inputs without an argument called ``labels``."""
        return replace(self, kwargs={name: value for name, value in self.kwargs.items() if name != LABELS})

    def describe(self) -> str:
        """Return the shapes and dtypes of all tensors, for messages."""
        parts = []
        for name, value in self.named:
            tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
            parts += [f"{name}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
        return "; ".join(parts) or "no tensors"


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, or the CPU if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter, or torch's default dtype if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and dataclasses, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += tensors_in([getattr(leaf, entry.name, None) for entry in dataclasses.fields(leaf)])
    return found


def holds_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, or a nested structure that contains one."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def all_axes(inputs: Inputs) -> frozenset[tuple[Place, int]]:
    """Return every axis of every tensor."""
    return frozenset((place, axis) for place, tensor in inputs.placed.items() for axis in range(tensor.ndim))


def unlike_axes(batches: Sequence[Inputs]) -> frozenset[tuple[Place, int]]:
    """Return the axes on which the batches differ in length."""
    shapes = [{place: tuple(tensor.shape) for place, tensor in batch.placed.items()} for batch in batches]
    return frozenset(
        (place, axis)
        for place, shape in shapes[0].items()
        for axis, size in enumerate(shape)
        if any(len(other := s.get(place, shape)) == len(shape) and other[axis] != size for s in shapes[1:])
    )


def argument_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of the parameters of ``model.forward`` that the inputs are passed to, in order."""
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
    between_positions = value.ndim == 2 and value.shape[0] == value.shape[1]  # an attention mask
    return value.shape[0] == batch_size and not between_positions


# The ends of two warnings about a batch entry that may be labels or an optional argument.
_EXPLICIT = "; if it is {other}, pass inputs=lambda batch: {arguments}"
LEFT_OUT = (
    "the second entry of a batch, one integer per sample, is taken for labels and not passed to the model, although forward has an "
    "argument {name} at this place" + _EXPLICIT.format(other="that argument", arguments="((batch[0], batch[1]), {{}})")
)
_PASSED_ON = (
    "the second entry of a batch, floating-point numbers per sample, is passed to forward as its optional argument {name}"
    + _EXPLICIT.format(other="a target of training", arguments="((batch[0],), {{}})")
)


class Labelled(NamedTuple):
    """A batch whose second entry is known to be the labels."""

    inputs: Any
    labels: Any


def as_inputs(batch: Any, model: nn.Module) -> Inputs:
    """Convert a batch to the arguments that ``model.forward`` takes.

    - A tensor is the only argument.
    - A mapping holds keyword arguments or, if the signature does not accept its keys, is the only argument. Its
      ``labels`` are left out unless ``forward`` requires them. For an encoder-decoder model, the decoder's input is
      made from the labels if the batch does not hold it (:mod:`vbpfx.data.decoder`).
    - A sequence holds positional arguments. Labels are left out of it: entries that ``forward`` does not accept, or a
      second entry that is one integer per sample.
    - ``(args, kwargs)``, a tuple and a dictionary, is used as it is.

    If the second argument of ``forward`` is optional, the second of two entries may be this argument or labels. One
    integer per sample is left out as labels (:func:`left_out` reports this). Floating-point numbers per sample are
    passed as the argument, with a warning.
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
    """Find an entry that :func:`as_inputs` leaves out as labels, although ``forward`` accepts an argument there.

    Returns:
        The argument's name, and the inputs including it. None if there is no such entry.
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
    """Return a function that converts a batch to inputs, with the caller's function or else with :func:`as_inputs`.

    The returned function raises CalibrationError if the caller's function does not return (args, kwargs).
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
