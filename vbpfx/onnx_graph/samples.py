"""Which axis of every input of a file the samples stand along: what the names of its axes suggest, tried in ONNX Runtime.

Axes of one name are alike, wherever they stand; a file whose axes have no names, or a name of its own for each input, is asked by
the sizes alone. What a hypothesis says is tested on the file itself (:mod:`vbpfx.graph.batch_axis`), so that nothing is cut or
repeated that the file does not take: a graph's nodes are not samples, and a state of one sample allows no second.
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
from vbpfx.onnx_graph.session import run

Axes = dict[Place, int | None]


def find_samples(model: ir.Model, session: onnxruntime.InferenceSession, inputs: Inputs) -> Inputs:
    """The inputs with the axis of every tensor that holds the samples; None for all of them where the file takes no other number.

    A file without an open axis is left as it is: it is tied to its size of batch.

    Args:
        session: of the model as it is.
        inputs: one batch, by the names of the inputs.
    """
    names = {str(value.name): names_of_axes(value, inputs.kwargs[str(value.name)].ndim) for value in true_inputs(model)}
    if not any(name is not None for axes in names.values() for name in axes):
        return inputs
    return find_batch_axes(_File(session), inputs, list(_likely(names, inputs)))


def _likely(names: Mapping[str, list[str | None]], inputs: Inputs) -> Iterator[Axes]:
    """What may hold the samples, the likeliest first: axes of one name, then axes of one size."""
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
    """Whether the axes are open, the first input with an open axis is among them, and one stands first or behind an open axis.

    A length behind a batch of fixed size is not a number of samples, and neither is a number of edges beside nodes.
    """
    given = {key: axis for (key, _), axis in places.items() if axis is not None}
    first = next(key for key, axes in names.items() if any(name is not None for name in axes))
    return (
        first in given
        and all(names[str(key)][axis] is not None for key, axis in given.items())
        and any(axis == 0 or names[str(key)][0] is not None for key, axis in given.items())
    )


class _File(nn.Module):
    """The file, as a model of named tensors."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__()
        self.session = session

    def forward(self, **inputs: Any) -> list[Tensor]:
        return run(self.session, Inputs((), inputs), {name: name for name in inputs})
