"""ModelSource: the interface of a source of models; and functions that import its package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_logging
from vbpfx.errors import ModelError


def _unknown_inputs(model: nn.Module, batch: int, dtype: torch.dtype) -> Inputs | None:
    return None


@dataclass(frozen=True)
class ModelSource:
    """A source of models.

    Attributes:
        form: how a model is named, such as ``timm:NAME``.
        make: (the whole name, the part after the colon) -> the model.
        example_inputs: (model, number of samples, dtype of the model) -> random inputs as the model expects them, or None
            if the model is not from this source or does not say what it expects.
        random_weights: whether the models have random weights and their package's default number of classes.
    """

    form: str
    make: Callable[[str, str], Any]
    example_inputs: Callable[[nn.Module, int, torch.dtype], Inputs | None] = _unknown_inputs
    random_weights: bool = False


def imported(module: str) -> Any:
    """Import a module. The tensors that it creates on import are real, even if torch's default device is meta."""
    with torch.device("cpu"), quiet_logging():  # transformers imports torchao, which logs deprecations of torch
        return importlib.import_module(module)


def package(name: str, package: str, install: str) -> Any:
    """Import the package that the model of that name needs.

    Raises:
        ModelError: the package is not installed. The message says how to install it.
    """
    try:
        return imported(package)
    except ImportError as error:
        raise ModelError(f"model {name!r} needs {package} ({error}); install it: pip install {install}") from error


def unknown_model(library: str, name: str, matching: Callable[[str], list[str]]) -> ModelError:
    """Return the error for a model that a library does not have. The message shows models with a similar name.

    Args:
        matching: a pattern such as ``*vit*`` -> the names of the library's models that match it.
    """
    near = matching(f"*{name.split('_')[0]}*")[:5]
    return ModelError(f"{library} knows no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
