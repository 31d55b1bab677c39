"""Batches: from whatever a data loader yields to the arguments of a forward call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vbpfx.errors import CalibrationError

LABELS = "labels"  # what a mapping calls them; a model that is given them returns a loss


def named_labels(batch: Any) -> Any:
    """The ``labels`` of a batch that is a mapping, which :func:`as_inputs` leaves out; None where there are none."""
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    return batch.get(LABELS) if isinstance(batch, Mapping) else None


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call; tensors may be nested in tuples, lists and dictionaries."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """Every value among the arguments, nested ones included, in order."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int | None:
        """Size of the first axis of the first tensor that has one; None without such a tensor."""
        return next((t.shape[0] for t in self.tensors if t.ndim), None)

    @property
    def is_empty(self) -> bool:
        """Whether there is a batch axis, and no sample on it."""
        return self.batch_size == 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with the function applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether the tensor's first axis is the batch axis (as long as the first tensor's)."""
        return tensor.ndim > 0 and tensor.shape[0] == self.batch_size

    def first(self, samples: int) -> Inputs:
        """At most that many samples of the batch."""
        return self.samples(0, samples)

    def samples(self, start: int, stop: int) -> Inputs:
        """Those samples of the batch."""
        return self.map(lambda t: t[start:stop] if self.is_batched(t) else t)

    def resized(self, samples: int) -> Inputs:
        """The batch repeated or cut to exactly that many samples."""

        def resize(tensor: Tensor) -> Tensor:
            if not self.is_batched(tensor):
                return tensor
            index = torch.arange(samples, device=tensor.device) % tensor.shape[0]
            return tensor.index_select(0, index)

        return self.map(resize)

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
        named = [*enumerate(self.args), *self.kwargs.items()]
        sizes = {
            name: "x".join(map(str, value.shape[1 if self.is_batched(value) else 0 :])) or "a number"
            for name, value in named
            if isinstance(value, Tensor)
        }
        return ", ".join(size if len(sizes) == 1 else f"{name} {size}" for name, size in sizes.items())

    @property
    def unlabelled(self) -> Inputs:
        """The same without an argument that is called ``labels``."""
        return Inputs(self.args, {name: value for name, value in self.kwargs.items() if name != LABELS})

    def describe(self) -> str:
        """Shapes and dtypes, for messages."""
        named = [*((str(i), a) for i, a in enumerate(self.args)), *self.kwargs.items()]
        parts = []
        for name, value in named:
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


def as_inputs(batch: Any, model: nn.Module) -> Inputs:
    """The arguments that ``model.forward`` takes, from one batch.

    A tensor is the one argument. A mapping is keyword arguments (or, where the signature does not take
    its keys, the one argument); its ``labels`` are left out unless ``forward`` demands them. A sequence is positional arguments, from which labels are left out:
    what ``forward`` cannot take, or a second entry that is one integer per sample. ``(args, kwargs)``
    with a tuple and a dictionary is taken as it is.
    """
    if isinstance(batch, Inputs):
        return batch
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items()}
        unlabelled = {name: value for name, value in kwargs.items() if name != LABELS}
        if unlabelled and _binds(signature, (), unlabelled):
            kwargs = unlabelled
        return Inputs((), kwargs) if _binds(signature, (), kwargs) else Inputs((batch,), {})
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
            return Inputs(batch[0], dict(batch[1]))
        entries = tuple(batch)
        first = Inputs(entries[:1], {})
        if len(entries) == 2 and _are_labels(entries[1], first.batch_size) and _binds(signature, entries[:1], {}):
            entries = entries[:1]
        while len(entries) > 1 and not _binds(signature, entries, {}):
            entries = entries[:-1]
        if len(entries) == 1 and isinstance(entries[0], Mapping):
            return as_inputs(entries[0], model)
        return Inputs(entries, {})
    return Inputs((batch,), {})


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
