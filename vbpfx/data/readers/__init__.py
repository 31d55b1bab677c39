"""Readers of data, one file for each kind of data that a path can hold.

Every file has a :class:`vbpfx.data.reader.DataReader` named ``READER``. Readers are found by the names of their files.
"""

import pkgutil

NAMES = tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))
