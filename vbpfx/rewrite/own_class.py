"""A plan on the model's own class: the one to train."""

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
    """A narrowed copy of the model in its own class; the model itself stays as it was.

    This is the one to train: unlike a graph captured in eval mode it has its dropout, stochastic depth
    and BatchNorm behaviour. Code that computes with a width it remembers (``self.hidden ** -0.5``) is
    beyond any rewrite of tensors: check the result with :func:`vbpfx.verify`, as ``Pruned.apply_to`` does.

    The ``config`` of a Hugging Face model is made to describe the result, where it can: with ``uniform=True`` it
    must, so that ``save_pretrained`` writes what ``from_pretrained`` reads.

    Args:
        model: of the class and the sizes that the plan was made for; its weights may be others.
        plan: which neurons stay, and what stands for the rest.

    Raises:
        ArtifactError: the plan was made for another model (names, shapes and module classes are
            compared), a layer of the model has no place for the bias that the fold makes, or the model's
            code states the hidden width (which only symbolic tracing can tell).
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
            f"would write what from_pretrained cannot read; leave these blocks out with exclude=, or use "
            f"compensation='none' where a bias came into being"
        )
    return small


def _obstacle(model: nn.Module, entry: BlockPlan, plan: Plan, removed: Removed) -> str:
    """Why the class cannot hold a block's narrowing; an empty string where it can."""
    block = entry.block
    for reduction in block.reductions:
        if not _is_norm(model, reduction):
            return (
                f"a statistic over the hidden axis (node {reduction.node}) must go on counting the removed channels, for which "
                f"the class has no place"
            )
    carried_nodes = {reduction.node for reduction in block.reductions}
    for literal in block.literals:
        if literal.node in carried_nodes:  # its module is replaced
            continue
        # torch.export writes every size as a number, wherever it came from: there a literal says nothing of the code
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
    """Whether a statistic is all that one module computes: its norm over the last axis, tried on a few numbers."""
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
    except Exception:  # a module of another kind raises whatever it raises
        return False
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-5))


def _has_place_for_bias(model: nn.Module, consumer: Consumer) -> bool:
    owner, _, attribute = consumer.bias.rpartition(".")
    layer = model.get_submodule(owner)
    # a subclass may compute without the bias it inherits
    own = type(layer).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return consumer.is_layer and own and attribute == "bias" and layer.bias is None


def _unequal_chunks(literals: tuple[SizeLiteral, ...], removed: Removed) -> str | None:
    """A call that cuts an axis into parts by itself and would now cut it elsewhere; None without one."""
    sizes: dict[str, dict[Any, int]] = defaultdict(dict)
    for literal in literals:
        if not literal.by_code:
            sizes[literal.node][literal.path[-1]] = literal.stop - literal.start - gone(literal, removed)
    for node, parts in sizes.items():
        wanted = [parts[index] for index in sorted(parts)]
        whole = torch.empty(sum(wanted))
        cuts = (whole.chunk(len(wanted)), whole.tensor_split(len(wanted)))
        if any(wanted != [len(part) for part in parts_of_it] for parts_of_it in cuts):
            return node
    return None
