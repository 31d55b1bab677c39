"""Reconstruction, block after block: fit layers to the dense network on inputs that come from the narrowed network.

Two copies of the network run side by side on the calibration data (:mod:`vbpfx.reconstruction.stream`). One is the
dense network. In the other, everything up to the present layer is narrowed already (:mod:`vbpfx.rewrite.substitute`).
At each layer the target is

    t = y + m ((y_dense + s_dense) - (y + s_narrowed)),    y = W x + b.

Here x is the layer's input in the narrowed stream, and y is what the dense weights compute from it. s is the residual
stream that the layer's output is added to (:mod:`vbpfx.reconstruction.residual`). So the target adds to y a share m of
the difference between the dense and the narrowed residual stream behind the layer.

The layer is fitted to this target on x, by ridge regression that shrinks toward its old weights
(:mod:`vbpfx.reconstruction.regression`). If the layer reads a block, the neurons to keep are chosen at the same time,
by greedy elimination from the fit on all of them (:mod:`vbpfx.planning.elimination`). With m = 1 every layer would have
to make up for everything that was lost before it. But this loss can be predicted from x only in part, and for the rest
a regression shrinks the signal.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.samples import Samples
from vbpfx.data.inputs import Inputs, model_device
from vbpfx.display.progress import progress_bar
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.planning.elimination import PENALTY, elimination_costs
from vbpfx.plans.records import BlockPlan, Consumer, Plan
from vbpfx.reconstruction.fitted import with_fitted
from vbpfx.reconstruction.influence import Influence
from vbpfx.reconstruction.regression import Normal, Sums, best_penalty, fit
from vbpfx.reconstruction.rows import LayerRows, in_larger_parts
from vbpfx.reconstruction.schedule import Calls, bring_together, schedule
from vbpfx.reconstruction.steps import Step, steps_of
from vbpfx.reconstruction.stream import Stream
from vbpfx.rewrite.substitute import as_matrix, in_narrow_shape, pruned_along, substitute

# The limit of m for unlimited data.
_MOST_SHARE = 0.8
# m is half of that when there are this many effective rows for every column of the layer's input.
_ROWS_TO_LEARN_FROM = 30
# The relative ridge penalties to choose from. A fit shrinks toward the old weights, or, where neurons are chosen,
# toward the weights that best predict the layer's own output from the kept neurons.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def reconstruct(
    analysis: Analysis,
    plan: Plan,
    batches: Sequence[Inputs] | Samples,
    influence: Mapping[str, Influence],
    *,
    beside: Sequence[Consumer] = (),
    choose: bool = True,
    mask: MaskArgument | None = None,
    progress: bool = False,
) -> Plan:
    """Return a plan with the same widths whose layers are fitted block after block.

    Args:
        analysis: the analysis of the model that the plan was made for.
        plan: the plan whose widths are kept. Some blocks keep the neurons of this plan: those with norms over the
            hidden axis, with several sources, or with a layer of which one call needs the output of another.
        batches: the calibration data. What the streams hold between two layers must fit in the memory of the model's
            device. With several ranks every rank runs its own samples, and all ranks get the same plan.
        influence: layer node -> influence on these batches. For a layer without influence all rows and outputs count
            alike.
        beside: layers outside the blocks that are fitted, too. Their shapes stay.
        choose: whether to choose the neurons of a block again; otherwise the plan's choice stays.
        mask: as for :func:`vbpfx.prepare`.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: the narrowed network gives a layer an input that is not finite.
    """
    order = schedule(analysis)
    steps = steps_of(order, analysis, plan, beside, choose)
    if not steps:
        return plan
    device, samples = model_device(analysis.captured.reference), Samples.of(batches)
    samples = replace(samples, batches=tuple(batch.to(device) for batch in samples.batches))
    run = _Reconstruction(order.captured, plan, samples, steps, influence, mask)
    with progress_bar("reconstructing", len(steps), progress and samples.ranks.first) as advance:
        for step in steps:
            try:
                run.take(step)
            except CalibrationError as error:
                raise CalibrationError(f"layer {step.layer.weight.rpartition('.')[0]}: {error}") from error
            advance()
    return run.result()


class _Reconstruction:
    """The dense and the narrowed stream, and the choices and fits that were made so far."""

    def __init__(
        self,
        captured: Captured,
        plan: Plan,
        samples: Samples,
        steps: Sequence[Step],
        influence: Mapping[str, Influence],
        mask: MaskArgument | None,
    ) -> None:
        self.captured, self.plan, self.influence = captured, plan, influence
        self.tensors = named_tensors(self.captured.reference)
        self.chosen = any(step.chooses for step in steps)
        pending = {step.chooses.block.name for step in steps if step.chooses}
        self.decided = {e.block.name: e for e in plan.blocks if e.block.name not in pending}
        self.samples, self.ranks = samples, samples.ranks
        calls = [call for step in steps for call in step.calls]
        narrowed, self.places = with_fitted(self.captured, calls)
        substitute(narrowed, list(self.decided.values()))
        bring_together(narrowed, [step.calls for step in steps])
        self.dense = Stream(self.captured.graph_module, samples.batches)
        self.narrow = Stream(narrowed, samples.batches)
        widths = {call.source: self._width(call) for call in calls}
        self.rows = LayerRows(self.captured, self.dense, self.narrow, samples, widths, influence, mask)
        self.fits: list[tuple[Calls, Tensor, Tensor]] = []

    def take(self, step: Step) -> None:
        """Run both streams up to a layer, fit the layer on the rows of all its calls, and use the fit at every call."""
        layer = step.layer
        self.narrow.run_before(layer.node)
        self.dense.run_through(step.calls[-1].node)
        weight, bias = self._matrix(layer), self._bias(layer)
        sums = self._gather(step.calls, weight, bias)
        if step.chooses is not None:
            entry = self._choose(step.chooses, step.calls, sums, weight)
            self.decided[entry.block.name] = entry
        folded, shifted, gone = self._folded(layer, weight, bias)
        columns = torch.tensor([c for c in range(weight.shape[1]) if c not in gone])
        toward = _on_what_stays(sums.all, weight, columns) if step.chooses is not None else folded
        free = None if self._takes_bias(layer) else bias
        penalty = best_penalty(sums, toward, PENALTIES, columns)
        fitted, intercept = fit(sums.all, toward, penalty, columns, free)
        self.fits.append((step.calls, fitted - folded, intercept - shifted))
        for call in step.calls:
            self.places[call.node].set(fitted, intercept, columns)

    def result(self) -> Plan:
        """Return the plan with everything that was chosen and fitted."""
        blocks = tuple(self.decided[entry.block.name] for entry in self.plan.blocks)
        plan = replace(self.plan, blocks=blocks)
        corrections = tuple(
            in_narrow_shape(calls, weight, bias, self.tensors[calls[0].weight], plan)
            for calls, weight, bias in self.fits
        )
        done = replace(plan, corrections=corrections)
        how = {
            "criterion": "greedy_obs, block after block" if self.chosen else plan.settings["criterion"],
            "compensation": "reconstruction",
            "reconstruction": {
                "share": _MOST_SHARE,
                "samples": self.samples.total,
                "refitted": list(done.refitted),
            },
        }
        return replace(done, settings={**plan.settings, **how})

    def _gather(self, calls: Calls, weight: Tensor, bias: Tensor) -> Sums:
        """Return the sums for a layer's regression over all its calls in all batches of all ranks."""
        share = self._share(calls)
        rows = itertools.chain.from_iterable(self.rows.of(call, weight, bias, share) for call in calls)
        begun = next(rows, None)
        own = Sums.centres(begun.x, begun.t) if begun else None
        sums = Sums(self.ranks.of_lowest(own, [(n,) for n in weight.shape[::-1]]))
        every = itertools.chain([begun] if begun else [], rows)
        for part in in_larger_parts(every, weight.shape[1]):
            sums.add(*part)
        sums.add_other_ranks(self.ranks, weight.shape[1], weight.shape[0])
        return sums

    def _choose(self, entry: BlockPlan, calls: Calls, sums: Sums, weight: Tensor) -> BlockPlan:
        """Choose which neurons of a block to keep, as many as planned, by greedy elimination from the full fit."""
        block, normal = entry.block, sums.all
        among = block.consumers[0].source.at(range(block.width))
        everything, _ = fit(normal, weight, PENALTY)
        layer = calls[0]
        about = self.influence.get(layer.node)  # its metric covers all calls, so the first call's will do
        if about is not None and about.metric is not None:
            everything = about.metric @ everything
        others = [self._matrix(c) for c in {c.weight: c for c in block.consumers if c.weight != layer.weight}.values()]
        gone = self._gone(layer)
        present = torch.tensor([c for c in range(weight.shape[1]) if c not in gone])
        place = {int(c): i for i, c in enumerate(present)}
        inputs = [(normal.xx[present][:, present], torch.cat([everything, *others])[:, present])]
        order, _ = elimination_costs(inputs, len(entry.pruned), torch.tensor([place[int(c)] for c in among]))
        channel = {int(c): i for i, c in enumerate(among)}
        pruned = {channel[int(present[i])] for i in order}
        kept = tuple(c for c in range(block.width) if c not in pruned)
        means = normal.mean_x[among[sorted(pruned)]]
        constants_in = tuple(sorted(pruned)[: len(entry.constants_in)])
        return BlockPlan(block, kept, (means,) * len(block.sources), constants_in=constants_in)

    def _share(self, calls: Calls) -> float:
        """Return m for a layer: it is smaller the fewer rows carry the weight, since less can be learnt from them."""
        known = [self.influence[call.node] for call in calls if call.node in self.influence]
        if len(known) < len(calls):
            return _MOST_SHARE
        weights = [weights.double() for about in known for weights in about.weights]
        moments = [sum(w.sum().item() for w in weights), sum(w.square().sum().item() for w in weights)]
        total, squares = self.ranks.sums(moments)
        effective = total**2 / max(squares, 1e-300)
        return _MOST_SHARE * effective / (effective + _ROWS_TO_LEARN_FROM * self._kept_width(calls[0]))

    def _kept_width(self, layer: Consumer) -> int:
        """Return how many columns of a layer's input the plan keeps."""
        return self._width(layer) - len(pruned_along(self.plan.blocks, layer.weight, layer.weight_axis))

    def _folded(self, layer: Consumer, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, set[int]]:
        """Return W and b with the removed neurons of the layer's input folded in, and the columns that were removed."""
        folded, shifted = weight.clone(), bias.clone()
        for entry in self.decided.values():
            for consumer in entry.block.consumers:
                if consumer.node == layer.node:
                    pruned, kept = consumer.source.at(entry.pruned), consumer.source.at(entry.kept)
                    prediction = entry.prediction_at(consumer.source)
                    if prediction is not None:
                        folded[:, kept] += weight[:, pruned] @ prediction.double()
                    shifted += weight[:, pruned] @ entry.constants_at(consumer.source)
        gone = self._gone(layer)
        folded[:, sorted(gone)] = 0
        return folded, shifted, gone

    def _gone(self, layer: Consumer) -> set[int]:
        """Return the columns of a layer's weight whose input channels are removed, as far as this is decided yet."""
        return set(pruned_along(self.decided.values(), layer.weight, layer.weight_axis))

    def _matrix(self, layer: Consumer) -> Tensor:
        """Return W (out, in), float64, on the CPU."""
        return as_matrix(self.tensors[layer.weight], layer)

    def _width(self, layer: Consumer) -> int:
        return self.tensors[layer.weight].shape[layer.weight_axis]

    def _bias(self, layer: Consumer) -> Tensor:
        """Return b (out,), float64, on the CPU; zeros for a layer without a bias."""
        if layer.creates_bias:
            return torch.zeros(self.tensors[layer.weight].shape[1 - layer.weight_axis], dtype=torch.float64)
        return self.tensors[layer.bias].detach().double().cpu()

    def _takes_bias(self, layer: Consumer) -> bool:
        """Return whether the layer has a bias, or gets one because it reads a block."""
        return not layer.creates_bias or any(
            consumer.node == layer.node for entry in self.plan.blocks for consumer in entry.block.consumers
        )


def _on_what_stays(normal: Normal, weight: Tensor, columns: Tensor) -> Tensor:
    """Return the weights that best predict the layer's own output from the kept columns.

    They are W_K + W_P C_PK (C_KK + lambda s I)^-1.
    """
    own = replace(normal, mean_t=weight @ normal.mean_x, xt=normal.xx @ weight.T)
    return fit(own, weight, PENALTY, columns)[0]
