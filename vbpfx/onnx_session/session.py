"""Open and run sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from vbpfx.data.inputs import Inputs

_SILENT = 4  # ONNX Runtime's log level at which only fatal errors are printed; others are raised


def open_session(
    file: str | Path | bytes, *, folder: Path | None = None, threads: int | None = None, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU that prints nothing.

    Args:
        file: a path, or a serialised model.
        folder: the folder of the external data, for a serialised model or a file that is large because of it.
        threads: number of threads of an operator. With None, ONNX Runtime decides.
        optimized: whether ONNX Runtime may rewrite the graph before it runs it.

    Raises:
        Exception: ONNX Runtime does not accept the file. It raises many types of exceptions.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads or 0
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:  # external weights are large: they stay mapped, without a second copy in another layout
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_prepacking", "1")
    model = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(
    session: onnxruntime.InferenceSession,
    inputs: Inputs,
    arguments: Mapping[str, str] | None = None,
    wanted: Sequence[str] | None = None,
) -> list[Tensor]:
    """Run one batch, and return the values named in ``wanted``, by default all outputs.

    Args:
        arguments: input of the file -> key in ``inputs.kwargs``. Without it, the file's inputs get the tensors in order.
    """
    if arguments is None:
        given = dict(zip((entry.name for entry in session.get_inputs()), inputs.tensors, strict=True))
    else:
        given = {name: inputs.kwargs[argument] for name, argument in arguments.items()}
    feeds = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(wanted, feeds)]
