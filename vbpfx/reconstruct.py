"""Reconstruction, block after block: layers are fitted to the dense network on what the narrowed one really feeds them.

Two streams of calibration data go through the network side by side (:mod:`vbpfx.stream`): the dense one, and one that is
narrowed so far (:mod:`vbpfx.substitute`). At each layer the target is

    t = y_dense + m (s_dense - s_narrowed),

what the dense layer makes of the dense stream, and a share m of what the residual stream that it is added to has lost on
the way (:mod:`vbpfx.residual`). The layer is fitted to it on the narrowed stream's own input x, by ridge regression toward
its old weights (:mod:`vbpfx.regression`). Where it reads a block, the neurons that stay are chosen on the way, by greedy
elimination from the fit on all of them (:mod:`vbpfx.elimination`). m = 1 would ask every layer to make good everything
that is lost; but what cannot be predicted is then answered by shrinking the signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from vbpfx.blocks import Analysis
from vbpfx.calibrate import progress_bar
from vbpfx.capture import named_tensors
from vbpfx.elimination import PENALTY, elimination_costs
from vbpfx.fake import graph_arguments
from vbpfx.influence import Influence
from vbpfx.inputs import Inputs
from vbpfx.masks import Mask, find_masks
from vbpfx.observer import as_rows
from vbpfx.prepare import rows_a_sample, rows_between
from vbpfx.records import BlockPlan, Consumer, Plan
from vbpfx.regression import Normal, Sums, best_penalty, fit
from vbpfx.residual import find_residual_sum, pull_back
from vbpfx.stream import Stream
from vbpfx.substitute import Correct, in_narrow_shape, prepared_reference

# m for layers that read a block, and for the others.
SHARE = 0.4
# Relative ridge penalties toward the weights as they were, and toward the best linear prediction on the layer's own value.
PENALTIES = (1e-2, 1e-1, 1.0)
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Step:
    """One layer on the way.

    Attributes:
        layer: the layer.
        chooses: the plan's entry whose neurons are chosen here; None where nothing is.
    """

    layer: Consumer
    chooses: BlockPlan | None


def reconstruct(
    analysis: Analysis,
    plan: Plan,
    batches: Sequence[Inputs],
    *,
    beside: Sequence[Consumer] = (),
    influence: Mapping[str, Influence] | None = None,
    share: float = SHARE,
    mask: str | None = None,
    progress: bool = False,
) -> Plan:
    """A plan with the same widths whose layers are fitted block after block.

    Args:
        analysis: of the model that the plan was made for.
        plan: whose widths are kept. Blocks that cannot be chosen anew on the way (norms over the hidden axis, several
            sources, layers called several times) stay as they are in it.
        batches: the calibration data, on the model's device; what the streams hold between two layers must fit in memory.
        beside: layers beside the blocks that are fitted, too, without changing shape.
        influence: per node of a layer, how much its positions and outputs count (:mod:`vbpfx.influence`).
        share: m.
        mask: as for :func:`vbpfx.prepare`.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: a fit is not finite.
    """
    steps = _steps(analysis, plan, beside)
    run = _Reconstruction(analysis, plan, batches, steps, influence or {}, share, mask)
    with progress_bar("reconstructing", len(steps), progress) as advance:
        for number, step in enumerate(steps):
            run.take(number, step)
            advance()
    return run.result()


def _steps(analysis: Analysis, plan: Plan, beside: Sequence[Consumer]) -> list[Step]:
    """The layers to fit, in graph order."""
    layers = {layer.node: layer for layer in analysis.layers}
    choosing: dict[str, BlockPlan] = {}
    reading: set[str] = set()
    for entry in plan.blocks:
        nodes = [consumer.node for consumer in entry.block.consumers]
        reading |= layers.keys() & set(nodes)
        if len(entry.block.sources) == 1 and not entry.block.reductions and layers.keys() >= set(nodes):
            choosing[nodes[0]] = entry
    chosen = reading | {layer.node for layer in beside}
    return [Step(layer, choosing.get(node)) for node, layer in layers.items() if node in chosen]


class _Reconstruction:
    """The two streams, and what has been decided so far."""

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        batches: Sequence[Inputs],
        steps: Sequence[Step],
        influence: Mapping[str, Influence],
        share: float,
        mask: str | None,
    ) -> None:
        self.captured, self.plan, self.batches, self.share, self.influence = (
            analysis.captured, plan, batches, share, influence,
        )  # fmt: skip
        self.tensors = named_tensors(self.captured.reference)
        self.entries = {entry.block.name: entry for entry in plan.blocks}
        narrowed, self.substitutes, corrects = prepared_reference(
            self.captured, [entry.block for entry in plan.blocks], [step.layer for step in steps]
        )
        self.corrects: list[Correct] = corrects
        pending = {step.chooses.block.name for step in steps if step.chooses}
        for name, places in self.substitutes.items():
            for place in places if name not in pending else ():
                place.set(self.entries[name])
        self.dense = Stream(self.captured.graph_module, batches)
        self.narrow = Stream(narrowed, batches)
        self.places = _places(narrowed)
        sources = {step.layer.source: self._width(step.layer) for step in steps}
        self.masks = find_masks(self.captured, sources, mask)
        self.every = rows_between(self.captured, sources)
        self.fits: list[tuple[Consumer, Tensor, Tensor]] = []

    def take(self, number: int, step: Step) -> None:
        """Bring both streams to a layer, fit it, and put the fit in its place."""
        layer, entry = step.layer, step.chooses
        first = self.places[self.substitutes[entry.block.name][0]] if entry else layer.node
        self.narrow.run_before(first)
        self.dense.run_through(layer.node)
        sums = self._gather(layer)
        weight, bias = self._matrix(layer), self._bias(layer)
        if entry is not None:
            entry = self._choose(entry, layer, sums, weight)
            self.entries[entry.block.name] = entry
            for place in self.substitutes[entry.block.name]:
                place.set(entry)
        folded, shifted, gone = self._folded(layer, weight, bias)
        columns = torch.tensor([c for c in range(weight.shape[1]) if c not in gone])
        toward = folded
        if gone and entry is not None:
            toward = _on_what_stays(sums.all, weight, columns)
        free = None if self._takes_bias(layer) else bias
        penalty = best_penalty(sums, toward, PENALTIES, columns)
        fitted, intercept = fit(sums.all, toward, penalty, columns, free)
        self.fits.append((layer, fitted - folded, intercept - shifted))
        self.corrects[number].set((fitted - folded).float(), (intercept - shifted).float())

    def result(self) -> Plan:
        """The plan with everything that was chosen and fitted."""
        blocks = tuple(self.entries[entry.block.name] for entry in self.plan.blocks)
        plan = replace(self.plan, blocks=blocks)
        corrections = tuple(
            in_narrow_shape(layer, weight, bias, self.tensors[layer.weight], plan) for layer, weight, bias in self.fits
        )
        return replace(plan, corrections=corrections)

    def _gather(self, layer: Consumer) -> Sums:
        """The sums of a layer's regression over all batches."""
        source, sums = layer.source, Sums()
        residual = find_residual_sum(self.captured, layer.node)
        if residual is not None and not (self.dense.holds(residual.stream) and self.narrow.holds(residual.stream)):
            residual = None
        mask, about = self.masks.get(source), self.influence.get(layer.node)
        a_sample, seen = rows_a_sample(self.captured, source), 0
        for number in range(len(self.batches)):
            x, y = self.narrow.value(number, source.node), self.dense.value(number, layer.node)
            target = y
            if residual is not None and self.share:
                lost = self.dense.value(number, residual.stream) - self.narrow.value(number, residual.stream)
                wish = pull_back(self.dense, number, layer.node, residual, y, lost)
                target = y if wish is None else y + self.share * wish
            padding = self._mask(number, mask)
            xs, ts = (as_rows(v, source.axis, padding, mask.axes if mask else ()) for v in (x, target))
            rows, weights = _sample(len(xs), seen, self.every[source], about.positions if about else None)
            held = (rows + seen) // a_sample % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            for part, is_held in ((~held, False), (held, True)):
                if bool(part.any()):
                    sums.add(xs[rows[part]], ts[rows[part]], weights[part], is_held)
            seen += len(xs)
        return sums

    def _choose(self, entry: BlockPlan, layer: Consumer, sums: Sums, weight: Tensor) -> BlockPlan:
        """The block's neurons that stay: greedy elimination from the fit on all of them, as many as planned."""
        block, start, normal = entry.block, layer.source.start, sums.all
        consumer = block.consumers[0]
        start = consumer.source.start
        everything, _ = fit(normal, weight, PENALTY)
        about = self.influence.get(layer.node)
        if about is not None and about.metric is not None:
            everything = about.metric @ everything
        others = [self._matrix(other) for other in block.consumers[1:]]
        among = torch.arange(start, start + block.width)
        gone = self._gone(layer)
        present = torch.tensor([c for c in range(weight.shape[1]) if c not in gone])
        place = {int(c): i for i, c in enumerate(present)}
        inputs = [(normal.xx[present][:, present], torch.cat([everything, *others])[:, present])]
        order, _ = elimination_costs(inputs, len(entry.pruned), torch.tensor([place[int(c)] for c in among]))
        pruned = {int(present[i]) - start for i in order}
        kept = tuple(c for c in range(block.width) if c not in pruned)
        means = normal.mean_x[[start + c for c in sorted(pruned)]]
        return BlockPlan(block, kept, (means,), (None,))

    def _folded(self, layer: Consumer, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, set[int]]:
        """W and b with everything that is removed before the layer folded in, and the columns that are gone."""
        folded, shifted = weight.clone(), bias.clone()
        for entry in self._decided():
            for consumer in entry.block.consumers:
                if consumer.node == layer.node:
                    start = consumer.source.start
                    pruned, kept = torch.tensor(entry.pruned) + start, torch.tensor(entry.kept) + start
                    prediction = entry.prediction_at(consumer.source)
                    if prediction is not None:
                        folded[:, kept] += weight[:, pruned] @ prediction.double()
                    shifted += weight[:, pruned] @ entry.constants_at(consumer.source)
        gone = self._gone(layer)
        folded[:, sorted(gone)] = 0
        return folded, shifted, gone

    def _gone(self, layer: Consumer) -> set[int]:
        """The columns of a layer whose input channels are removed, as far as that is decided."""
        return {
            parameter.start + p
            for entry in self._decided()
            for parameter in entry.block.parameters
            if (parameter.name, parameter.axis) == (layer.weight, layer.weight_axis)
            for p in entry.pruned
        }

    def _decided(self) -> list[BlockPlan]:
        """Every entry that stands in its place already."""
        return [self.entries[name] for name, places in self.substitutes.items() if all(p.entry for p in places)]

    def _matrix(self, layer: Consumer) -> Tensor:
        """W (out, in), float64, on the CPU."""
        weight = self.tensors[layer.weight].detach().double().cpu()
        weight = weight.flatten(1) if weight.ndim > 2 else weight
        return weight.T if layer.weight_axis == 0 else weight

    def _width(self, layer: Consumer) -> int:
        return self.tensors[layer.weight].shape[layer.weight_axis]

    def _bias(self, layer: Consumer) -> Tensor:
        """b (out,), float64, on the CPU; zero where there is none."""
        if layer.creates_bias:
            return torch.zeros(self.tensors[layer.weight].shape[1 - layer.weight_axis], dtype=torch.float64)
        return self.tensors[layer.bias].detach().double().cpu()

    def _takes_bias(self, layer: Consumer) -> bool:
        """A layer without a bias stays without one, unless it reads a block and gets one anyway."""
        return not layer.creates_bias or any(
            consumer.node == layer.node for entry in self.plan.blocks for consumer in entry.block.consumers
        )

    def _mask(self, batch: int, mask: Mask | None) -> Tensor | None:
        """The padding mask in one batch."""
        if mask is None:
            return None
        names = [node.name for node in self.captured.graph_module.graph.nodes if node.op == "placeholder"]
        found = graph_arguments(self.captured.graph_module, self.batches[batch])[names.index(mask.node)]
        assert isinstance(found, Tensor)
        return found


def _places(graph_module: fx.GraphModule) -> dict[nn.Module, str]:
    """Module -> name of the node that calls it."""
    modules = dict(graph_module.named_modules())
    return {modules[str(n.target)]: n.name for n in graph_module.graph.nodes if n.op == "call_module"}


def _sample(count: int, seen: int, every: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which of a batch's rows enter a regression, and with what weight.

    One of so many rows, whichever batch it is in; positions that count for more than so many are taken in every sample.
    """
    index = torch.arange(count)
    turn = (index + seen) % every == 0
    if positions is None:
        return index[turn], torch.ones(int(turn.sum()))
    weights = positions.repeat(-(-count // len(positions)))[:count]
    always = weights >= every * positions.median()
    chosen = turn | always
    return index[chosen], torch.where(always, weights, weights * every)[chosen]


def _on_what_stays(normal: Normal, weight: Tensor, columns: Tensor) -> Tensor:
    """The layer's own value predicted from the columns that stay: W_K + W_P C_PK (C_KK + lambda s I)^-1."""
    own = replace(normal, mean_t=weight @ normal.mean_x, xt=normal.xx @ weight.T)
    return fit(own, weight, PENALTY, columns)[0]
