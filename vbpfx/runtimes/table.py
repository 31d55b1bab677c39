"""How to get a runtime by name, and what all adapters have in common."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_process
from vbpfx.errors import ExportError, VbpfxError, first_line
from vbpfx.export.onnx import export_onnx
from vbpfx.runtimes.adapters import NAMES
from vbpfx.runtimes.interface import About, Compiled, Runtime


def runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        ExportError: there is no such runtime, or its package is not installed.
    """
    adapter = _adapter(name)
    about: About = adapter.ABOUT
    try:
        with quiet_process():
            importlib.import_module(about.module or about.package)
    except ImportError as error:
        raise ExportError(
            f"runtime {name} needs {about.package} ({error}); install it: pip install {about.package}"
        ) from error
    # an adapter compiles ONNX files (compile_file), or it compiles networks (compile_network) and loads the result
    # (load_file)
    from_file = getattr(adapter, "compile_file", None)
    compile = _through_a_file(from_file) if from_file else adapter.compile_network
    opened = _named(name, from_file) if from_file else None
    own = getattr(adapter, "load_file", None)
    loaded = _named(name, own) if own else opened
    return Runtime(name, about, _named(name, compile), opened, loaded)


def best_multiple(name: str) -> int:
    """Return the multiple at which widths are fast in the runtime of that name. It need not be installed.

    Raises:
        ExportError: there is no such runtime.
    """
    about: About = _adapter(name).ABOUT
    return about.round_to


def _adapter(name: str) -> Any:
    """Return the file of that name in :mod:`vbpfx.runtimes.adapters`."""
    if name not in NAMES:
        raise ExportError(f"runtime {name!r} is unknown; choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"vbpfx.runtimes.adapters.{name}")


def _through_a_file(compile_file: Callable[..., Compiled]) -> Callable[..., Compiled]:
    """Return a function that compiles a network by exporting it to an ONNX file first."""

    def compile_network(network: nn.Module, inputs: Inputs, threads: int | None = None) -> Compiled:
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_file(export_onnx(network, inputs, Path(folder) / "model.onnx"), inputs, threads)
        compiled.file = None
        return compiled

    return compile_network


def _named(name: str, compile: Callable[..., Compiled]) -> Callable[..., Compiled]:
    """Wrap ``compile`` so that it prints nothing, and raises errors of vbpfx that start with the runtime's name."""

    @functools.wraps(compile)
    def compile_or_say(*args: Any) -> Compiled:
        try:
            with quiet_process():
                return compile(*args)
        except VbpfxError as error:
            raise type(error)(f"{name}: {error}") from error
        except Exception as error:  # every compiler has exceptions of its own
            raise ExportError(
                f"{name} cannot compile the network: {type(error).__name__}: {first_line(error)}"
            ) from error

    return compile_or_say
