"""Influence: how much an error in a layer's output moves the network's output, by position and by channel.

Let r be a random direction of the network's output, y the layer's output and g = d(r . output) / dy the gradient there.
An error e in y moves the network's output along r by g . e. No label is needed. The gradients give two kinds of
weights:

- Every row (a token or a pixel of one sample) has the weight w = |g|^(2 tau), divided by the mean of these weights. In
  a classifier that reads a class token, this token gets a larger weight, and so do the patches that it attends to. The
  code does not need to know that there is a class token.
- The layer's output channels are weighted by M = (E g g^T)^rho: |M e| is closer to the error that matters than |e|.

Raw weights (tau = 1, rho = 1/2) are too extreme for so little data, so smaller exponents temper them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vbpfx.calibration.moments import widened
from vbpfx.calibration.observer import as_rows
from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.distributed.ranks import ALONE, Ranks
from vbpfx.graph.capture import Captured
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.precision import full_float32
from vbpfx.plans.records import Consumer

# tau and rho
TEMPER = 0.5
METRIC_POWER = 0.25
_LEAST = 1e-3  # added to every weight, so that rows that do not influence the output still take part in a fit
# How many samples' activations are held for a backward pass: the number without a memory limit, and the largest number.
SAMPLES_AT_ONCE, _MOST_AT_ONCE = 16, 256


@dataclass(frozen=True)
class Influence:
    """How much errors at the positions and channels of one layer's output count.

    Attributes:
        weights: one tensor per batch with one weight per position. It has the shape of the layer's output with a
            channel axis of length 1. The mean over all calls of the layer is about 1.
        metric: M (out, out), float64, over all calls of the layer. It is None if no metric was asked for, or if the
            gradients are zero or too large to compute one.
    """

    weights: tuple[Tensor, ...]
    metric: Tensor | None


class Gradients:
    """Runs forward and backward passes, batch after batch, and accumulates the gradients' squares and products.

    Args:
        captured: the captured graph.
        layers: the layers at whose outputs gradients are taken.
        graph_module: the graph to run; it must have the nodes of the captured graph. A prepared graph also gathers its
            statistics in these passes. The captured graph by default.
        metrics: names of the layers' nodes that get a metric; all by default.
        at_once: the number of samples whose activations are held for one backward pass.
        seed: seed of the random directions.
    """

    def __init__(
        self,
        captured: Captured,
        layers: Sequence[Consumer],
        graph_module: fx.GraphModule | None = None,
        *,
        metrics: Collection[str] | None = None,
        at_once: int = SAMPLES_AT_ONCE,
        seed: int = 0,
    ) -> None:
        self.captured, self.layers = captured, {layer.node: layer for layer in layers}
        self.metrics = self.layers.keys() if metrics is None else metrics
        self.graph_module = captured.graph_module if graph_module is None else graph_module
        self.at_once = at_once
        self.generator, self.seed, self.samples = torch.Generator(), seed, 0
        self.squares: dict[str, list[Tensor]] = {node: [] for node in self.layers}
        self.products: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, batch: Inputs, start: int | None = None) -> None:
        """Run a batch, a few samples at a time.

        Args:
            start: the number of the batch's first sample. It seeds the random directions. By default the number of
                samples that were added before.

        Raises:
            RuntimeError: an operator of the graph, or its derivative, raised it.
        """
        parts: dict[str, list[Tensor]] = {node: [] for node in self.layers}
        self.samples = self.samples if start is None else start
        for chunk in _chunks(self.captured, batch, self.at_once):
            self.generator.manual_seed(self.seed + self.samples)
            self.samples += chunk.batch_size or 1
            for node, own in self._gradients(chunk):
                axis, gradient = self.layers[node].source.axis, widened(own)  # before it is squared
                if node in self.metrics:
                    rows = as_rows(gradient, axis)
                    with full_float32():
                        product = (rows.T @ rows).double()
                    self.products[node] = self.products[node] + product if node in self.products else product
                parts[node].append(gradient.square().sum(axis, keepdim=True).float())
        for node, found in parts.items():
            if found:
                self.squares[node].append(_joined(found, self.captured.samples_axis(node)))
        self.batches += 1

    def influences(
        self, temper: float = TEMPER, power: float = METRIC_POWER, ranks: Ranks = ALONE
    ) -> dict[str, Influence]:
        """Return the influence by layer node. A layer is left out if no gradient of the output reaches it.

        Args:
            temper: tau.
            power: rho.
            ranks: the processes that share the data. Weights are relative to the mean over the batches of all ranks,
                and metrics are taken over the batches of all ranks.
        """
        *found, batches = ranks.sums([*(len(squares) for squares in self.squares.values()), self.batches])
        complete = [node for node, number in zip(self.squares, found, strict=True) if number == batches > 0]
        return {node: self._influence(node, temper, power, ranks) for node in complete}

    def state(self) -> dict[str, Tensor]:
        """Return what was accumulated so far, for a checkpoint."""
        squares = {f"squares/{node}/{n}": s for node, found in self.squares.items() for n, s in enumerate(found)}
        products = {f"products/{node}": product for node, product in self.products.items()}
        return {"batches": torch.tensor(self.batches), **squares, **products}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned."""
        self.batches = int(state["batches"])
        for node, found in self.squares.items():
            found[:] = [state[key] for n in range(self.batches) if (key := f"squares/{node}/{n}") in state]
        self.products = {n: state[key] for n in self.layers if (key := f"products/{n}") in state}

    def _influence(self, node: str, temper: float, power: float, ranks: Ranks) -> Influence:
        weights = [square**temper for square in self.squares[node]]
        calls = [other for other, layer in self.layers.items() if layer.weight == self.layers[node].weight]
        every = weights if len(calls) == 1 else [square**temper for call in calls for square in self.squares[call]]
        total, count = ranks.sums(
            [sum(w.double().sum().item() for w in every), sum(weight.numel() for weight in every)]
        )
        if not 0 < total < math.inf:  # gradients are zero although a path exists, or their squares overflow
            return Influence(tuple(torch.ones_like(weight) for weight in weights), None)
        weights = [(weight / (total / count)).float() + _LEAST for weight in weights]
        if node not in self.metrics:
            return Influence(tuple(weights), None)
        outputs = self.captured.nodes[node].meta["val"].shape[self.layers[node].source.axis]
        zero = torch.zeros(outputs, outputs, dtype=torch.float64)
        product = torch.stack([self.products.get(call, zero) for call in calls]).sum(0)
        product = ranks.sum([product.cpu()])[0]
        if not bool(product.isfinite().all()):
            return Influence(tuple(weights), None)
        values, vectors = torch.linalg.eigh(product / product.diagonal().mean().clamp_min(1e-300))
        metric = (vectors * values.clamp_min(0) ** power) @ vectors.T
        return Influence(tuple(weights), metric)

    def _gradients(self, batch: Inputs) -> list[tuple[str, Tensor]]:
        """Return the gradient of a random direction of the network's output at every layer's output, by node name."""
        seen: dict[str, Tensor] = {}
        layers = self.layers

        class Watching(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                value = super().run_node(n)
                if n.name in layers and isinstance(value, Tensor):
                    value = value if value.requires_grad else value.requires_grad_()
                    seen[n.name] = value
                return value

        arguments = graph_arguments(self.graph_module, batch.map(torch.clone))
        with torch.enable_grad():
            output = Watching(self.graph_module).run(*arguments, enable_io_processing=False)
            leaves = [t for t in tensors_in(output) if t.requires_grad]
            if not leaves:
                return []
            directions = [torch.randn(t.shape, generator=self.generator).to(t) / (_spread(t) + 1e-12) for t in leaves]
            gradients = torch.autograd.grad(leaves, list(seen.values()), directions, allow_unused=True)
        # a derivative need not be finite: that of a square root at zero is not
        return [
            (n, g.detach().nan_to_num(0.0, 0.0, 0.0)) for n, g in zip(seen, gradients, strict=True) if g is not None
        ]


def _joined(parts: Sequence[Tensor], axis: int | None) -> Tensor:
    """Return the squared gradients of a whole batch from those of its parts.

    They are concatenated along the samples' axis, or averaged for a value without such an axis.
    """
    return torch.stack(list(parts)).mean(0) if axis is None else torch.cat(list(parts), axis)


def _spread(value: Tensor) -> Tensor:
    """Return the standard deviation of a value, or the absolute value of a single entry, which has no deviation."""
    return value.detach().std() if value.numel() > 1 else value.detach().abs()


def is_differentiable(captured: Captured, layers: Sequence[Consumer], at_once: int = SAMPLES_AT_ONCE) -> bool:
    """Return whether gradients can be taken at the layers' outputs.

    They cannot if a needed value is changed in place, or if an operator has no derivative. This is tried on the
    captured graph's inputs.

    Args:
        at_once: as for :class:`Gradients`.
    """
    try:
        Gradients(captured, layers, at_once=at_once).add(captured.inputs)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True


def samples_at_once(captured: Captured, memory: float) -> int:
    """Return for how many samples a forward and a backward pass fit in ``memory`` GiB; at least one.

    This counts the values of all nodes, since a backward pass may need all of them, and as much again for their
    gradients.
    """
    tensors = tensors_in([node.meta.get("val") for node in captured.graph_module.graph.nodes if node.op != "get_attr"])
    size = 2 * sum(t.numel() * t.element_size() for t in tensors)
    a_sample = size / (captured.batch or captured.inputs.batch_size or 1)
    return max(1, min(_MOST_AT_ONCE, int(memory * 2**30 / max(1.0, a_sample))))


def _chunks(captured: Captured, batch: Inputs, at_once: int) -> list[Inputs]:
    """Return the batch in parts of ``at_once`` samples, or whole if splitting it could change the graph's results."""
    samples = batch.batch_size
    if not captured.divisible or samples is None:
        return [batch]
    return [batch.samples(start, start + at_once) for start in range(0, samples, at_once)]
