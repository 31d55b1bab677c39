"""Example inputs for an ONNX file, with the shapes that the file states."""

from __future__ import annotations

from pathlib import Path

import torch

from vbpfx.data.inputs import Inputs
from vbpfx.errors import ModelError, first_line
from vbpfx.onnx_session.session import open_session

_ONNX_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def file_inputs(path: Path, length: int = 128, batch: int = 2) -> Inputs:
    """Return inputs with the shapes that an ONNX file states: random numbers, or ones for integers.

    Args:
        length: the length of open axes after the first axis, which is the batch axis.
        batch: the number of samples if the batch axis is open.

    Raises:
        ModelError: the file cannot be read, or takes inputs of another type.
    """
    try:
        session = open_session(path)
    except Exception as error:  # ONNX Runtime raises many types of exceptions
        raise ModelError(f"cannot read {path} as ONNX: {first_line(error)}") from error
    tensors = []
    for entry in session.get_inputs():
        if entry.type not in _ONNX_TYPES:
            raise ModelError(f"{path}: input {entry.name} is a {entry.type}, expected one of {', '.join(_ONNX_TYPES)}")
        dtype = _ONNX_TYPES[entry.type]
        first, *others = entry.shape or [1]
        shape = [batch if not isinstance(first, int) else first]
        shape += [size if isinstance(size, int) else length for size in others]
        made = torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        tensors.append(made if entry.shape else made[0])
    return Inputs(tuple(tensors), {})
