"""Models of timm, with random weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vbpfx.data.inputs import Inputs
from vbpfx.models.source import ModelSource, package, unknown_model


def _make(name: str, rest: str) -> nn.Module:
    timm = package(name, "timm", "timm torchvision")
    if not timm.is_model(rest):
        raise unknown_model("timm", rest, timm.list_models)
    model: nn.Module = timm.create_model(rest)
    return model


def _example_inputs(model: nn.Module, batch: int, dtype: torch.dtype) -> Inputs | None:
    settings = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, Mapping) or not settings.get("input_size"):
        return None
    return Inputs((torch.randn(batch, *settings["input_size"], dtype=dtype),), {})


TIMM = ModelSource("timm:NAME", _make, _example_inputs, random_weights=True)
