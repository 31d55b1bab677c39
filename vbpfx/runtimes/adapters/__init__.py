"""The adapters of runtimes, one per file. A file has the name of its runtime.

Packages that vbpfx does not require are imported only inside functions, and ``ABOUT``
(:class:`vbpfx.runtimes.interface.About`) does not need them. An adapter has ``compile_file`` if the runtime accepts ONNX
files. Otherwise it has ``compile_network`` and, if the runtime can load a compiled file again, ``load_file``.

Only the names are listed here, so that the command line can show them without importing PyTorch.
:mod:`vbpfx.runtimes.table` imports the files.
"""

import pkgutil

NAMES = tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))
DEFAULT = "onnxruntime"
