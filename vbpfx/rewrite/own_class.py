"""Apply a plan to the model's own class, which can be trained further."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vbpfx.errors import ArtifactError
from vbpfx.graph.capture import fingerprint, require_module
from vbpfx.plans.records import BlockPlan, Consumer, Plan, Reduction, SizeLiteral
from vbpfx.rewrite.carry import CarriedNorm
from vbpfx.rewrite.model_config import describe_widths, has_config
from vbpfx.rewrite.narrow import Removed, carried, gone, narrowed, new_biases, removed_channels, require_same_structure


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a narrowed copy of the model in its own class. The model itself is not changed.

    Train this copy rather than a captured graph: it keeps its dropout, stochastic depth and BatchNorm behaviour, which
    a graph captured in eval mode has lost. If the model's code computes with a width that it remembers, such as
    ``self.hidden ** -0.5``, no change of its tensors can correct that. So check the result with :func:`vbpfx.verify`,
    as ``Pruned.apply_to`` does.

    The ``config`` of a Hugging Face model is changed to describe the result if it can. If the plan was made with
    ``uniform=True`` it must, so that ``from_pretrained`` reads what ``save_pretrained`` writes.

    Args:
        model: a model of the class and sizes that the plan was made for. Its weights may differ.
        plan: the neurons to keep, and what replaces the others.

    Raises:
        ArtifactError: the plan was made for another model (names, shapes and module classes are compared). Or a layer
            has no place for the bias that the fold creates, or the model's code states the hidden width, which only
            symbolic tracing can detect. Or the plan is uniform and the ``config`` cannot describe the result.
    """
    require_module(model)
    require_same_structure(fingerprint(model), plan, model)
    removed = removed_channels(plan)
    obstacles = {entry.block.name: why for entry in plan.blocks if (why := _obstacle(model, entry, plan, removed))}
    if obstacles:
        name, why = next(iter(obstacles.items()))
        raise ArtifactError(
            f"block {name}: {why}; use the GraphModule, or leave out what the class cannot hold: exclude={list(obstacles)}"
        )
    norms = {model.get_submodule(r.module): CarriedNorm(model.get_submodule(r.module), r.kind, constants)
             for r, constants in carried(plan).values()}  # fmt: skip
    small = narrowed(model, plan, share=False, instead=norms)
    if has_config(small) and (wrong := describe_widths(small, plan)) and plan.settings.get("uniform"):
        raise ArtifactError(
            f"the configuration of {type(model).__name__} cannot describe the narrowed {', '.join(wrong[:4])}, so save_pretrained "
            f"would write what from_pretrained cannot read; leave these blocks out with exclude=, or pass "
            f"compensation='none', which creates no biases"
        )
    return small


def _obstacle(model: nn.Module, entry: BlockPlan, plan: Plan, removed: Removed) -> str:
    """Return why the class cannot represent a narrowed block, or "" if it can."""
    block = entry.block
    for reduction in block.reductions:
        if not _is_norm(model, reduction):
            return (
                f"a statistic over the hidden axis (node {reduction.node}) must go on counting the removed channels, for which "
                f"the class has no place"
            )
    for factor in block.factors:
        if factor.scales:
            return f"the model's code lets attention (node {factor.node}) compute its scale from the width, which is narrowed"
    carried_nodes = {reduction.node for reduction in block.reductions}
    for literal in block.literals:
        if literal.node in carried_nodes:  # its module is replaced
            continue
        # torch.export turns every size into a number, so in its graphs a literal does not show what the code states
        if literal.by_code and not literal.follows and plan.frontend == "symbolic" and gone(literal, removed):
            return (
                f"the model's code states the hidden width {block.width} as a number (node {literal.node}), which no rewrite "
                f"of tensors can change"
            )
    if (node := _unequal_chunks(block.literals, removed)) is not None:
        return f"the model's code takes parts of equal size (node {node}), and narrowed they are unequal"
    made = new_biases(plan)
    for consumer in block.consumers:
        if consumer.node in made and not _has_place_for_bias(model, consumer):
            return f"the code around {consumer.weight} adds no bias, so the class cannot hold the fold"
    return ""


def _is_norm(model: nn.Module, reduction: Reduction) -> bool:
    """Return whether one module computes nothing but this norm over the last axis. It is tried on a few numbers."""
    if not reduction.module or reduction.kind not in ("layer_norm", "rms_norm") or reduction.calls > 1:
        return False
    norm: Any = model.get_submodule(reduction.module)
    if len(inspect.signature(norm.forward).parameters) != 1:
        return False
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not hasattr(norm, "eps") or set(dict(norm.named_parameters())) - {"weight", "bias"}:
        return False
    like = weight if isinstance(weight, torch.Tensor) else torch.empty(0)
    x = torch.linspace(-2, 3, 6 * reduction.size, dtype=like.dtype, device=like.device).reshape(2, 3, -1)
    try:
        with torch.no_grad():
            found = norm(x)
            expected = (
                F.layer_norm(x, (reduction.size,), weight, bias, norm.eps)
                if reduction.kind == "layer_norm"
                else F.rms_norm(x, (reduction.size,), weight, norm.eps)
            )
    except Exception:  # a module of another kind may raise any exception
        return False
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-5))


def _has_place_for_bias(model: nn.Module, consumer: Consumer) -> bool:
    owner, _, attribute = consumer.bias.rpartition(".")
    layer = model.get_submodule(owner)
    # the forward of a subclass may ignore the bias that it inherits
    own = type(layer).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return consumer.is_layer and own and attribute == "bias" and layer.bias is None


def _unequal_chunks(literals: tuple[SizeLiteral, ...], removed: Removed) -> str | None:
    """Return the name of a call such as ``chunk`` that would cut the narrowed axis at wrong places, or None."""
    sizes: dict[str, dict[Any, int]] = defaultdict(dict)
    for literal in literals:
        if not literal.by_code and not literal.of_module:
            sizes[literal.node][literal.path[-1]] = literal.stop - literal.start - gone(literal, removed)
    for node, parts in sizes.items():
        wanted = [parts[index] for index in sorted(parts)]
        whole = torch.empty(sum(wanted))
        cuts = (whole.chunk(len(wanted)), whole.tensor_split(len(wanted)))
        if any(wanted != [len(part) for part in parts_of_it] for parts_of_it in cuts):
            return node
    return None
