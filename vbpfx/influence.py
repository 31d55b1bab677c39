"""Influence: how much an error at a layer's value moves the network's output, by position and by channel.

With r a random direction of the output and g = d(r . output) / d y the gradient at the layer's value y, an error e moves
the output along r by g . e. No label is needed:

- every row (a token, a pixel of one sample) weighs w = |g|^(2 tau) over the mean of that. In a classifier that reads a class
  token, that token comes to count for more, as do the patches that it looks at, and nothing here knows that there is one;
- outputs weigh by M = (E g g^T)^rho: |M e| is nearer to the error that matters than |e|.

Raw weights (tau = 1, rho = 1/2) are too extreme for as little data as there is; the exponents temper them.
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

# tau and rho
TEMPER = 0.5
METRIC_POWER = 0.25
_LEAST = 1e-3  # of a row that the output does not depend on: a fit needs rows
# The activations of so many samples are held for the backward pass.
_SAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class Influence:
    """How much the places of one layer's value count.

    Attributes:
        weights: per batch one weight per position, shaped as the value with a channel axis of length 1; their mean is about 1.
        metric: M (out, out), float64.
    """

    weights: tuple[Tensor, ...]
    metric: Tensor


def influences(
    captured: Captured,
    layers: Sequence[Consumer],
    batches: Sequence[Inputs],
    *,
    temper: float = TEMPER,
    power: float = METRIC_POWER,
    seed: int = 0,
) -> dict[str, Influence]:
    """Influence per layer's node, from one forward and one backward pass over the batches.

    A layer that the output does not depend on by a gradient has none, and no layer has any where the model cannot be
    differentiated (it changes values in place, or uses operators without a derivative).

    Args:
        temper: tau.
        power: rho.
        seed: of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    squares: dict[str, list[Tensor]] = {layer.node: [] for layer in layers}
    products: dict[str, Tensor] = {}
    for batch in batches:
        parts: dict[str, list[Tensor]] = {layer.node: [] for layer in layers}
        for chunk in _chunks(captured, batch):
            for layer, gradient in _gradients(captured, layers, chunk, generator):
                rows = gradient.movedim(layer.source.axis, -1).flatten(0, -2)
                product = (rows.T @ rows).double()
                products[layer.node] = products[layer.node] + product if layer.node in products else product
                parts[layer.node].append(gradient.square().sum(layer.source.axis, keepdim=True).float())
        for node, found in parts.items():
            if found:
                squares[node].append(torch.cat(found))
    complete = [node for node, found in squares.items() if len(found) == len(batches)]
    return {node: _influence(squares[node], products[node], temper, power) for node in complete}


def _influence(squares: list[Tensor], product: Tensor, temper: float, power: float) -> Influence:
    weights = [square**temper for square in squares]
    mean = torch.cat([weight.flatten() for weight in weights]).double().mean()
    if not mean > 0:  # no gradient comes through, though a path does
        return Influence(tuple(torch.ones_like(weight) for weight in weights), torch.eye(len(product)).double())
    weights = [(weight / mean).float() + _LEAST for weight in weights]
    values, vectors = torch.linalg.eigh(product.cpu() / product.diagonal().mean().clamp_min(1e-300).cpu())
    metric = (vectors * values.clamp_min(0) ** power) @ vectors.T
    return Influence(tuple(weights), metric)


def _chunks(captured: Captured, batch: Inputs) -> list[Inputs]:
    """The batch in pieces of a few samples, where the graph takes any number."""
    samples = batch.batch_size
    if captured.batch is None or samples is None:
        return [batch]
    return [batch.samples(start, start + _SAMPLES_AT_ONCE) for start in range(0, samples, _SAMPLES_AT_ONCE)]


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
                value = value if value.requires_grad else value.requires_grad_()
                seen[n.name] = value
            return value

    arguments = graph_arguments(captured.graph_module, batch.map(torch.clone))
    try:
        with torch.enable_grad():
            output = Watching(captured.graph_module).run(*arguments, enable_io_processing=False)
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if not leaves:
                return []
            directions = [torch.randn(t.shape, generator=generator).to(t) / (t.detach().std() + 1e-12) for t in leaves]
            gradients = torch.autograd.grad(leaves, list(seen.values()), directions, allow_unused=True)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return []
    # a root at zero, for one, has no finite derivative
    finite = [None if g is None else g.detach().nan_to_num(0.0, 0.0, 0.0) for g in gradients]
    return [(watched[n], g) for n, g in zip(seen, finite, strict=True) if g is not None]
