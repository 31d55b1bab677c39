"""Open ONNX Runtime sessions on the CPU, without log output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from vbpfx.errors import CaptureError, first_line
from vbpfx.onnx_graph.file import has_external_data, release_pages
from vbpfx.onnx_session.session import open_session


def session_with(model: ir.Model, folder: Path, further: Sequence[str]) -> onnxruntime.InferenceSession:
    """Open a session on a model, with the values named in ``further`` as additional outputs.

    Raises:
        CaptureError: ONNX Runtime rejects the file.
    """
    release_pages(model)
    proto = ir.serde.serialize_model(model)
    present = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further if name not in present)
    try:
        return open_session(proto.SerializeToString(), folder=folder.absolute() if has_external_data(model) else None)
    except Exception as error:  # ONNX Runtime has many classes of exceptions
        raise CaptureError(f"ONNX Runtime cannot load the file: {first_line(error)}") from error
