"""Influence: how much an error at a layer's value moves the network's output, by position and by channel.

With r a random direction of the output and g = d(r . output) / d y the gradient at the layer's value y, an error e moves
the output along r by g . e. Averaged over samples and directions, without labels,

- positions (tokens, pixels) weigh w_t = (E |g_t|^2)^tau, divided by their median: in a classifier that reads a class token,
  that token counts for more, and nothing here knows that there is one;
- outputs weigh by M = (E g g^T)^(1/2), so that |M e| is the error that matters.

Raw weights are too extreme to be fitted with on little data: tau < 1 tempers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.capture import Captured
from vbpfx.fake import graph_arguments
from vbpfx.inputs import Inputs
from vbpfx.records import Consumer

TEMPER = 0.5
CAP = 100.0
POWER = 0.5  # of E g g^T in the metric


@dataclass(frozen=True)
class Influence:
    """How much the places of one layer's value count.

    Attributes:
        positions: one weight per position of a sample (T,), median 1; None where samples differ in length.
        metric: M (out, out), float64.
    """

    positions: Tensor | None
    metric: Tensor | None


def influences(
    captured: Captured, layers: Sequence[Consumer], batches: Sequence[Inputs], *, temper: float = TEMPER, seed: int = 0
) -> dict[str, Influence]:
    """Influence per layer's node, from one forward and one backward pass over the batches.

    Args:
        batches: a few samples, split small: the activations of a whole batch are held for the backward pass.
        temper: tau.
        seed: of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    squares: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    uneven: set[str] = set()
    for batch in batches:
        for layer, gradient in _gradients(captured, layers, batch, generator):
            rows = gradient.movedim(layer.source.axis, -1).double()
            samples = batch.batch_size or 1
            by_position = rows.square().sum(-1).reshape(samples, -1).sum(0)
            flat = rows.flatten(0, -2)
            product = flat.T @ flat
            if layer.node in squares and squares[layer.node].shape != by_position.shape:
                uneven.add(layer.node)
                continue
            squares[layer.node] = squares.get(layer.node, 0) + by_position
            products[layer.node] = products.get(layer.node, 0) + product
    found = {}
    for node, total in squares.items():
        positions = None if node in uneven else _tempered(total.cpu(), temper)
        values, vectors = torch.linalg.eigh(products[node].cpu())
        metric = (vectors * values.clamp_min(0) ** POWER) @ vectors.T
        found[node] = Influence(positions, metric / metric.diagonal().mean().clamp_min(1e-300))
    return found


def _tempered(squares: Tensor, temper: float) -> Tensor:
    """(g^2)^tau over its median, capped."""
    weights = squares.clamp_min(squares.max() * 1e-12 + 1e-300) ** temper
    return (weights / weights.median()).clamp_max(CAP).float()


def _gradients(
    captured: Captured, layers: Sequence[Consumer], batch: Inputs, generator: torch.Generator
) -> list[tuple[Consumer, Tensor]]:
    """The gradient of a random direction of the output at every layer's value."""
    watched = {layer.node: layer for layer in layers}
    seen: dict[str, Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in watched and isinstance(value, Tensor):
                # a leaf's gradient would stop nothing before it: parameters ask for none here
                value = value if value.requires_grad else value.requires_grad_()
                seen[n.name] = value
            return value

    with torch.enable_grad():
        output = Watching(captured.graph_module).run(
            *graph_arguments(captured.graph_module, batch.map(torch.clone)), enable_io_processing=False
        )
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not leaves:
            return []
        directions = [torch.randn(t.shape, generator=generator).to(t) / (t.detach().std() + 1e-12) for t in leaves]
        names = list(seen)
        gradients = torch.autograd.grad(leaves, [seen[n] for n in names], directions, allow_unused=True)
    return [(watched[n], g.detach()) for n, g in zip(names, gradients, strict=True) if g is not None]
