"""Load models by name, from the sources in a table.

Each source has one file in this package, and one entry in :data:`SOURCES`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vbpfx.data.inputs import Inputs, model_dtype
from vbpfx.errors import ModelError
from vbpfx.models.huggingface import HUGGING_FACE
from vbpfx.models.own_callable import OWN_CALLABLE, NotFoundError
from vbpfx.models.source import ModelSource
from vbpfx.models.timm import TIMM
from vbpfx.models.torchvision import TORCHVISION
from vbpfx.models.weights import UNFIT, load_weights

# The word before the colon in a name -> the source. Any other word is a module that holds the user's own callable.
SOURCES: dict[str, ModelSource] = {"timm": TIMM, "torchvision": TORCHVISION, "hf": HUGGING_FACE}


def load_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """Return the model of that name in eval mode, on the CPU, or on the meta device if that is torch's default.

    Args:
        name: ``timm:NAME`` and ``torchvision:NAME`` have random weights. ``hf:`` takes a folder, or a name that
            transformers finds, and loads its weights. ``module:callable`` is called without arguments; the
            module may also be in the working directory.
        weights: a file with a state dict, written by safetensors or ``torch.save``. No code in it is run.

    Raises:
        ModelError: the model is unknown or cannot be made, its package is not installed, or the weights cannot be read
            or do not fit.
    """
    kind, colon, rest = name.partition(":")
    if not colon or not kind or not rest:
        raise ModelError(f"model {name!r}: expected {forms()}")
    try:
        model = SOURCES.get(kind, OWN_CALLABLE).make(name, rest)
    except NotFoundError as error:
        raise ModelError(f"{error}; expected {forms()}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} gives a {type(model).__name__}, expected a torch.nn.Module")
    empty = next((key for key, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty and torch.get_default_device().type != "meta":
        raise ModelError(f"model {name!r} is on the meta device, where {empty} has no numbers: make it on the CPU")
    if weights is not None:
        try:
            load_weights(model, Path(weights))
        except ModelError as error:
            if not has_random_weights(name) or UNFIT not in str(error):
                raise
            raise ModelError(
                f"{error}; {name} has the default number of classes and settings of {kind}. For others, write a function that "
                f"returns the model, and pass it as module:callable"
            ) from error
    return model.eval()


def has_random_weights(name: str) -> bool:
    """Return whether the model of that name has random weights until a file of weights is loaded."""
    source = SOURCES.get(name.partition(":")[0])
    return source is not None and source.random_weights


def forms() -> str:
    """Return the forms of a model's name, in words."""
    *first, last = (source.form for source in (*SOURCES.values(), OWN_CALLABLE))
    return f"{', '.join(first)} or {last}"


def typical_inputs(model: nn.Module, shape: tuple[int, ...] | None = None, batch: int = 2) -> Inputs:
    """Return random inputs as the model expects them, if it says so itself (timm, torchvision, transformers).

    Args:
        shape: the shape of one sample of the only input, instead of what the model says.

    Raises:
        ModelError: the model does not say what it expects.
    """
    dtype = model_dtype(model)
    if shape is not None:
        return Inputs((torch.randn(batch, *shape, dtype=dtype),), {})
    for source in SOURCES.values():
        if (found := source.example_inputs(model, batch, dtype)) is not None:
            return found
    raise ModelError(
        f"{type(model).__name__} does not say what its input looks like; pass --shape, such as 3x224x224, or --data with samples "
        f"of it"
    )
