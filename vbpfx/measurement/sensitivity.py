"""Sensitivity: how far the network's output moves when a single block is narrowed.

It is measured: each block in turn is narrowed by a plan, including the plan's compensation, while all others stay
whole, and a few samples run through the network. Neither gradients nor labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.samples import Samples
from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.display.progress import progress_bar
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured
from vbpfx.graph.fields import returned_nodes
from vbpfx.outputs.differences import squared_errors
from vbpfx.outputs.divergence import divergence
from vbpfx.plans.records import Plan
from vbpfx.rewrite.convert import convert
from vbpfx.rules.calls import called_module
from vbpfx.rules.layers import linear
from vbpfx.rules.table import operator_of

MOST_SAMPLES, _FEWEST_SAMPLES = 64, 8
# The variance of the error of ln D that remains with any number of samples: later blocks compensate for some of the
# loss, and how much differs between blocks. 0.25 corresponds to a factor of about 1.6.
_BLIND = 0.25


def sensitivities(
    analysis: Analysis, plan: Plan, batches: Sequence[Inputs] | Samples, *, progress: bool = False
) -> dict[str, float]:
    """Return block -> D, how far the output moves when the plan narrows that block alone.

    The distance d of a sample is averaged over its positions, and summed over the floating-point outputs. For an output
    that a linear layer with several outputs computes (logits, of which the few large ones matter), it is

        sum_c q_c ln(q_c / r_c)    with q, r the softmax of the dense and the narrowed network's value, in nats.

    For other outputs (embeddings, maps) it is |y - y_b|^2 / 2, which the formula above approaches for small values.

    A few samples give only an uncertain D. So ln D is shrunk toward the mean m over the blocks (empirical Bayes):

        ln D = m + v / (v + e^2 + 1/4) (ln mean(d) - m).

    Here e^2 = Var[d] / (n mean(d)^2) is the sampling variance of ln mean(d), and v is the variance between blocks
    beyond it. The 1/4 accounts for what narrowing a single block cannot show: that later blocks compensate for some of
    its loss.

    If a block moves the output by no more than the output's own rounding (half the squared machine epsilon times
    |y|^2), its D is 0, and it does not enter m and v. Entries that are NaN in the dense output, or infinite in both
    outputs, count as 0.

    Args:
        analysis: the analysis of the dense graph.
        plan: the plan whose widths are compared. Blocks that it does not narrow get no D.
        batches: the samples. The first 8 to 64 of them are run, so that all blocks together cost about half a pass over
            all samples. If several ranks hold the samples (:class:`vbpfx.calibration.samples.Samples`), each runs its
            own.
        progress: show a progress bar on standard error.

    Raises:
        ArtifactError: the plan belongs to another model.
        CalibrationError: there is no sample, or a narrowed network returns NaN or infinite values where the dense one
            does not, so that no distance can be measured.
        RankError: another rank has failed or died.
    """
    captured = analysis.captured
    if not isinstance(batches, Samples):
        batches = [batch.along(captured.inputs) for batch in batches]
    samples = Samples.of(batches)
    batches, starts = _few(samples, len(plan.blocks), divisible=captured.divisible)
    logits = _are_logits(captured)
    axes = [captured.samples_axis(value) or 0 for _, value, _ in _float_outputs(captured)]
    dense = [_outputs(captured.graph_module, batch, axes) for batch in batches]
    numbers = [start + torch.arange(batch.batch_size or 1) for batch, start in zip(batches, starts, strict=True)]
    rounding = [
        _summed([_rounding(t) for t in expected], batch.batch_size or 1)
        for batch, expected in zip(batches, dense, strict=True)
    ]
    rows = [_joined(numbers), _joined(rounding)]
    with progress_bar("comparing blocks", len(plan.blocks), progress and samples.ranks.first) as advance:
        for entry in plan.blocks:
            small = convert(captured, replace(plan, blocks=(entry,), corrections=()), share=True)
            moved = [
                _moved(_outputs(small, batch, axes), expected, logits, batch.batch_size or 1)
                for batch, expected in zip(batches, dense, strict=True)
            ]
            rows.append(_joined(moved))
            samples.ranks.watch()
            advance()
    order, nothing, *found = samples.ranks.gather(torch.stack(rows))
    if not len(order):
        raise CalibrationError("sensitivities are measured on samples, and there are none: pass at least one batch")
    found = [moved[order.argsort()] for moved in found]  # in the order of a single process
    names = [entry.block.name for entry in plan.blocks]
    for name, moved in zip(names, found, strict=True):
        if not bool(moved.isfinite().all()):
            raise CalibrationError(
                f"block {name}: with this block alone narrowed, the network's output holds NaN or infinite values where the dense "
                f"network's does not, so what the block costs cannot be measured; leave it out with exclude={name!r}, or take "
                f"allocation='equal', which measures nothing"
            )
    return dict(zip(names, _drawn_together(found, float(nothing.mean())), strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def _drawn_together(found: Sequence[Tensor], nothing: float = 0.0) -> list[float]:
    """Return D of every block from the distances d of its samples; 0 if their mean is no more than ``nothing``."""
    means = [float(d.mean()) for d in found]
    moving = [number for number, mean in enumerate(means) if mean > max(nothing, torch.finfo(torch.float64).tiny)]
    drawn = [0.0] * len(found)
    if not moving:
        return drawn
    mean = torch.tensor([means[number] for number in moving], dtype=torch.float64)
    logs, n = mean.log(), len(found[0])
    if n > 1:
        # the standard deviation is divided before squaring, because squares of small means underflow float64
        relative = torch.stack([found[number].std() for number in moving]) / mean
        uncertain = relative.square() / n
        spread = (logs.var(correction=0) - uncertain.mean()).clamp_min(0.0)
        part = spread / (spread + uncertain + _BLIND)
        logs = logs.mean() + part * (logs - logs.mean())
    for number, value in zip(moving, logs.exp().tolist(), strict=True):
        drawn[number] = value
    return drawn


def _moved(ours: Sequence[Tensor], dense: Sequence[Tensor], logits: Sequence[bool], samples: int) -> Tensor:
    """Return d for every sample of a batch, (samples,)."""
    distances = (
        _distances(y.double(), t.double(), is_logits) for y, t, is_logits in zip(ours, dense, logits, strict=True)
    )
    return _summed(distances, samples)


def _summed(parts: Iterable[Tensor], samples: int) -> Tensor:
    """Sum the distances of all outputs to one number per sample, (samples,).

    A distance may also be one for all samples together, without a batch axis.
    """
    total = torch.zeros(samples, dtype=torch.float64)
    for rows in parts:
        if rows.numel():
            one_each = rows.ndim and len(rows) == samples
            total += rows.cpu().reshape(samples, -1).mean(1) if one_each else rows.mean().cpu()
    return total


def _distances(y: Tensor, t: Tensor, logits: bool) -> Tensor:
    """Return d at every position."""
    y = y.where(~t.isnan(), 0.0)
    t = t.nan_to_num(0.0, torch.inf, -torch.inf)
    if logits:
        return divergence(y, t).clamp_min(0.0)  # rounding can make it negative
    squares = squared_errors(y, t) / 2
    return squares.sum(-1) if t.ndim > 1 else squares


def _rounding(t: Tensor) -> Tensor:
    """Return the d at every position that rounding alone causes, if each entry of the output is off by its rounding."""
    squares = (torch.where(t.isfinite(), t, 0.0).double() * torch.finfo(t.dtype).eps).square() / 2
    return squares.sum(-1) if t.ndim > 1 else squares


def _are_logits(captured: Captured) -> list[bool]:
    """Return, for every floating-point output in order, whether a linear layer with several outputs computes it."""
    graph_module = captured.graph_module

    def origin(node: fx.Node) -> fx.Node:
        while node.all_input_nodes and operator_of(node, called_module(graph_module, node)).view:
            node = node.all_input_nodes[0]
        return node

    def makes_logits(node: fx.Node, value: Tensor) -> bool:
        return (
            operator_of(node, called_module(graph_module, node)).rule is linear
            and value.ndim > 1
            and value.shape[-1] > 1
        )

    return [alone and makes_logits(origin(node), value) for node, value, alone in _float_outputs(captured)]


def _float_outputs(captured: Captured) -> list[tuple[fx.Node, Tensor, bool]]:
    """Return every floating-point output in order: its node, its value, and whether the node returns nothing else.

    A call such as chunk or split returns several tensors. They are parts of a layer's output, and are not treated as
    logits.
    """
    nodes = returned_nodes(captured.graph_module.graph)
    values = [(n, tensor, tensor is n.meta["val"]) for n in nodes for tensor in tensors_in(n.meta.get("val"))]
    return [entry for entry in values if entry[1].is_floating_point()]


def _outputs(network: fx.GraphModule, batch: Inputs, axes: Sequence[int]) -> list[Tensor]:
    """Return the floating-point outputs, with the batch axis moved to the front unless it is the last axis."""
    with torch.no_grad():
        output = batch.run(network)
    found = [t for t in tensors_in(output) if t.is_floating_point()]
    return [t.movedim(axis, 0) if axis < t.ndim - 1 else t for t, axis in zip(found, axes, strict=True)]


def _few(samples: Samples, blocks: int, *, divisible: bool) -> tuple[list[Inputs], list[int]]:
    """Return the batches of the first samples, on which every block is measured, and the index of each one's start."""
    wanted = max(_FEWEST_SAMPLES, min(MOST_SAMPLES, samples.total // (2 * max(1, blocks))))
    few = [(b, start) for b, start in zip(samples.batches, samples.starts, strict=True) if start < wanted]
    batches = [batch.first(wanted - start) if divisible else batch for batch, start in few]
    return batches, [start for _, start in few]
