"""Helpers for the tests: run all stages in few lines, and check that the model is unchanged."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from exactness import randomize
from torch import nn

import vbpfx
from vbpfx.data.inputs import as_inputs

__all__ = ["Stages", "assert_unchanged", "double", "randomize", "stages", "state"]


@dataclass
class Stages:
    """The results of all stages for one model."""

    captured: vbpfx.Captured
    analysis: vbpfx.Analysis
    statistics: vbpfx.Statistics
    plan: vbpfx.Plan
    small: torch.fx.GraphModule


def stages(model: nn.Module, batch: Any, *, frontend: str = "auto", **options: Any) -> Stages:
    """Capture, analyse, calibrate on one batch, plan and convert."""
    captured = vbpfx.capture(model, batch, frontend=frontend)
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis)
    inputs = as_inputs(batch, model)
    with torch.no_grad():
        observed(*inputs.args, **inputs.kwargs)
    statistics = vbpfx.statistics(observed)
    plan = vbpfx.make_plan(analysis, statistics, **(options or {"ratio": 0.5}))
    return Stages(captured, analysis, statistics, plan, vbpfx.convert(captured, plan))


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that pruning must leave unchanged."""
    return {
        "tensors": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "identities": {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that the model is unchanged, bit for bit."""
    after = state(model)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), f"{name} changed"
    grads = before.pop("grads")
    assert all(g is None or torch.equal(g, after["grads"][n]) for n, g in grads.items())
    for key, value in before.items():
        assert after[key] == value, f"{key} changed"


def double(model: nn.Module) -> nn.Module:
    """Return a float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()
