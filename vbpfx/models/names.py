"""Models by the strings that the command line takes, weights from files, and inputs of the shapes that they expect.

timm:NAME  torchvision:NAME  hf:NAME-or-folder  module:callable
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, model_dtype
from vbpfx.display.quiet import quiet_logging, quiet_warnings
from vbpfx.errors import ModelError, first_line
from vbpfx.models.weightless import architecture

FORMS = "timm:NAME, torchvision:NAME, hf:NAME-or-folder or module:callable"
_WRAPPINGS = ("state_dict", "model_state_dict", "model")  # what training scripts put weights under
_UNFIT = "does not fit"
_PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put in front of names
_TOKENS = 128


def load_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """The model of that name, in eval mode, on the CPU, or on the meta device where that is torch's default.

    Args:
        name: ``timm:NAME`` and ``torchvision:NAME`` have random weights; ``hf:`` takes a folder, or a name that transformers
            finds, with the weights that are there; ``module:callable`` calls what it names without arguments, and looks for
            the module in the working directory, too.
        weights: a state dict, as safetensors or as ``torch.save`` wrote it; read without running code from it.

    Raises:
        ModelError: the model is unknown or cannot be made, its package is not installed, or the weights cannot be read or
            do not fit.
    """
    kind, colon, rest = name.partition(":")
    if not colon or not kind or not rest:
        raise ModelError(f"model {name!r}: expected {FORMS}")
    model = _MAKERS.get(kind, _of_module)(name, rest)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} gives a {type(model).__name__}, expected a torch.nn.Module")
    empty = next((key for key, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty and torch.get_default_device().type != "meta":
        raise ModelError(f"model {name!r} is on the meta device, where {empty} has no numbers: make it on the CPU")
    if weights is not None:
        try:
            load_weights(model, Path(weights))
        except ModelError as error:
            if kind not in ("timm", "torchvision") or _UNFIT not in str(error):
                raise
            raise ModelError(
                f"{error}; {name} has {kind}'s own number of classes and settings: for others write a function that makes the "
                f"model, and name it as module:callable"
            ) from error
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into the model; it stays as it was if the file does not fit.

    Raises:
        ModelError: the file cannot be read, or its names or shapes are not the model's.
    """
    own, found = model.state_dict(), _read_weights(path)
    wrong = [f"it lacks {name}" for name in own if name not in found]
    wrong += [f"it holds {name}, which the model has not" for name in found if name not in own]
    wrong += [
        f"{name} has shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"
        for name, tensor in found.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise ModelError(f"{path} {_UNFIT} {type(model).__name__}: {wrong[0]}{more}")
    model.load_state_dict(found)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        # timm's training script puts its arguments beside the weights: a Namespace runs no code
        # what is wrong with a file is said once, by the error
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


def _imported(module: str) -> Any:
    """The module, whose own tensors are real even where the model's are not to be."""
    with torch.device("cpu"), quiet_logging():  # torchao, which transformers imports, logs what torch deprecates
        return importlib.import_module(module)


def _package(name: str, package: str, install: str) -> Any:
    try:
        return _imported(package)
    except ImportError as error:
        raise ModelError(f"model {name!r} needs {package} ({error}); install it: pip install {install}") from error


def _of_timm(name: str, rest: str) -> nn.Module:
    timm = _package(name, "timm", "timm torchvision")
    if not timm.is_model(rest):
        near = timm.list_models(f"*{rest.split('_')[0]}*")[:5]
        raise ModelError(f"timm knows no model {rest!r}" + (f"; it has {', '.join(near)}" if near else ""))
    model: nn.Module = timm.create_model(rest)
    return model


def _of_torchvision(name: str, rest: str) -> nn.Module:
    models = _package(name, "torchvision.models", "torchvision")
    if rest not in models.list_models():
        near = models.list_models(include=f"*{rest.split('_')[0]}*")[:5]
        raise ModelError(f"torchvision knows no model {rest!r}" + (f"; it has {', '.join(near)}" if near else ""))
    # no downloads: detection and segmentation models would fetch a backbone
    signature = inspect.signature(models.get_model_builder(rest))
    extra = {"weights_backbone": None} if "weights_backbone" in signature.parameters else {}
    with quiet_warnings():  # of inception and googlenet: that other versions draw other random weights
        model: nn.Module = models.get_model(rest, weights=None, **extra)
    return model


def _of_transformers(name: str, rest: str) -> nn.Module:
    transformers = _package(name, "transformers", "transformers")
    try:
        with _quiet_transformers(transformers):
            return _from_pretrained(transformers, rest)
    except Exception as error:  # the hub, the configuration and the model class raise what they raise
        raise ModelError(
            f"transformers cannot load {rest!r} ({type(error).__name__}: {first_line(error)}); pass the name of a model, or a "
            f"folder with config.json and the weights"
        ) from error


@contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """Without its bar, which it draws where nobody sees it, too."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _from_pretrained(transformers: Any, rest: str) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(rest, trust_remote_code=False)
    config.use_cache = False  # no part of one forward pass
    with torch.device("cpu"), quiet_logging():  # their modules are imported here, as in _imported
        kind = architecture(transformers, config) or transformers.AutoModel
    if torch.get_default_device().type == "meta":  # nobody asks for the weights
        made: nn.Module = transformers.AutoModel.from_config(config) if kind is transformers.AutoModel else kind(config)
        return made
    model: nn.Module = kind.from_pretrained(rest, config=config)
    return model


def _of_module(name: str, rest: str) -> Any:
    module, _, function = name.rpartition(":")
    with _importable(""):
        try:
            make = _imported(module)
            for part in function.split("."):
                make = getattr(make, part)
        except (ImportError, AttributeError) as error:
            stem = Path(module).stem
            hint = (
                f"go to the folder of {module} and write {stem}:{function}"
                if module.endswith(".py")
                else f"expected {FORMS}"
            )
            raise ModelError(f"model {name!r}: {first_line(error)}; {hint}") from error
        except Exception as error:  # the user's own code
            raise ModelError(
                f"model {name!r}: importing {module} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if isinstance(make, nn.Module):
            return make
        try:
            return make()  # here, too: what it imports may lie beside its module
        except Exception as error:  # the user's own code
            raise ModelError(
                f"model {name!r}: calling it raised {type(error).__name__}: {first_line(error)}"
            ) from error


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules in the folder can be imported; only for as long as this lasts, unless they could be before."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:  # the user's code may have changed it
            sys.path.remove(folder)


_MAKERS: dict[str, Callable[[str, str], Any]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "hf": _of_transformers,
}


def typical_inputs(model: nn.Module, shape: tuple[int, ...] | None = None, batch: int = 2) -> Inputs:
    """Random inputs as the model expects them, as far as it says so itself (timm, torchvision, transformers).

    Args:
        shape: of one sample of the one input, in place of what the model says.

    Raises:
        ModelError: the model does not say.
    """
    dtype = model_dtype(model)
    if shape is not None:
        return Inputs((torch.randn(batch, *shape, dtype=dtype),), {})
    if isinstance(found := getattr(model, "pretrained_cfg", None), Mapping) and found.get("input_size"):
        return Inputs((torch.randn(batch, *found["input_size"], dtype=dtype),), {})
    if type(model).__module__.startswith("torchvision."):
        return Inputs((torch.randn(batch, 3, 224, 224, dtype=dtype),), {})
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if main == "input_ids" and isinstance(words := getattr(config, "vocab_size", None), int):
        tokens = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
        ids = torch.randint(words, (batch, tokens))
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
        taken = inspect.signature(model.forward).parameters
        return Inputs((), {name: tensor for name, tensor in known.items() if name in taken})
    if main == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        pixels = torch.randn(batch, getattr(config, "num_channels", 3), size, size, dtype=dtype)
        return Inputs((), {"pixel_values": pixels})
    raise ModelError(
        f"{type(model).__name__} does not say what its input looks like; pass --shape, such as 3x224x224, or --data with samples "
        f"of it"
    )


_ONNX_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def file_inputs(path: Path, length: int = _TOKENS, batch: int = 2) -> Inputs:
    """Inputs of the shapes that an ONNX file states: random numbers, and ones where it takes integers.

    Args:
        length: of open axes behind the first, which is the batch.

    Raises:
        ModelError: it cannot be read, or takes inputs of another type.
    """
    from vbpfx.onnx_session.session import open_session

    try:
        session = open_session(path)
    except Exception as error:  # ONNX Runtime has its own kinds
        raise ModelError(f"cannot read {path} as ONNX: {first_line(error)}") from error
    tensors = []
    for entry in session.get_inputs():
        if entry.type not in _ONNX_TYPES:
            raise ModelError(f"{path}: input {entry.name} is a {entry.type}, expected one of {', '.join(_ONNX_TYPES)}")
        dtype = _ONNX_TYPES[entry.type]
        first, *others = entry.shape or [1]
        shape = [batch if not isinstance(first, int) else first]
        shape += [size if isinstance(size, int) else length for size in others]
        made = torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        tensors.append(made if entry.shape else made[0])
    return Inputs(tuple(tensors), {})
