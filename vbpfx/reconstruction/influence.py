"""Influence: how much an error at a layer's value moves the network's output, by position and by channel.

With r a random direction of the output and g = d(r . output) / d y the gradient at the layer's value y, an error e moves
the output along r by g . e. No label is needed:

- every row (a token, a pixel of one sample) weighs w = |g|^(2 tau) over the mean of that. In a classifier that reads a class
  token, that token comes to count for more, as do the patches that it looks at, and nothing here knows that there is one;
- outputs weigh by M = (E g g^T)^rho: |M e| is nearer to the error that matters than |e|.

Raw weights (tau = 1, rho = 1/2) are too extreme for as little data as there is; the exponents temper them.
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
_LEAST = 1e-3  # of a row that the output does not depend on: a fit needs rows
# The activations of so many samples are held for the backward pass where nothing is said of the memory, and at most.
SAMPLES_AT_ONCE, _MOST_AT_ONCE = 16, 256


@dataclass(frozen=True)
class Influence:
    """How much the places of one layer's value count.

    Attributes:
        weights: per batch one weight per position, shaped as the value with a channel axis of length 1; their mean over all calls
            of the layer is about 1.
        metric: M (out, out), float64, of all calls of the layer; None for a layer that was to have none.
    """

    weights: tuple[Tensor, ...]
    metric: Tensor | None


class Gradients:
    """Forward and backward passes, batch after batch, and what they add up to.

    Args:
        captured: the graph.
        layers: at whose values gradients are taken.
        metrics: the nodes of those layers that are to have a metric; all by default.
        graph_module: the graph to run, with the captured one's nodes; a prepared one gathers its statistics on the way.
        at_once: how many samples' activations are held for a backward pass.
        seed: of the random directions.
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
            start: the number of its first sample, from which its random directions follow; by default those before count.

        Raises:
            RuntimeError: whatever the graph's operators, and their derivatives, raise.
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
        """Influence per layer's node; a layer that the output does not depend on by a gradient has none.

        Args:
            temper: tau.
            power: rho.
            ranks: weights are relative to the mean of all ranks' batches, metrics of all of them.
        """
        *found, batches = ranks.sums([*(len(squares) for squares in self.squares.values()), self.batches])
        complete = [node for node, number in zip(self.squares, found, strict=True) if number == batches > 0]
        return {node: self._influence(node, temper, power, ranks) for node in complete}

    def state(self) -> dict[str, Tensor]:
        """What was added up so far, for a file."""
        squares = {f"squares/{node}/{n}": s for node, found in self.squares.items() for n, s in enumerate(found)}
        products = {f"products/{node}": product for node, product in self.products.items()}
        return {"batches": torch.tensor(self.batches), **squares, **products}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
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
        if not 0 < total < math.inf:  # no gradient comes through, though a path does; or squares that leave float32
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
        """The gradient of a random direction of the output at every layer's value."""
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
        # a root at zero, for one, has no finite derivative
        return [
            (n, g.detach().nan_to_num(0.0, 0.0, 0.0)) for n, g in zip(seen, gradients, strict=True) if g is not None
        ]


def _joined(parts: Sequence[Tensor], axis: int | None) -> Tensor:
    """Squares of gradients from a few samples at a time as those of the whole batch; what has no samples has one mean."""
    return torch.stack(list(parts)).mean(0) if axis is None else torch.cat(list(parts), axis)


def _spread(value: Tensor) -> Tensor:
    """Its standard deviation; the size of a single entry, which has none."""
    return value.detach().std() if value.numel() > 1 else value.detach().abs()


def is_differentiable(captured: Captured, layers: Sequence[Consumer], at_once: int = SAMPLES_AT_ONCE) -> bool:
    """Whether gradients can be taken at the layers' values: no value is changed in place, every operator has a derivative.

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
    """How many samples' activations a forward and a backward pass may hold in so many GiB, at least one.

    Counted are the values of all nodes, all of which a backward pass may need, and as much again for their gradients.
    """
    tensors = tensors_in([node.meta.get("val") for node in captured.graph_module.graph.nodes if node.op != "get_attr"])
    held = 2 * sum(t.numel() * t.element_size() for t in tensors)
    a_sample = held / (captured.batch or captured.inputs.batch_size or 1)
    return max(1, min(_MOST_AT_ONCE, int(memory * 2**30 / max(1.0, a_sample))))


def _chunks(captured: Captured, batch: Inputs, at_once: int) -> list[Inputs]:
    """The batch in pieces of a few samples, where the graph makes of each what it is by itself."""
    samples = batch.batch_size
    if not captured.divisible or samples is None:
        return [batch]
    return [batch.samples(start, start + at_once) for start in range(0, samples, at_once)]
