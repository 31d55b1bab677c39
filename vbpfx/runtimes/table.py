"""The runtimes by name."""

from __future__ import annotations

import importlib

from vbpfx.errors import ExportError
from vbpfx.runtimes.interface import Runtime

# name -> adapter, package, extra
_ADAPTERS = {
    "pytorch": ("pytorch", "torch", ""),
    "onnxruntime": ("onnx_runtime", "onnxruntime", ""),
}

NAMES = tuple(_ADAPTERS)


def runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ExportError: there is none, or its package is not installed.
    """
    if name not in _ADAPTERS:
        raise ExportError(f"runtime {name!r} is unknown; choose one of {', '.join(_ADAPTERS)}")
    file, package, extra = _ADAPTERS[name]
    try:
        adapter = importlib.import_module(f"vbpfx.runtimes.{file}")
    except ImportError as error:
        install = f"vbpfx[{extra}]" if extra else package
        raise ExportError(f"runtime {name} needs {package} ({error}); install it: pip install '{install}'") from error
    return Runtime(name, package, extra, adapter.compile_network)
