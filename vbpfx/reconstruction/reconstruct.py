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
from typing import NamedTuple

import torch
from torch import Tensor

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import MaskArgument
from vbpfx.calibration.samples import Samples
from vbpfx.data.inputs import Inputs, model_device
from vbpfx.display.progress import progress_bar
from vbpfx.errors import CalibrationError
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.planning.elimination import PENALTY
from vbpfx.plans.records import Basis, BlockPlan, Consumer, Plan
from vbpfx.reconstruction.choice import Choice, Regression
from vbpfx.reconstruction.fitted import with_fitted
from vbpfx.reconstruction.influence import Influence
from vbpfx.reconstruction.layer_input import Held, LayerInput
from vbpfx.reconstruction.regression import Normal, Sums, best_penalty, fit
from vbpfx.reconstruction.rows import LayerRows, in_larger_parts
from vbpfx.reconstruction.schedule import Calls, bring_together, schedule
from vbpfx.reconstruction.steps import Step, steps_of
from vbpfx.reconstruction.stream import Stream
from vbpfx.rewrite.basis import in_coordinates
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
    bases = {entry.block.name: entry.basis for entry in plan.blocks}
    if any(bases.values()):  # in the plan's coordinates, channels are removed as everywhere
        analysis = replace(analysis, captured=in_coordinates(analysis.captured, plan))
        plan = _with_bases(plan, dict.fromkeys(bases))
    order = schedule(analysis)
    steps = steps_of(order, analysis, plan, beside, choose, {name for name, basis in bases.items() if basis})
    if not steps:
        return _with_bases(plan, bases)
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
    return _with_bases(run.result(), bases)


