"""Models of torchvision, with random weights."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.display.quiet import quiet_warnings
from vbpfx.models.source import ModelSource, package, unknown_model


def _make(name: str, rest: str) -> nn.Module:
    models = package(name, "torchvision.models", "torchvision")
    if rest not in models.list_models():
        raise unknown_model("torchvision", rest, lambda pattern: models.list_models(include=pattern))
    # no downloads: detection and segmentation models would fetch a backbone
    signature = inspect.signature(models.get_model_builder(rest))
    extra = {"weights_backbone": None} if "weights_backbone" in signature.parameters else {}
    with quiet_warnings():  # inception and googlenet warn that other versions initialise weights differently
        model: nn.Module = models.get_model(rest, weights=None, **extra)
    return model


def _example_inputs(model: nn.Module, batch: int, dtype: torch.dtype) -> Inputs | None:
    if not type(model).__module__.startswith("torchvision."):
        return None
    return Inputs((torch.randn(batch, 3, 224, 224, dtype=dtype),), {})


TORCHVISION = ModelSource("torchvision:NAME", _make, _example_inputs, random_weights=True)
