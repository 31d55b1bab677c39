"""Open an ONNX file: read it as a graph, and compare the graph with the file in ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from vbpfx.data.inputs import Inputs, Place
from vbpfx.errors import CalibrationError, CaptureError, VerificationError, first_line
from vbpfx.graph.capture import Captured, captured_file
from vbpfx.graph.run import outputs_of
from vbpfx.onnx_graph.axes import stated_axes_of_samples
from vbpfx.onnx_graph.file import (
    read_model,
    true_inputs,
)
from vbpfx.onnx_graph.importer import Imported, import_graph, open_file
from vbpfx.onnx_graph.observing import batch_reader
from vbpfx.onnx_graph.samples import find_samples
from vbpfx.onnx_graph.versions import READ_FROM, converted_from
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import PARITY, TOLERANCES, require_close
from vbpfx.pipeline.stages import EXAMPLE_SAMPLES

# Batch sizes at which the written file is compared with the narrowed graph, if the file takes any batch size.
_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class OpenedOnnx:
    """An ONNX file that was read as a graph.

    Attributes:
        model: the model in the file.
        imported: the graph as it was read.
        captured: the graph with shapes, as the analysis takes it.
        example: a few samples as arguments of the graph.
        batches: batches of a few sizes that the file takes.
        fidelity: the difference between the outputs of the graph and of the file in ONNX Runtime, relative to the output.
    """

    model: ir.Model
    imported: Imported
    captured: Captured
    example: Inputs
    batches: list[Inputs]
    fidelity: float


def open_onnx(path: Path, batch: Any) -> OpenedOnnx:
    """Read a file as a graph, and compare the graph with the file in ONNX Runtime.

    Args:
        batch: one batch of the file's inputs, as :func:`prune_onnx` takes them.

    Raises:
        VbpfxError: as :func:`prune_onnx` does.
    """
    model = read_model(path)
    session, names = open_file(model, path.parent), {str(v.name): str(v.name) for v in true_inputs(model)}
    few = _few_samples(model, session, batch_reader(model, names)(batch))
    imported = import_graph(model, few, path.parent)
    example = _renamed(few, imported.arguments)
    captured = captured_file(imported.graph_module, example)
    fidelity = _require_fidelity(model, session, path, imported, captured)
    return OpenedOnnx(model, imported, captured, example, _sizes_taken(session, example, imported), fidelity)


def typical_batch(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return one batch that an ONNX file may take, as input name -> array. Floats are noise, and integers are ones.

    The batch has two samples if the file takes any number of them.

    Raises:
        CalibrationError: an axis other than the batch axis has no fixed size, so its length is unknown.
    """
    model = read_model(path)
    random, made = np.random.default_rng(0), {}
    axes = stated_axes_of_samples(true_inputs(model))
    for value in true_inputs(model):
        name, shape = str(value.name), value.shape
        stated = [
            2 if axis == axes[name] and not isinstance(size, int) else size for axis, size in enumerate(shape or ())
        ]
        sizes = [size for size in stated if isinstance(size, int)]
        if shape is None or len(sizes) < len(stated):
            said = ", ".join(str(size) for size in shape) if shape is not None else "?"
            raise CalibrationError(
                f"{path} does not give the size of every axis of its input {name!r} ({said}). Pass samples: --data samples.npz, with one array for each input, stored under the name of the input"
            )
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        drawn = random.standard_normal(sizes) if dtype.kind == "f" else np.ones(sizes)
        made[name] = np.asarray(drawn, dtype)
    return made


def _few_samples(model: ir.Model, session: onnxruntime.InferenceSession, batch: Inputs) -> Inputs:
    """Return a few samples of a batch, cut along the batch axis of each input of the file.

    Return the whole batch if the file takes no other number of samples.

    Raises:
        CalibrationError: ONNX Runtime does not run the file on the batch.
    """
    found = find_samples(model, session, batch)
    few = found.first(EXAMPLE_SAMPLES) if found.axes is not None else found
    try:
        run_session(session, few, {name: name for name in few.kwargs})
    except Exception as error:  # ONNX Runtime has many kinds
        raise CalibrationError(
            f"ONNX Runtime does not run the file on the first batch ({batch.describe()}): {first_line(error)}; pass batches of a size "
            f"and shape that it takes (vbpfx onnx: --batch)"
        ) from error
    return few


def _renamed(inputs: Inputs, arguments: Mapping[str, str]) -> Inputs:
    """Return the inputs of a file under the names of the graph's arguments."""
    kwargs = {arguments[name]: tensor for name, tensor in inputs.kwargs.items()}
    axes: dict[Place, int | None] = {(arguments[str(name)], 0): axis for (name, _), axis in (inputs.axes or {}).items()}
    return dataclasses.replace(inputs, kwargs=kwargs, axes=axes or None)


def _sizes_taken(session: onnxruntime.InferenceSession, example: Inputs, imported: Imported) -> list[Inputs]:
    """Return batches of a few sizes that the dense file runs on, or the example alone if it runs on none of these sizes."""
    found = []
    for samples in _CHECKED_BATCHES if example.axes is not None and example.batch_size is not None else ():
        inputs = example.resized(samples)
        with contextlib.suppress(Exception):  # ONNX Runtime has many kinds
            run_session(session, inputs, imported.arguments)
            found.append(inputs)
    return found or [example]


def _require_fidelity(
    model: ir.Model, session: onnxruntime.InferenceSession, path: Path, imported: Imported, captured: Captured
) -> float:
    """Return the relative difference between the graph and the file. Raise a VerificationError if it is too large."""
    inputs = captured.inputs.map(lambda t: t.nan_to_num(0, 0, 0))  # calibration reports values that are not finite
    expected = run_session(session, inputs, imported.arguments)
    allowed = allowed_difference(imported)
    if (opset := converted_from(model)) is not None:
        _require_same(path, opset, inputs, imported, expected, allowed)
    return require_close(
        outputs_of(captured.graph_module, inputs),
        expected,
        allowed,
        lambda error: VerificationError(
            f"the graph that vbpfx read from {path} does not compute what the file computes. The outputs differ by {error:.2e} of the output's size, and {allowed:.0e} is allowed. Please report the model"
        ),
    )


def _require_same(
    path: Path, opset: int, inputs: Inputs, imported: Imported, converted: list[Tensor], allowed: float
) -> None:
    """Compare the outputs of a converted file with those of the original file, of an earlier opset, in ONNX Runtime."""
    try:
        original = run_session(open_session(path), inputs, imported.arguments)
    except Exception as error:  # ONNX Runtime has many kinds
        raise CaptureError(
            f"{path} has opset {opset} and was converted to a newer one, but ONNX Runtime does not run the original file "
            f"({first_line(error)}), so the conversion cannot be checked. Export the model again with opset {READ_FROM} or newer"
        ) from error
    require_close(
        converted,
        original,
        allowed,
        lambda difference: CaptureError(
            f"ONNX's version converter changed what {path} (opset {opset}) computes: the outputs differ by {difference:.2e} of "
            f"the output's size, and {allowed:.0e} is allowed. Export the model again with opset {READ_FROM} or newer"
        ),
    )


def allowed_difference(imported: Imported) -> float:
    """Return the largest relative difference that is allowed between a file in ONNX Runtime and its graph.

    If the file computes in float16, the graph computes in float32. Then the difference is the file's own rounding: 2^-11 of
    a value at every node. It grows with the square root of the number of nodes in a row, so that 1600 of them make 2e-2.
    """
    halves = any(stored.computed == np.float16 for stored in imported.stored.values())
    return TOLERANCES[torch.float16] if halves else PARITY
