"""The criteria, one a file: the file's name is the criterion's, and so is that of the function in it that gives the scores.

Only the names are found here, so that the command line can list them without PyTorch. :mod:`vbpfx.planning.scores` imports the files.
"""

import pkgutil

NAMES = tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))
