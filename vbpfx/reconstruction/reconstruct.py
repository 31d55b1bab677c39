"""Reconstruction, block after block: layers are fitted to the dense network on what the narrowed one really feeds them.

Two streams of calibration data go through the network side by side (:mod:`vbpfx.reconstruction.stream`): the dense one, and one that is
narrowed so far (:mod:`vbpfx.rewrite.substitute`). At each layer the target is

    t = y + m ((y_dense + s_dense) - (y + s_narrowed)),    y = W x + b,

what the dense weights make of the narrowed stream's x, and a share m of what separates the residual stream behind the
layer (:mod:`vbpfx.reconstruction.residual`) from the dense one. The layer is fitted to it on x, by ridge regression toward
its old weights (:mod:`vbpfx.reconstruction.regression`). Where it reads a block, the neurons that stay are chosen on the way, by greedy
elimination from the fit on all of them (:mod:`vbpfx.planning.elimination`). m = 1 would ask every layer to make good everything
that is lost; but what cannot be predicted is then answered by shrinking the signal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import Mask, find_masks
from vbpfx.calibration.calibrate import progress_bar
from vbpfx.calibration.observer import as_rows, is_held_out, row_numbers
from vbpfx.calibration.prepare import coprime, rows_a_sample
from vbpfx.data.inputs import Inputs, model_device
from vbpfx.distributed.samples import Samples
from vbpfx.graph.capture import named_tensors
from vbpfx.graph.fake import graph_arguments
from vbpfx.planning.elimination import PENALTY, elimination_costs
from vbpfx.reconstruction.fitted import with_fitted
from vbpfx.reconstruction.influence import Influence
from vbpfx.reconstruction.regression import Normal, Sums, best_penalty, fit
from vbpfx.reconstruction.residual import find_residual_sum, pull_back
from vbpfx.reconstruction.stream import Stream, held_bytes
from vbpfx.records import Block, BlockPlan, Consumer, Plan, Source
from vbpfx.rewrite.substitute import as_matrix, in_narrow_shape, removed_along, substitute

# m where there is data without end.
SHARE = 0.8
# m falls to half of that where the weight of all rows together is that of so many rows per entry of the input.
_ROWS_TO_LEARN_FROM = 30
# Relative ridge penalties toward the weights as they were, and toward the best linear prediction on the layer's own value.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_FEWEST_SAMPLES = 64
_ROWS_PER_COLUMN = 64


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
    batches: Sequence[Inputs] | Samples,
    influence: Mapping[str, Influence],
    *,
    beside: Sequence[Consumer] = (),
    choose: bool = True,
    share: float = SHARE,
    mask: str | None = None,
    progress: bool = False,
) -> Plan:
    """A plan with the same widths whose layers are fitted block after block.

    Args:
        analysis: of the model that the plan was made for.
        plan: whose widths are kept. Blocks that cannot be chosen anew on the way (norms over the hidden axis, several
            sources, layers called several times) stay as they are in it.
        batches: the calibration data, on the model's device; what the streams hold between two layers must fit in memory. Of
            several ranks' samples each runs its own, and all come to the same plan.
        influence: per layer's node, on these batches; rows and outputs of layers that have none count alike.
        beside: layers beside the blocks that are fitted, too, without changing shape.
        choose: choose the neurons of a block on the way; otherwise those of the plan stay.
        share: m where there is data without end; less is taken where few rows carry the weight.
        mask: as for :func:`vbpfx.prepare`.
        progress: show a bar on standard error.
    """
    steps = _steps(analysis, plan, beside, choose)
    if not steps:
        return plan
    device, samples = model_device(analysis.captured.reference), Samples.of(batches)
    samples = replace(samples, batches=tuple(batch.to(device) for batch in samples.batches))
    run = _Reconstruction(analysis, plan, samples, steps, influence, share, mask)
    with progress_bar("reconstructing", len(steps), progress and samples.ranks.first) as advance:
        for number, step in enumerate(steps):
            run.take(number, step)
            advance()
    return run.result()


def chosen_on_the_way(analysis: Analysis, block: Block) -> bool:
    """Whether reconstruction chooses a block's neurons itself: layers of their own read one value, and nothing else does."""
    fittable = {layer.node for layer in analysis.layers}
    return len(block.sources) == 1 and not block.reductions and fittable >= {c.node for c in block.consumers}


def samples_that_fit(analysis: Analysis, memory: float) -> int:
    """How many samples the two streams may hold in so many GiB."""
    a_sample = 2 * held_bytes(analysis.captured, (layer.node for layer in analysis.layers))
    return max(_FEWEST_SAMPLES, int(memory * 2**30 / max(1, a_sample)))


