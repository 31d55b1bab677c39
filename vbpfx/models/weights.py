"""Weights from files, read without running code from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vbpfx.display.quiet import quiet_warnings
from vbpfx.errors import ModelError, first_line

UNFIT = "does not fit"
_WRAPPINGS = ("state_dict", "model_state_dict", "model")  # the keys under which training scripts store weights
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these in front of names


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into the model. The model is not changed if the file does not fit.

    Raises:
        ModelError: the file cannot be read, or its names or shapes are not those of the model.
    """
    own, found = model.state_dict(), _read_weights(path)
    wrong = [f"it lacks {name}" for name in own if name not in found]
    wrong += [f"it holds {name}, which the model does not have" for name in found if name not in own]
    wrong += [
        f"{name} has shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"
        for name, tensor in found.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise ModelError(f"{path} {UNFIT} {type(model).__name__}: {wrong[0]}{more}")
    model.load_state_dict(found)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        # timm's training script stores its arguments, a Namespace, beside the weights. Loading it runs no code.
        # warnings are off because the error already says what is wrong with the file
        with quiet_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from {path}: {first_line(error)}") from error
    except Exception as error:  # torch.load raises errors of many kinds for a file that holds no weights
        raise ModelError(
            f"{path} cannot be read as a file of weights: it is damaged, or it holds other Python objects, which vbpfx never loads. "
            f"Save model.state_dict() with safetensors or torch.save, and pass that file"
        ) from error
    for key in _WRAPPINGS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path} holds no state dict; save model.state_dict()")
    for prefix in _PREFIXES:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return dict(found)
