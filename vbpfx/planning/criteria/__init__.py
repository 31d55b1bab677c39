"""The criteria, one per file. A criterion, its file and the function in it that computes the scores have the same name.

Only the names are listed here, so that the command line can show them without importing PyTorch.
:mod:`vbpfx.planning.scores` imports the files.
"""

import pkgutil

NAMES = tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))