def layers_beside(analysis: Analysis) -> tuple[Consumer, ...]:
    """The layers that write to a residual stream and read no block: attention's output projections, for one."""
    reading = {consumer.node for block in analysis.blocks for consumer in block.consumers}
    others = (layer for layer in analysis.layers if layer.node not in reading)
    return tuple(layer for layer in others if find_residual_sum(analysis.captured, layer.node) is not None)


def layers_to_fit(analysis: Analysis, blocks: Sequence[Block], beside: Sequence[Consumer]) -> list[Consumer]:
    """The layers that reconstruction may fit when it narrows these blocks, in graph order."""
    chosen = {c.node for block in blocks for c in block.consumers} | {layer.node for layer in beside}
    return [layer for layer in analysis.layers if layer.node in chosen]


def _steps(analysis: Analysis, plan: Plan, beside: Sequence[Consumer], choose: bool) -> list[Step]:
    """The layers to fit, in graph order."""
    first = {entry.block.consumers[0].node: entry for entry in plan.blocks}
    choosing = {node: e for node, e in first.items() if choose and chosen_on_the_way(analysis, e.block)}
    layers = layers_to_fit(analysis, [entry.block for entry in plan.blocks], beside)
    return [Step(layer, choosing.get(layer.node)) for layer in layers]


