"""Find the batch axis of every input of an ONNX file: guess it from axis names, and test the guess in ONNX Runtime.

Axes with the same name are assumed to be the same axis, whatever their position. If the axes have no names, or
different names in every input, only their sizes are used. Every guess is tested by running the file
(:mod:`vbpfx.graph.batch_axis`), so an input is never cut or repeated in a way that the file does not accept. The nodes
of a graph, for example, are not samples, and a recurrent state that belongs to one sample cannot take a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import onnxruntime
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, Place
from vbpfx.graph.batch_axis import find_batch_axes, hypotheses
from vbpfx.onnx_graph.axes import names_of_axes
from vbpfx.onnx_graph.file import true_inputs
from vbpfx.onnx_session.session import run_session

Axes = dict[Place, int | None]


def find_samples(model: ir.Model, session: onnxruntime.InferenceSession, inputs: Inputs) -> Inputs:
    """Return the inputs with the batch axis of every tensor; all are None if the file accepts no other batch size.

    A file without an open axis is fixed to its batch size, and its inputs are returned unchanged.

    Args:
        session: an ONNX Runtime session on the unchanged model.
        inputs: one batch, keyed by the names of the inputs.
    """
    names = {str(value.name): names_of_axes(value, inputs.kwargs[str(value.name)].ndim) for value in true_inputs(model)}
    if not any(name is not None for axes in names.values() for name in axes):
        return inputs
    return find_batch_axes(_File(session), inputs, list(_likely(names, inputs)))


def _likely(names: Mapping[str, list[str | None]], inputs: Inputs) -> Iterator[Axes]:
    """Yield possible batch axes, the most likely first: axes with the same name, then axes with the same size."""
    seen: list[Axes] = []
    for name in dict.fromkeys(n for axes in names.values() for n in axes if n):
        places: Axes = {(key, 0): axes.index(name) if name in axes else None for key, axes in names.items()}
        if _may_be_samples(places, names):
            seen.append(places)
            yield places
    for places in hypotheses(inputs):
        if places not in seen and _may_be_samples(places, names):
            yield places


def _may_be_samples(places: Axes, names: Mapping[str, list[str | None]]) -> bool:
    """Return whether these can be the batch axes.

    All of them must be open. The first input that has an open axis must be among them. At least one must be its input's
    first axis or come after an open first axis. This rules out a sequence length after a fixed batch size, and the
    number of edges of a graph, which is not the number of its nodes.
    """
    given = {key: axis for (key, _), axis in places.items() if axis is not None}
    first = next(key for key, axes in names.items() if any(name is not None for name in axes))
    return (
        first in given
        and all(names[str(key)][axis] is not None for key, axis in given.items())
        and any(axis == 0 or names[str(key)][0] is not None for key, axis in given.items())
    )


class _File(nn.Module):
    """An ONNX file as a module that is called with named tensors."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__()
        self.session = session

    def forward(self, **inputs: Any) -> list[Tensor]:
        return run_session(self.session, Inputs((), inputs), {name: name for name in inputs})
