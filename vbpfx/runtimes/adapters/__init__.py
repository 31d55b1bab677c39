"""The runtimes, one a file: the file's name is the runtime's.

An adapter says in ``ABOUT`` what is known without the runtime's package, which it imports in its functions. It has ``compile_file`` where
the runtime takes ONNX files; otherwise ``compile_network``, and ``load_file`` where the runtime can load again what it made.

Only the names are found here, so that the command line can list them without PyTorch. :mod:`vbpfx.runtimes.table` imports the files.
"""

import pkgutil

NAMES = tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))
DEFAULT = "onnxruntime"
