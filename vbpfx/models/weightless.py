"""Models whose weights are not in memory: the parameters are on the meta device, and their values in files."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vbpfx.errors import ModelError, first_line
from vbpfx.graph.capture import named_tensors, require_module, share_parameters
from vbpfx.storage.tensors import Stored


@contextmanager
def without_weights() -> Iterator[None]:
    """Put the parameters of modules that are built within this context on the meta device, where they take no memory.

    Buffers are computed as usual, so the values that only a constructor knows (the frequencies of rotary embeddings) exist.
    The values of the parameters come from files; see :func:`vbpfx.prune_files`.
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return None if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Weightless:
    """A model without weights, and where its tensors are.

    Attributes:
        model: the model, with all tensors on the meta device, in eval mode.
        stored: the tensors that are in files.
        buffers: name -> value, for buffers that no file holds.
        names: name of a tensor of the model -> the name under which it is stored. The two differ for some tied tensors.
        folder: the Hugging Face folder of the model; None for a module of the caller.
        restored: the original values of configuration entries that were changed for the capture.
    """

    model: nn.Module
    stored: Stored
    buffers: Mapping[str, Tensor]
    names: Mapping[str, str]
    folder: Path | None
    restored: Mapping[str, Any]

    @classmethod
    def of(cls, model: str | Path | nn.Module, weights: str | Path | Iterable[str | Path] | None = None) -> Weightless:
        """Open a Hugging Face folder, or a model that was built under :func:`without_weights` and the files of its weights.

        Raises:
            ModelError: a file cannot be read, does not fit the model or holds quantised weights, or the model has its weights
                in memory or computes in float16.
            CaptureError: the model is not a module.
        """
        folder: Path | None = None
        restored: dict[str, Any] = {}
        if isinstance(model, (str, Path)):
            folder = Path(model)
            model, restored = _of_folder(folder)
        require_module(model)
        if weights is None:
            if folder is None:
                raise ModelError("a module needs weights=, the safetensors files that hold its state dict")
            weights = folder
        real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
        if real:
            raise ModelError(
                f"parameter {real[0]} of {type(model).__name__} is in memory; build the model under "
                f"vbpfx.without_weights(), or use vbpfx.prune"
            )
        half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
        if half:
            raise ModelError(
                f"parameter {half[0]} of {type(model).__name__} is float16 and everything is computed on the CPU, where many "
                f"operators do not exist in it and sums overflow: build the model without .half(); the files stay float16"
            )
        stored = Stored.of(weights)
        names = _stored_names(model, stored)
        buffers = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in names}
        unknown = sorted(name for name, buffer in buffers.items() if buffer.is_meta)
        if unknown:
            raise ModelError(
                f"buffer {unknown[0]} is on the meta device and in none of the files: its value is unknown; build the model "
                f"under vbpfx.without_weights() instead of torch.device('meta')"
            )
        return cls(_all_on_meta(model), stored, buffers, names, folder, restored)


def _of_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a folder of Hugging Face: there is no {folder / 'config.json'}")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(f"a folder of Hugging Face needs transformers ({error}): pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        restored = {"use_cache": config.use_cache} if hasattr(config, "use_cache") else {}
        config.use_cache = False  # a single forward pass needs no cache
        kind = architecture(transformers, config)
        if kind is None:
            raise ModelError(f"{folder / 'config.json'} names no architecture that transformers has")
        with without_weights():
            model: nn.Module = kind(config)
    except ModelError:
        raise
    except Exception as error:  # the configuration and the class may raise any exception
        raise ModelError(
            f"transformers cannot build a model from {folder} ({type(error).__name__}: {first_line(error)}); pass a folder with "
            f"config.json and safetensors"
        ) from error
    return model, restored


def architecture(transformers: Any, config: Any) -> Any:
    """Return the first model class of transformers that a configuration names, or None if it names none.

    No other object that the configuration names is called.
    """
    found = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    models = (kind for kind in found if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel))
    return next(models, None)


def _stored_names(model: nn.Module, stored: Stored) -> dict[str, str]:
    """Return name in the model -> stored name for all stored tensors. Raise a ModelError if the files do not fit."""
    tensors = named_tensors(model)
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name in stored.files:
            found.setdefault(id(tensor), name)
    names = {name: found[id(tensor)] for name, tensor in tensors.items() if id(tensor) in found}
    wrong = [f"{name} is missing" for name, _ in model.named_parameters() if name not in names]
    wrong += [
        f"{name} has shape {tuple(stored.shapes[source].shape)}, in the model {tuple(tensors[name].shape)}"
        for name, source in names.items()
        if stored.shapes[source].shape != tensors[name].shape
    ]
    wrong += [
        f"{name} is stored as {dtype}, and vbpfx does not read quantised weights: store them in bfloat16 or a wider type"
        for name, source in names.items()
        if tensors[name].is_floating_point()
        and not ((dtype := stored.shapes[source].dtype).is_floating_point and dtype.itemsize > 1)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise ModelError(f"the files do not fit {type(model).__name__}: {wrong[0]}{more}")
    return names


def _all_on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of the model in eval mode, with the same parameters and with its buffers on the meta device."""
    hollow = share_parameters(model)
    buffers = {id(buffer): buffer for buffer in hollow.buffers()}
    on_meta = {key: buffer.to("meta") for key, buffer in buffers.items()}
    for module in hollow.modules():
        module._buffers.update({name: on_meta[id(b)] for name, b in module._buffers.items() if b is not None})
    return hollow