class _Reconstruction:
    """The two streams, and what has been decided so far."""

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        samples: Samples,
        steps: Sequence[Step],
        influence: Mapping[str, Influence],
        share: float,
        mask: str | None,
    ) -> None:
        self.captured, self.plan, self.share, self.influence = analysis.captured, plan, share, influence
        self.tensors = named_tensors(self.captured.reference)
        self.chosen = any(step.chooses for step in steps)
        pending = {step.chooses.block.name for step in steps if step.chooses}
        self.decided = {e.block.name: e for e in plan.blocks if e.block.name not in pending}
        self.samples, self.batches, self.ranks = samples, samples.batches, samples.ranks
        narrowed, self.places = with_fitted(self.captured, [step.layer for step in steps])
        substitute(narrowed, list(self.decided.values()))
        self.dense = Stream(self.captured.graph_module, self.batches)
        self.narrow = Stream(narrowed, self.batches)
        sources = {step.layer.source: self._width(step.layer) for step in steps}
        self.masks = find_masks(self.captured, sources, mask)
        self.every = {source: self._step(source, width) for source, width in sources.items()}
        self.fits: list[tuple[Consumer, Tensor, Tensor]] = []

    def take(self, number: int, step: Step) -> None:
        """Bring both streams to a layer, fit it, and put the fit in its place."""
        layer = step.layer
        self.narrow.run_before(layer.node)
        self.dense.run_through(layer.node)
        weight, bias = self._matrix(layer), self._bias(layer)
        sums = self._gather(layer, weight, bias)
        if step.chooses is not None:
            entry = self._choose(step.chooses, layer, sums, weight)
            self.decided[entry.block.name] = entry
        folded, shifted, gone = self._folded(layer, weight, bias)
        columns = torch.tensor([c for c in range(weight.shape[1]) if c not in gone])
        toward = _on_what_stays(sums.all, weight, columns) if step.chooses is not None else folded
        free = None if self._takes_bias(layer) else bias
        penalty = best_penalty(sums, toward, PENALTIES, columns)
        fitted, intercept = fit(sums.all, toward, penalty, columns, free)
        self.fits.append((layer, fitted - folded, intercept - shifted))
        self.places[number].set(fitted, intercept, columns)

    def result(self) -> Plan:
        """The plan with everything that was chosen and fitted."""
        blocks = tuple(self.decided[entry.block.name] for entry in self.plan.blocks)
        plan = replace(self.plan, blocks=blocks)
        corrections = tuple(
            in_narrow_shape(layer, weight, bias, self.tensors[layer.weight], plan) for layer, weight, bias in self.fits
        )
        done = replace(plan, corrections=corrections)
        how = {
            "criterion": "greedy_obs, block after block" if self.chosen else plan.settings["criterion"],
            "compensation": "reconstruction",
            "reconstruction": {
                "share": self.share,
                "samples": self.samples.total,
                "refitted": list(done.refitted),
            },
        }
        return replace(done, settings={**plan.settings, **how})

    def _gather(self, layer: Consumer, weight: Tensor, bias: Tensor) -> Sums:
        """The sums of a layer's regression over all batches, of all ranks."""
        rows = self._rows(layer, weight, bias, self._share(layer, self.influence.get(layer.node)))
        begun = next(rows, None)
        centres = self.ranks.of_lowest(Sums.centres(*begun[:2]) if begun else None, [(n,) for n in weight.shape[::-1]])
        sums = Sums(centres)
        for x, t, weights, held in itertools.chain([begun] if begun else [], rows):
            sums.add(x, t, weights, held)
        sums.add_other_ranks(self.ranks, weight.shape[1], weight.shape[0])
        return sums

    def _rows(
        self, layer: Consumer, weight: Tensor, bias: Tensor, share: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        """Inputs, targets and weights of a layer's rows, and whether they are held out."""
        source = layer.source
        operand = self.narrow.nodes[layer.node].all_input_nodes[0].name  # what is removed is substituted in it
        residual = find_residual_sum(self.captured, layer.node)
        if residual is not None and not (self.dense.holds(residual.stream) and self.narrow.holds(residual.stream)):
            residual = None
        mask, about = self.masks.get(source), self.influence.get(layer.node)
        a_sample = rows_a_sample(self.captured, source)
        for number, start in enumerate(self.samples.starts):
            x, y = self.narrow.value(number, operand), self.dense.value(number, layer.node)
            if residual is not None:
                lost = self.dense.value(number, residual.stream) - self.narrow.value(number, residual.stream)
                wish = pull_back(self.dense, number, layer.node, residual, y, lost)
                y = y if wish is None else y + wish
            padding = self._mask(number, mask)
            xs, ys = (as_rows(v, source.axis, padding, mask.axes if mask else ()) for v in (x, y))
            counts = as_rows(about.weights[number], source.axis, padding, mask.axes if mask else ()) if about else None
            numbers = row_numbers(len(xs), start * a_sample, a_sample, padding)
            rows, weights = _sample(numbers, self.every[source], counts)
            held = is_held_out(numbers[rows], a_sample)
            for part, is_held in ((~held, False), (held, True)):
                if bool(part.any()):
                    x, y = xs[rows[part]], ys[rows[part]]
                    own = nn.functional.linear(x, weight.to(x), bias.to(x))
                    yield x, own + share * (y - own), weights[part], is_held

    def _choose(self, entry: BlockPlan, layer: Consumer, sums: Sums, weight: Tensor) -> BlockPlan:
        """The block's neurons that stay: greedy elimination from the fit on all of them, as many as planned."""
        block, normal = entry.block, sums.all
        start = block.consumers[0].source.start
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

    def _step(self, source: Source, width: int) -> int:
        """Of how many rows one is taken: as many as there are beyond what a fit of that width needs."""
        a_sample = rows_a_sample(self.captured, source)
        rows = a_sample * self.samples.total
        step = max(1, min(a_sample, rows // (_ROWS_PER_COLUMN * width)))
        return coprime(step, a_sample)

    def _share(self, layer: Consumer, about: Influence | None) -> float:
        """m for a layer: the fewer rows carry the weight, the less of what is lost can be learnt from them."""
        if about is None:
            return self.share
        weights = [weights.double() for weights in about.weights]
        moments = [sum(w.sum().item() for w in weights), sum(w.square().sum().item() for w in weights)]
        total, squares = self.ranks.sums(moments)
        effective = total**2 / max(squares, 1e-300)
        return self.share * effective / (effective + _ROWS_TO_LEARN_FROM * self._kept_width(layer))

    def _kept_width(self, layer: Consumer) -> int:
        """How many entries of a layer's input will be left."""
        return self._width(layer) - len(removed_along(self.plan.blocks, layer.weight, layer.weight_axis))

    def _folded(self, layer: Consumer, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, set[int]]:
        """W and b with everything that is removed before the layer folded in, and the columns that are gone."""
        folded, shifted = weight.clone(), bias.clone()
        for entry in self.decided.values():
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
        return set(removed_along(self.decided.values(), layer.weight, layer.weight_axis))

    def _matrix(self, layer: Consumer) -> Tensor:
        """W (out, in), float64, on the CPU."""
        return as_matrix(self.tensors[layer.weight], layer)

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


def _sample(numbers: Tensor, every: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which of a batch's rows, so numbered, enter a regression, and with what weight.

    One of so many rows, whichever batch it is in; those that count for more than so many are all taken.
    """
    index = torch.arange(len(numbers))
    turn = numbers % every == 0
    if counts is None:
        return index[turn], torch.ones(int(turn.sum()))
    weights = counts.flatten().cpu()
    always = weights >= every
    chosen = turn | always
    return index[chosen], torch.where(always, weights, weights * every)[chosen]


def _on_what_stays(normal: Normal, weight: Tensor, columns: Tensor) -> Tensor:
    """The layer's own value predicted from the columns that stay: W_K + W_P C_PK (C_KK + lambda s I)^-1."""
    own = replace(normal, mean_t=weight @ normal.mean_x, xt=normal.xx @ weight.T)
    return fit(own, weight, PENALTY, columns)[0]