def _with_bases(plan: Plan, bases: Mapping[str, Basis | None]) -> Plan:
    return replace(plan, blocks=tuple(replace(entry, basis=bases[entry.block.name]) for entry in plan.blocks))


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
        self.inputs = {step.layer.weight: self._input(step.layer) for step in steps}
        calls = {call: self.inputs[call.weight] for step in steps for call in step.calls}
        narrowed, self.places = with_fitted(self.captured, calls)
        substitute(narrowed, list(self.decided.values()))
        bring_together(narrowed, [step.calls for step in steps])
        self.dense = Stream(self.captured.graph_module, samples.batches)
        self.narrow = Stream(narrowed, samples.batches)
        self.rows = LayerRows(self.captured, self.dense, self.narrow, samples, calls, influence, mask)
        self.fits: list[_Fit] = []

    def take(self, step: Step) -> None:
        """Run both streams up to a layer, fit the layer on the rows of all its calls, and use the fit at every call."""
        layer, read = step.layer, self.inputs[step.layer.weight]
        self.narrow.run_before(layer.node)
        self.dense.run_through(step.calls[-1].node)
        regressions = self._gather(step.calls)
        if step.chooses is not None:
            self.decided[step.chooses.block.name] = self._choose(step.chooses, layer, regressions)
        gone, bias = self._gone(layer), self._bias(layer)
        weights, changes, channels = [], [], []
        intercept, shift = bias.clone(), bias.clone()
        for regression in regressions:
            part, sums = regression.part, regression.sums
            folded, shifted = self._folded(layer, regression, bias, gone)
            present = torch.tensor([i for i, c in enumerate(part.channels) if c not in gone])
            columns = read.columns(present)
            chosen = step.chooses is not None
            toward = _on_what_stays(sums.all, regression.weight, columns) if chosen else folded
            fitted, intercept[part.outputs] = fit(
                sums.all, toward, best_penalty(sums, toward, PENALTIES, columns), columns
            )
            shift[part.outputs] = shifted
            changes.append(fitted - folded)
            weights.append(fitted[:, columns].reshape(len(fitted), len(present), *read.size))
            channels.append(torch.tensor(part.channels)[present])
        self.fits.append(_Fit(step.calls, changes, intercept - shift))
        for call in step.calls:
            self.places[call.node].set(torch.cat(weights), intercept, torch.cat(channels))

    def result(self) -> Plan:
        """Return the plan with everything that was chosen and fitted."""
        blocks = tuple(self.decided[entry.block.name] for entry in self.plan.blocks)
        plan = replace(self.plan, blocks=blocks)
        corrections = tuple(
            in_narrow_shape(found.calls, self._in_place(found), found.bias, plan) for found in self.fits
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

    def _input(self, layer: Consumer) -> LayerInput:
        """Return what a layer reads. It is not decided yet whether the constant channels of blocks that are chosen later stay."""
        outputs, own, *size = outputs_first(self.tensors[layer.weight], layer).shape
        held = [
            (Held(entry.block.name, consumer.source, entry.value_at(consumer.source)), entry.block.width)
            for entry in self.plan.blocks
            for consumer in entry.block.consumers
            if consumer.node == layer.node
            and consumer.padded
            and (entry.constants_in or entry.block.name not in self.decided)
        ]
        return LayerInput(
            layer.source.axis,
            own * layer.groups,
            outputs,
            layer.groups,
            tuple(size),
            window_at(self.captured, layer),
            tuple(constant for constant, _ in held),
            tuple(constant.source.at(range(width)) for constant, width in held),
        )

    def _in_place(self, found: _Fit) -> Tensor:
        """Return dW in the dense layer's shape, with the columns of constant channels where the plan has these channels."""
        read = self.inputs[found.calls[0].weight]
        parts = []
        for part, change in zip(read.parts, found.changes, strict=True):
            whole = change.reshape(len(change), len(part.channels), *read.size)
            own = whole[:, : part.own].clone()
            for place, held in read.held_by(part):
                places = held.source.at(self.decided[held.block].constants_in)
                own[:, places[part.holds(places)][:1] - part.first] = whole[:, place, None]
            parts.append(own)
        return torch.cat(parts)

    def _gather(self, calls: Calls) -> list[Regression]:
        """Return the regressions of a layer's parts over all its calls in all batches of all ranks."""
        layer, read = calls[0], self.inputs[calls[0].weight]
        weight, bias = self._weight(layer), self._bias(layer)
        matrices = [read.matrix(weight, part) for part in read.parts]
        share, takes_bias = self._share(calls), self._takes_bias(layer)
        rows = itertools.chain.from_iterable(self.rows.of(call, matrices, bias, share) for call in calls)
        begun = next(rows, None)
        first = Sums.centres(begun.x, begun.t) if begun else None
        centres = self.ranks.of_lowest(first, [(read.whole * read.taps,), (read.outputs,)])
        columns = [read.columns(torch.tensor(part.channels)) for part in read.parts]
        sums = []
        for part, own in zip(read.parts, columns, strict=True):
            about = None if centres is None else (centres[0][own.to(centres[0].device)], centres[1][part.outputs])
            sums.append(Sums(about, None if takes_bias else bias[part.outputs]))
        for some in in_larger_parts(itertools.chain([begun] if begun else [], rows), matrices[0].shape[1]):
            for part, own, total in zip(read.parts, columns, sums, strict=True):
                x = some.x if read.groups == 1 else some.x[:, own.to(some.x.device)]
                total.add(x, some.t[:, part.outputs], some.weights, some.held_out)
        for matrix, total in zip(matrices, sums, strict=True):
            total.add_other_ranks(self.ranks, matrix.shape[1], matrix.shape[0])
        return [Regression(*found) for found in zip(read.parts, matrices, sums, strict=True)]

    def _choose(self, entry: BlockPlan, layer: Consumer, regressions: Sequence[Regression]) -> BlockPlan:
        """Return the entry with the neurons that are chosen at the layer."""
        block, read = entry.block, self.inputs[layer.weight]
        at = next(c.source for c in block.consumers if c.node == layer.node).at(range(block.width))
        choice = Choice(entry, read, at, self._gone(layer))
        others: list[tuple[Tensor, Tensor]] = []
        for other in {c.weight: c for c in block.consumers if c.weight != layer.weight}.values():
            weight, positions = self._weight(other), other.source.at(range(block.width))
            for group, rows in enumerate(weight.chunk(other.groups)):
                (own,) = (positions // weight.shape[1] == group).nonzero(as_tuple=True)
                others.append((rows[:, positions[own] % weight.shape[1]], own))
        about = self.influence.get(layer.node)  # its metric covers all calls, so the first call's will do
        for regression in regressions:
            fitted, _ = fit(regression.sums.all, regression.weight, PENALTY)
            if about is not None and about.metric is not None:
                outputs = regression.part.outputs
                fitted = about.metric[outputs, outputs] @ fitted
            if bool(regression.part.holds(at).any()):
                choice.eliminate(regression, fitted, others)
        return choice.result()

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
        """Return how many channels the plan keeps of those that an output reads."""
        pruned = pruned_along(self.plan.blocks, layer.weight, layer.weight_axis)
        return (self.inputs[layer.weight].channels - len(pruned)) // layer.groups

    def _folded(self, layer: Consumer, regression: Regression, bias: Tensor, gone: set[int]) -> tuple[Tensor, Tensor]:
        """Return a part of W, as a matrix, and of b with removed neurons of the layer's input folded in, as far as they are decided."""
        read, part = self.inputs[layer.weight], regression.part
        dense = regression.weight.reshape(len(regression.weight), len(part.channels), *read.size)
        folded, shifted = dense.clone(), bias[part.outputs].clone()
        held = {(constant.block, constant.source): place for place, constant in read.held_by(part)}
        for entry in self.decided.values():
            for consumer in entry.block.consumers:
                if consumer.node != layer.node:
                    continue
                source = consumer.source
                pruned, kept = source.at(entry.pruned), source.at(entry.kept)
                goes, stays = part.holds(pruned), part.holds(kept)
                removed, prediction = dense[:, pruned[goes] - part.first], entry.prediction_at(source)
                if prediction is not None:
                    b = prediction.double()[goes][:, stays]
                    folded[:, kept[stays] - part.first] += torch.einsum("op...,pk->ok...", removed, b)
                constant = torch.einsum("op...,p->o...", removed, entry.constants_at(source).double()[goes])
                if not consumer.padded:
                    shifted += constant.reshape(len(constant), -1).sum(1)
                elif entry.constants_in and (entry.block.name, source) in held:
                    folded[:, held[entry.block.name, source]] = constant / entry.value_at(source)
        folded[:, [i for i, c in enumerate(part.channels) if c in gone]] = 0
        return folded.flatten(1), shifted

    def _gone(self, layer: Consumer) -> set[int]:
        """Return the channels of a layer's input that are removed, as far as this is decided yet."""
        read = self.inputs[layer.weight]
        gone = set(pruned_along(self.decided.values(), layer.weight, layer.weight_axis))
        for channel, held in enumerate(read.held, read.channels):
            if held.block in self.decided and not self.decided[held.block].constants_in:
                gone.add(channel)
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


class _Fit(NamedTuple):
    """The fit of a layer: all its calls, dW for each of its parts as a matrix (outputs, columns), and db."""

    calls: Calls
    changes: list[Tensor]
    bias: Tensor


def _on_what_stays(normal: Normal, weight: Tensor, columns: Tensor) -> Tensor:
    """Return the weights that best predict the layer's own output from the kept columns.

    They are W_K + W_P C_PK (C_KK + lambda s I)^-1.
    """
    own = replace(normal, mean_t=weight @ normal.mean_x, xt=normal.xx @ weight.T)
    return fit(own, weight, PENALTY, columns)[0]
