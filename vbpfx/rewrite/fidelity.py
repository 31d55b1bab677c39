"""Fidelity: compare the captured graph with the model itself, before any statistics are gathered.

A trace follows one batch. Decisions that the model's code makes by that batch's sizes or values, and state that it keeps
between calls, are fixed in the graph. Therefore graph and model are also compared on other batches: with another number
of samples, with the sizes of later batches, and with other sizes that the model accepts. A copy of the model runs, so
the model is not changed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import LEFT_OUT, Inputs, Place, left_out, model_device
from vbpfx.display.quiet import quiet_python
from vbpfx.errors import CaptureError, VbpfxError, first_line
from vbpfx.graph.capture import Captured, FixedSize, Frontend, capture, named_tensors, share_parameters
from vbpfx.graph.frontends import fixing_line, unfused_attention
from vbpfx.graph.run import outputs_of
from vbpfx.graph.source import line_of_node
from vbpfx.outputs.differences import relative_error, tolerance_of

# The number of samples on which other sizes are tried, and the largest number of groups of axes that are tried.
_SAMPLES, _MOST_GROUPS = 2, 6
# The largest number of further batches that are run.
_MOST_OTHERS = 4
# The increment by which large sizes are tried, because sizes of images are often multiples of it.
_STEP = 32
_WITHOUT_A_LOOP = (
    "Compute all samples at once there, without a loop over them and without their number in arithmetic, so that the graph holds "
    "for any batch"
)


def capture_faithfully(
    model: nn.Module, example: Inputs, others: Sequence[Inputs], *, frontend: Frontend, samples: int
) -> Captured:
    """Capture a model, and check the graph against it.

    fx's tracer may fix a size that differs between batches. Then ``torch.export`` is tried, which can leave a size open.

    Args:
        model: the model, which is not changed.
        example: one batch, of which ``samples`` samples are kept.
        others: further batches, which may have other sizes.
        frontend: see :func:`vbpfx.capture`.

    Raises:
        CaptureError: the model cannot be traced, keeps state between calls, or differs from the graph on batches with
            another number of samples or other sizes. The message names the responsible line of the model's code if it
            can be found.
    """
    captured = capture(model, example, frontend=frontend, samples=samples)
    try:
        return hold(model, captured, others)
    except CaptureError as unlike:
        if frontend != "auto" or captured.frontend == "export":
            raise
        try:
            return hold(model, capture(model, example, frontend="export", samples=samples), others)
        except VbpfxError:
            raise unlike from None


def warn_of_what_is_left_out(model: nn.Module, batch: Any) -> None:
    """Warn if one integer per sample is left out of a batch as labels, although the model runs with it as an argument.

    Args:
        model: the model, which is not changed.
        batch: a batch as the data yields it.
    """
    found = left_out(batch, model)
    if found is None:
        return
    name, both = found
    with torch.random.fork_rng([]), quiet_python(), torch.no_grad():
        try:
            both.first(_SAMPLES).to(model_device(model)).run(share_parameters(model))
        except Exception:  # the model does not accept it as an argument, so leaving it out is right
            return
    warnings.warn(LEFT_OUT.format(name=name), stacklevel=2)


def hold(model: nn.Module, captured: Captured, others: Iterable[Inputs] = ()) -> Captured:
    """Check a captured graph against the model, and return it with a record of the input sizes that only the graph fixes.

    Args:
        model: the model that was captured.
        captured: the graph.
        others: further batches of the data, a few samples of which are run.

    Raises:
        CaptureError: see :func:`capture_faithfully`.
    """
    return _Held(model, captured).against(others)


class _Held:
    """Runs a copy of a model and its graph on the same inputs, and compares them."""

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured, self.inputs = model, captured, captured.inputs
        self.copy, self.device = share_parameters(model), model_device(model)

    def against(self, others: Iterable[Inputs]) -> Captured:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), quiet_python(), unfused_attention():
            try:
                expected = self._run(self.copy, self.inputs)
            except Exception:  # the model itself does not run; calibration reports it, with the batch
                return self.captured
            self._require_no_state(expected)
            if self._difference(self.inputs):
                self._require_shapes(expected)
                return self.captured  # because of random numbers or a fast path: verify reports which
            if self.captured.batch is not None:
                self._require_any_batch()
            for other in _unlike(self.inputs, others):
                self._require_alike(other)
            return replace(self.captured, fixed=tuple(self._fixed_sizes()))

    def _run(self, network: nn.Module, inputs: Inputs) -> list[Tensor]:
        torch.manual_seed(0)  # graph and model draw the same random numbers
        return outputs_of(network, inputs)

    def _difference(self, inputs: Inputs) -> str:
        """Describe how graph and model differ on inputs that the model accepts; return "" if they agree."""
        expected = self._run(self.copy, inputs)
        try:
            found = self._run(self.captured.graph_module, inputs)
        except Exception as error:  # operators may raise any exception
            return _stops(error)
        return _difference(found, expected)

    def _require_shapes(self, expected: list[Tensor]) -> None:
        """Check the shapes of the outputs on the batch that was captured.

        They may differ because torch.export traces two samples if the batch has one.
        """
        try:
            found = self._run(self.captured.graph_module, self.inputs)
            differs = _difference_of_shapes(found, expected)
        except Exception as error:  # operators may raise any exception
            differs = _stops(error)
        if differs:
            raise CaptureError(
                f"the captured graph of {type(self.model).__name__} differs from the model on the batch it was captured with "
                f"({differs}): it is for another number of samples. {self._where_samples()}{_WITHOUT_A_LOOP}"
            )

    def _require_no_state(self, expected: list[Tensor]) -> None:
        before = _state(self.copy)
        differs = _difference(self._run(self.copy, self.inputs), expected)
        if not differs:
            return
        after = _state(self.copy)
        changed = [name for name, value in after.items() if name not in before or not _equal(before[name], value)]
        kept = f", in {', '.join(changed[:3])}" if changed else ""
        raise CaptureError(
            f"{type(self.model).__name__} keeps state between calls{kept}: a second call on the same inputs returns something else "
            f"({differs}), and a graph can only describe a single call. Make the state an argument and an output of forward, "
            f"or set it back where forward begins"
        )

    def _require_any_batch(self) -> None:
        size = self.inputs.batch_size
        assert size
        more = self.inputs.resized(size + 1)
        try:
            self._run(self.copy, more)
        except Exception:  # the model itself accepts no other number of samples
            return
        if differs := self._difference(more):
            raise CaptureError(
                f"the captured graph of {type(self.model).__name__} is only right for batches of {size} samples: with {size + 1} it "
                f"differs from the model ({differs}). {self._where_samples()}{_WITHOUT_A_LOOP}"
            )

    def _require_alike(self, other: Inputs) -> None:
        """Compare graph and model on a further batch, if the model accepts it."""
        few = other.along(self.inputs).to(self.device)
        few = few.first(_SAMPLES) if self.captured.divisible else few
        try:
            self._run(self.copy, few)
        except Exception:  # calibration reports it, with the batch
            return
        differs = self._difference(few)
        if not differs:
            return
        sizes = [
            (place, axis)
            for place, tensor in few.placed.items()
            for axis, size in enumerate(tensor.shape)
            if axis != self.inputs.batch_axes.get(place) and self._size(place, axis) not in (None, size)
        ]
        if sizes:
            raise CaptureError(
                f"batches differ in size, and the captured graph of {type(self.model).__name__} is only right for the sizes of the "
                f"first batch ({self.inputs.describe()}): on a batch of sizes ({few.describe()}) it differs from the model "
                f"({differs}). {self._where(sizes)}"
                f"Make that line independent of the size, or bring all batches to one size"
            )
        raise CaptureError(
            f"the captured graph of {type(self.model).__name__} differs from the model on another batch of the same sizes "
            f"({differs}): the model decides something in Python by its inputs' values, which tracing fixed; make the decision "
            f"part of the input, or compute it with tensors (torch.where)"
        )

    def _size(self, place: Place, axis: int) -> int | None:
        tensor = self.inputs.placed.get(place)
        return tensor.shape[axis] if tensor is not None and axis < tensor.ndim else None

    def _fixed_sizes(self) -> Iterator[FixedSize]:
        """Yield the input sizes, except the batch size, that the graph has fixed though the model accepts others."""
        few = self.inputs.first(_SAMPLES) if self.captured.divisible else self.inputs
        axes: dict[int, list[tuple[Place, int]]] = {}
        for place, tensor in few.placed.items():
            for axis, size in enumerate(tensor.shape):
                if size > 1 and axis != few.batch_axes.get(place) and tensor.layout is torch.strided:
                    axes.setdefault(size, []).append((place, axis))
        groups = [(size, group) for size, together in axes.items() for group in _groups(together)]
        settled: set[tuple[Place, int]] = set()
        for size, group in itertools.islice(groups, _MOST_GROUPS):
            if settled.intersection(group):
                continue
            for other in (size + 1, size + (size if size < 2 * _STEP else _STEP)):
                resized = _resized(few, group, other)
                try:
                    self._run(self.copy, resized)
                except Exception:  # the model does not accept the size
                    continue
                settled.update(group)
                if self._difference(resized):
                    where = self._where(group)
                    yield from (FixedSize(place, axis, size, where) for place, axis in group)
                    break

    def _where_samples(self) -> str:
        """Return a sentence that names the line which fixes the number of samples, or unpacks a batch into its samples.

        It is "" if no such line is found.
        """
        apart = (
            line_of_node(node)
            for node in self.captured.graph_module.graph.nodes
            if isinstance(node.meta.get("val"), (tuple, list)) and len(node.meta["val"]) == self.captured.batch
        )
        if where := self._where(list(self.inputs.batch_axes.items())):
            return where
        line = next(filter(None, apart), "")
        return f"The samples are taken apart at {line}. " if line else ""

    def _where(self, axes: Sequence[tuple[Place, int]]) -> str:
        """Return a sentence that names the line which turns the sizes into fixed numbers, or "" if none is found."""
        line = fixing_line(share_parameters(self.model), self.inputs, axes)
        return f"The size is fixed at {line}. " if line else ""


def _unlike(example: Inputs, others: Iterable[Inputs]) -> list[Inputs]:
    """Return the second batch, and a few others whose sizes do not occur in an earlier batch."""
    axes = {(place, axis) for place, axis in example.batch_axes.items()}
    found: dict[Any, Inputs] = {}
    for number, other in enumerate(others):
        shapes = [
            tuple(size for axis, size in enumerate(tensor.shape) if (place, axis) not in axes)
            for place, tensor in other.placed.items()
        ]
        found.setdefault((number == 1, *shapes), other)
    return list(found.values())[:_MOST_OTHERS]


def _groups(together: list[tuple[Place, int]]) -> list[list[tuple[Place, int]]]:
    """Return the groups in which axes of the same length are resized: all of them together, then each by itself."""
    return [together, *([axis] for axis in together)] if len(together) > 1 else [together]


def _resized(inputs: Inputs, axes: Sequence[tuple[Place, int]], size: int) -> Inputs:
    """Return the inputs with the given axes repeated or cut to a length."""
    for place, axis in axes:
        along = replace(inputs, axes={place: axis}).resized(size)
        inputs = replace(along, axes=inputs.axes)
    return inputs


def _stops(error: Exception) -> str:
    return f"the graph stops ({first_line(error)})"


def _difference_of_shapes(found: list[Tensor], expected: list[Tensor]) -> str:
    if [t.shape for t in found] == [t.shape for t in expected]:
        return ""
    shapes = [", ".join(str(tuple(t.shape)) for t in tensors[:3]) for tensors in (found, expected)]
    return f"outputs of shape {shapes[0]} instead of {shapes[1]}"


def _difference(found: list[Tensor], expected: list[Tensor]) -> str:
    if differs := _difference_of_shapes(found, expected):
        return differs
    dtype = next((t.dtype for t in expected if t.is_floating_point()), torch.float32)
    error = relative_error(found, expected) if not any(bool(t.isnan().any()) for t in expected) else 0.0
    return "" if error <= tolerance_of([dtype]) else f"by {error:.1e} of the output's size"


def _state(network: nn.Module) -> dict[str, Any]:
    """Return the state of a module besides its parameters: buffers, and attributes that are tensors or numbers."""
    found: dict[str, Any] = {
        name: t.clone() for name, t in named_tensors(network).items() if not isinstance(t, nn.Parameter)
    }
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, int, float)) and name != "training":
                found[f"{path}.{name}".removeprefix(".")] = value.clone() if isinstance(value, Tensor) else value
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other
