"""Models of Hugging Face transformers, loaded from a folder or by name, with their weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_logging
from vbpfx.errors import ModelError, first_line
from vbpfx.models.source import ModelSource, package
from vbpfx.models.weightless import architecture

_TOKENS = 128  # the number of tokens in an example text, if the model allows that many


def _make(name: str, rest: str) -> nn.Module:
    transformers = package(name, "transformers", "transformers")
    try:
        with _quiet_transformers(transformers):
            return _from_pretrained(transformers, rest)
    except Exception as error:  # the hub, the configuration and the model class may raise any exception
        raise ModelError(
            f"transformers cannot load {rest!r} ({type(error).__name__}: {first_line(error)}); pass the name of a model, or a "
            f"folder with config.json and the weights"
        ) from error


@contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """Switch off the progress bar of transformers, which it draws even if nobody sees it."""
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
    config.use_cache = False  # a single forward pass needs no cache
    with torch.device("cpu"), quiet_logging():  # this imports modules, as in imported()
        kind = architecture(transformers, config) or transformers.AutoModel
    if torch.get_default_device().type == "meta":  # the weights are not wanted
        made: nn.Module = transformers.AutoModel.from_config(config) if kind is transformers.AutoModel else kind(config)
        return made
    model: nn.Module = kind.from_pretrained(rest, config=config)
    return model


def _example_inputs(model: nn.Module, batch: int, dtype: torch.dtype) -> Inputs | None:
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
    return None


HUGGING_FACE = ModelSource("hf:NAME-or-folder", _make, _example_inputs)
