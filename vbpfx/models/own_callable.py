"""Models made by the user's own function, class or module attribute, named as ``module:callable``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vbpfx.errors import ModelError, first_line
from vbpfx.models.source import ModelSource, imported


class NotFoundError(ModelError):
    """The module cannot be imported, or does not have the callable."""


def _make(name: str, rest: str) -> Any:
    module, _, function = name.rpartition(":")
    with _importable(""):
        try:
            make = imported(module)
            for part in function.split("."):
                make = getattr(make, part)
        except (ImportError, AttributeError) as error:
            found = f"model {name!r}: {first_line(error)}"
            if not module.endswith(".py"):
                raise NotFoundError(found) from error
            hint = f"go to the folder of {module} and write {Path(module).stem}:{function}"
            raise ModelError(f"{found}; {hint}") from error
        except Exception as error:  # the user's own code
            raise ModelError(
                f"model {name!r}: importing {module} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if isinstance(make, nn.Module):
            return make
        try:
            return make()  # within the context, because it may import other modules of the same folder
        except Exception as error:  # the user's own code
            raise ModelError(
                f"model {name!r}: calling it raised {type(error).__name__}: {first_line(error)}"
            ) from error


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Make the modules of a folder importable within this context."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:  # the user's code may have changed it
            sys.path.remove(folder)


OWN_CALLABLE = ModelSource("module:callable", _make)
