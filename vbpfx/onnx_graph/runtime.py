"""Open ONNX Runtime sessions on the CPU, without log output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from vbpfx.errors import CaptureError, first_line
from vbpfx.onnx_graph.file import has_external_data, release_pages


def open_session(file: str | bytes, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """Open a session on the CPU that logs nothing.

    Args:
        file: a path, or a serialised model.
        folder: the folder of a serialised model's external data, if it has any.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        # External weights are large: they stay memory-mapped, without a second copy in another layout.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


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
        return open_session(proto.SerializeToString(), folder.absolute() if has_external_data(model) else None)
    except Exception as error:  # ONNX Runtime has many classes of exceptions
        raise CaptureError(f"ONNX Runtime does not take the file: {first_line(error)}") from error
