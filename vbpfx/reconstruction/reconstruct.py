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
from vbpfx.plans.records import BlockPlan, Consumer, Plan, ValueAxis
from vbpfx.reconstruction.fitted import with_fitted
from vbpfx.reconstruction.influence import Influence
from vbpfx.reconstruction.layer_input import LayerInput
from vbpfx.reconstruction.regression import Normal, Sums, best_penalty, fit
from vbpfx.reconstruction.rows import LayerRows, in_larger_parts
from vbpfx.reconstruction.schedule import Calls, bring_together, schedule
from vbpfx.reconstruction.steps import Step, steps_of
from vbpfx.reconstruction.stream import Stream
from vbpfx.rewrite.substitute import in_narrow_shape, outputs_first, pruned_along, substitute, window_at

# The limit of m for unlimited data.
_MOST_SHARE = 0.8
# m is half of that when there are this many effective rows for every channel of the layer's input.
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
        self.held = {step.layer.weight: self._constants(step.layer) for step in steps}
        self.inputs = {step.layer.weight: self._input(step.layer) for step in steps}
        calls = {call: self.inputs[call.weight] for step in steps for call in step.calls}
        narrowed, self.places = with_fitted(self.captured, calls)
        substitute(narrowed, list(self.decided.values()))
        bring_together(narrowed, [step.calls for step in steps])
        self.dense = Stream(self.captured.graph_module, samples.batches)
        self.narrow = Stream(narrowed, samples.batches)
        self.rows = LayerRows(self.captured, self.dense, self.narrow, samples, calls, influence, mask)
        self.fits: list[tuple[Calls, Tensor, Tensor]] = []

    def take(self, step: Step) -> None:
        """Run both streams up to a layer, fit the layer on the rows of all its calls, and use the fit at every call."""
        layer, read = step.layer, self.inputs[step.layer.weight]
        self.narrow.run_before(layer.node)
        self.dense.run_through(step.calls[-1].node)
        weight, bias = read.matrix(self._weight(layer)), self._bias(layer)
        sums = self._gather(step.calls, weight, bias)
        if step.chooses is not None:
            entry = self._choose(step.chooses, step.calls, sums, weight)
            self.decided[entry.block.name] = entry
        folded, shifted = self._folded(layer, bias)
        gone = self._gone(layer)
        channels = torch.tensor([c for c in range(read.whole) if c not in gone])
        columns = read.columns(channels)
        toward = _on_what_stays(sums.all, weight, columns) if step.chooses is not None else folded
        penalty = best_penalty(sums, toward, PENALTIES, columns)
        fitted, intercept = fit(sums.all, toward, penalty, columns)
        self.fits.append((step.calls, fitted - folded, intercept - shifted))
        for call in step.calls:
            self.places[call.node].set(read.weight(fitted)[:, channels], intercept, channels)

    def result(self) -> Plan:
        """Return the plan with everything that was chosen and fitted."""
        blocks = tuple(self.decided[entry.block.name] for entry in self.plan.blocks)
        plan = replace(self.plan, blocks=blocks)
        corrections = tuple(
            in_narrow_shape(calls, self._in_place(calls[0], weight), bias, plan) for calls, weight, bias in self.fits
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

    def _constants(self, layer: Consumer) -> list[tuple[BlockPlan, ValueAxis]]:
        """Return the planned blocks whose constant channels a layer reads and pads, or may read if it is not decided yet whether they stay."""
        return [
            (entry, consumer.source)
            for entry in self.plan.blocks
            for consumer in entry.block.consumers
            if consumer.node == layer.node
            and consumer.padded
            and (entry.constants_in or entry.block.name not in self.decided)
        ]

    def _input(self, layer: Consumer) -> LayerInput:
        """Return what a layer reads."""
        shape = outputs_first(self.tensors[layer.weight], layer).shape
        constants = tuple(entry.value_at(source) for entry, source in self.held[layer.weight])
        return LayerInput(layer.source.axis, shape[1], tuple(shape[2:]), window_at(self.captured, layer), constants)

    def _in_place(self, layer: Consumer, change: Tensor) -> Tensor:
        """Return dW in the dense layer's shape, with the columns of constant channels where the plan has these channels."""
        read = self.inputs[layer.weight]
        whole = read.weight(change)
        weight = whole[:, : read.channels].clone()
        for number, (entry, source) in enumerate(self.held[layer.weight]):
            place = source.at(self.decided[entry.block.name].constants_in[:1])
            weight[:, place] = whole[:, read.channels + number, None]
        return weight

    def _gather(self, calls: Calls, weight: Tensor, bias: Tensor) -> Sums:
        """Return the sums for a layer's regression over all its calls in all batches of all ranks."""
        share = self._share(calls)
        rows = itertools.chain.from_iterable(self.rows.of(call, weight, bias, share) for call in calls)
        begun = next(rows, None)
        own = Sums.centres(begun.x, begun.t) if begun else None
        centres = self.ranks.of_lowest(own, [(n,) for n in weight.shape[::-1]])
        sums = Sums(centres, None if self._takes_bias(calls[0]) else bias)
        every = itertools.chain([begun] if begun else [], rows)
        for part in in_larger_parts(every, weight.shape[1]):
            sums.add(*part)
        sums.add_other_ranks(self.ranks, weight.shape[1], weight.shape[0])
        return sums

    def _choose(self, entry: BlockPlan, calls: Calls, sums: Sums, weight: Tensor) -> BlockPlan:
        """Choose which neurons of a block to keep, so that it becomes as wide as planned, by greedy elimination from the full fit.

        For a convolution all columns of a channel go together. If the layer pads its input, the block has a constant channel, or
        one more neuron in its place, whichever costs less.
        """
        block, normal, layer = entry.block, sums.all, calls[0]
        read = self.inputs[layer.weight]
        own = next(c.source for c in block.consumers if c.node == layer.node).at(range(block.width))
        everything, _ = fit(normal, weight, PENALTY)
        about = self.influence.get(layer.node)  # its metric covers all calls, so the first call's will do
        if about is not None and about.metric is not None:
            everything = about.metric @ everything
        others = {c.weight: c for c in block.consumers if c.weight != layer.weight}.values()
        weights = [self._weight(c)[:, c.source.at(range(block.width))] for c in others]
        wanted = torch.cat([everything, *(read.of_another(other, own) for other in weights)])
        gone = self._gone(layer)
        present = torch.tensor([c for c in range(read.whole) if c not in gone])
        columns, place = read.columns(present), {int(c): i for i, c in enumerate(present)}
        among = torch.tensor([place[int(c)] for c in own])

        def eliminate(remove: int, first: int | None = None) -> tuple[float, list[int]]:
            """Return the cost of removing some channels, and which neurons they are."""
            inputs = [(normal.xx[columns][:, columns], wanted[:, columns])]
            order, costs = elimination_costs(inputs, remove, among, PENALTY, group=read.taps, first=first)
            channel = {int(c): i for i, c in enumerate(among)}
            return float(costs.sum()), sorted(channel[i] for i in order.tolist() if i in channel)

        held = next((i for i, (e, _) in enumerate(self.held[layer.weight]) if e.block.name == block.name), None)
        if held is None:  # whether a constant channel stays is as in the plan
            (_, pruned), constants = eliminate(len(entry.pruned)), len(entry.constants_in)
        else:
            ways = [(eliminate(block.width - entry.width + 1, place[read.channels + held]), 0)]
            if entry.width > 1:
                ways.append((eliminate(block.width - entry.width + 1), 1))
            (_, pruned), constants = min(ways, key=lambda way: way[0][0])
        constants_in = tuple(pruned[:constants])
        means = read.means(sums.mean_x)[own[pruned]]
        # without a constant channel, layers that pad the axis have no place for constants
        without = {c.source for c in block.consumers if c.padded and not constants_in}
        replaced = tuple(torch.zeros_like(means) if source in without else means for source in block.sources)
        kept = tuple(c for c in range(block.width) if c not in pruned)
        return BlockPlan(block, kept, replaced, constants_in=constants_in)

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
        """Return how many channels of a layer's input the plan keeps."""
        pruned = pruned_along(self.plan.blocks, layer.weight, layer.weight_axis)
        return self.inputs[layer.weight].channels - len(pruned)

    def _folded(self, layer: Consumer, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return W, as a matrix, and b with the removed neurons of the layer's input folded in, as far as they are decided yet."""
        read, weight = self.inputs[layer.weight], self._weight(layer)
        folded, shifted = read.weight(read.matrix(weight)).clone(), bias.clone()
        held = {(e.block.name, at): read.channels + number for number, (e, at) in enumerate(self.held[layer.weight])}
        for entry in self.decided.values():
            for consumer in entry.block.consumers:
                if consumer.node == layer.node:
                    source, removed = consumer.source, weight[:, consumer.source.at(entry.pruned)]
                    prediction = entry.prediction_at(source)
                    if prediction is not None:
                        folded[:, source.at(entry.kept)] += torch.einsum(
                            "op...,pk->ok...", removed, prediction.double()
                        )
                    constant = torch.einsum("op...,p->o...", removed, entry.constants_at(source).double())
                    if not consumer.padded:
                        shifted += constant.reshape(len(constant), -1).sum(1)
                    elif entry.constants_in:
                        folded[:, held[entry.block.name, source]] = constant / entry.value_at(source)
        folded[:, sorted(self._gone(layer))] = 0
        return read.matrix(folded), shifted

    def _gone(self, layer: Consumer) -> set[int]:
        """Return the channels of a layer's input that are removed, as far as this is decided yet."""
        gone = set(pruned_along(self.decided.values(), layer.weight, layer.weight_axis))
        first = self.inputs[layer.weight].channels
        for number, (entry, _) in enumerate(self.held[layer.weight]):
            decided = self.decided.get(entry.block.name)
            if decided is not None and not decided.constants_in:
                gone.add(first + number)
        return gone

    def _weight(self, layer: Consumer) -> Tensor:
        """Return W (out, in, ...), float64, on the CPU."""
        return outputs_first(self.tensors[layer.weight].detach().double().cpu(), layer)

    def _bias(self, layer: Consumer) -> Tensor:
        """Return b (out,), float64, on the CPU; zeros for a layer without a bias."""
        if layer.creates_bias:
            return torch.zeros(self.tensors[layer.weight].shape[1 - layer.weight_axis], dtype=torch.float64)
        return self.tensors[layer.bias].detach().double().cpu()

    def _takes_bias(self, layer: Consumer) -> bool:
        """Return whether the layer has a bias, or gets one for the constants of a block that it reads."""
        return not layer.creates_bias or any(
            consumer.node == layer.node and not consumer.padded
            for entry in self.plan.blocks
            for consumer in entry.block.consumers
        )


def _on_what_stays(normal: Normal, weight: Tensor, columns: Tensor) -> Tensor:
    """Return the weights that best predict the layer's own output from the kept columns.

    They are W_K + W_P C_PK (C_KK + lambda s I)^-1.
    """
    own = replace(normal, mean_t=weight @ normal.mean_x, xt=normal.xx @ weight.T)
    return fit(own, weight, PENALTY, columns)[0]
