"""Check the properties of every random network: planted blocks are found, the result is exact, the model is unchanged.

Errors other than the expected kinds are failures.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import assert_unchanged, state
from random_forms import UNROLLED
from random_networks import Spec, batch, build
from torch import nn

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.errors import AnalysisError, ArtifactError, BudgetError, CaptureError, VbpfxError, VerificationError
from vbpfx.graph.capture import named_tensors

# Rounding in float64 stays below 1e-12 of the output here, because middle operators are bounded or grow linearly and weights
# are of natural size.
TOLERANCE = 1e-9


@dataclass
class Outcome:
    """The outcome for one network.

    Attributes:
        ended: the last stage: ``verified``, ``no block``, ``no budget``, or ``not captured``. The last is allowed for
            torch.export with an empty batch or with parts changed in place, and when verify notices that tracing took
            `+=` for `+`.
        planted: blocks that had to be found.
        found: blocks that were found.
        rewritten: blocks that were narrowed.
        effect: effect of the substitution, relative to the output.
        error: error of the graph against the reference, relative to the output.
        refusals: reasons for refusals, without names and numbers.
        own_class: outcome of ``apply_plan``: ``exact``, ``refused`` or ``not run``.
    """

    ended: str = "no block"
    planted: int = 0
    found: int = 0
    rewritten: int = 0
    effect: float = 0.0
    error: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    own_class: str = ""


def check(spec: Spec) -> Outcome:
    """Take the network through every stage. Any exception, AssertionError included, is a failure of the library."""
    model, planted = build(spec)
    before, example = state(model), batch(spec, spec.batch, 0)
    kept = copy.deepcopy(example)
    outcome = Outcome(planted=len(planted))
    if spec.whole and spec.batch:
        _at_once(spec, model, outcome)
    else:
        _through(spec, model, planted, example, outcome)
    assert_unchanged(model, before)
    for a, b in zip(as_inputs(example, model).tensors, as_inputs(kept, model).tensors, strict=True):
        assert torch.equal(a, b), "the batch changed"
    return outcome


def _at_once(spec: Spec, model: nn.Module, outcome: Outcome) -> None:
    """Prune with :func:`vbpfx.prune` and its default method, which also measures the sensitivity to each block."""
    batches = [batch(spec, samples, number) for number, samples in enumerate(spec.calibrated, start=1)]
    options = {name: value for name, value in spec.options if name not in ("method", "criterion", "compensation")}
    try:
        pruned = vbpfx.prune(model, batches, frontend=spec.frontend, progress=False, **options)
    except BudgetError:
        outcome.ended = "no budget"
        return
    except VbpfxError as error:
        if isinstance(error, AnalysisError) and "no block" in str(error):
            return
        if not _may_be_uncaptured(spec, error):
            raise
        outcome.ended = "not captured"
        return
    analysis, plan = pruned.analysis, pruned.plan
    outcome.found, outcome.rewritten, outcome.ended = len(analysis.usual), len(plan.blocks), "verified"
    _check_all_are_named(model, analysis)
    _check_widths(pruned.captured.reference, pruned.graph_module, plan)
    _check_constant_blocks(model, plan)
    figures = vbpfx.sensitivities(analysis, plan, [as_inputs(data, model) for data in batches])
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures.values()), figures
    _check_twins(model, pruned.plan, analysis, int(options.get("round_to", 1)))
    for data in (batch(spec, spec.other, 7), *batches[:1]):
        _verify(pruned.captured, pruned.graph_module, plan, data, outcome)


def _through(spec: Spec, model: nn.Module, planted: Any, example: Any, outcome: Outcome) -> None:
    try:
        captured = vbpfx.capture(model, example, frontend=spec.frontend)
    except CaptureError as error:
        if not _may_be_uncaptured(spec, error):
            raise
        outcome.ended = "not captured"
        return
    analysis = vbpfx.find_blocks(captured)
    outcome.found = len(analysis.usual)
    outcome.refusals.update(refusal.reason for refusal in analysis.refusals)
    _check_all_are_found(planted, analysis)
    _check_all_are_named(model, analysis)
    if not analysis.usual:
        try:
            vbpfx.prepare(captured, analysis)
        except AnalysisError:
            return
        raise AssertionError("a graph without blocks was prepared")
    # torch.export may fix the batch size if the network is called on a single sample or none; loops are unrolled.
    fixed = captured.frontend == "export" and (captured.batch is None or spec.takes in UNROLLED)
    observed = vbpfx.prepare(captured, analysis)
    sizes = (spec.batch,) if fixed and spec.takes in UNROLLED else spec.calibrated
    for number, samples in enumerate(sizes, start=1):
        inputs = as_inputs(batch(spec, samples, number), model)
        with torch.no_grad():
            observed(*inputs.args, **inputs.kwargs)
    statistics = vbpfx.statistics(observed)
    try:
        plan = vbpfx.make_plan(analysis, statistics, **dict(spec.options))
    except BudgetError:
        outcome.ended = "no budget"
        return
    small = vbpfx.convert(captured, plan)
    outcome.rewritten, outcome.ended = len(plan.blocks), "verified"
    _check_widths(captured.reference, small, plan)
    _check_constant_blocks(model, plan)
    batches = [batch(spec, spec.other, 7), *([example] if spec.batch else [])]
    for data in batches[1:] if fixed else batches:
        try:
            _verify(captured, small, plan, data, outcome)
        except VerificationError as error:
            # fx traces `h += 1` as h = h + 1, so other readers of h do not see the change; verify must notice this.
            if "captured graph differs" in str(error) and _adds_in_place(spec):
                outcome.ended = "not captured"
                return
            raise
    try:
        own = vbpfx.apply_plan(model, plan)
    except ArtifactError:
        outcome.own_class = "refused"
        return
    assert type(own) is type(model)
    try:
        vbpfx.verify(captured, own, plan, batches[-1 if fixed else 0], tolerance=TOLERANCE)
    except VerificationError as error:
        # The code may state a width, or compute with a width that torch.export made a number; the error says so.
        if "does not run" not in str(error) and "its code computes with a hidden width" not in str(error):
            raise
        outcome.own_class = "not run"
    else:
        outcome.own_class = "exact"


def _may_be_uncaptured(spec: Spec, error: VbpfxError) -> bool:
    """Return whether this network may have no valid graph, for a reason that the library's error names."""
    if spec.takes in UNROLLED:
        return True
    if "captured graph differs" in str(error) and _adds_in_place(spec):
        return True
    if not spec.batch and ("the example batch is empty" in str(error) or "of 0 elements" in str(error)):
        return True  # torch.export runs the model, and a reshape with -1 fails on an empty batch
    # torch.export runs with gradients, under which the parts of a split cannot be changed in place.
    return spec.frontend == "export" and "modified inplace" in str(error)


def _adds_in_place(spec: Spec) -> bool:
    return any("iadd" in step.middle + step.other for step in spec.steps)


def _verify(captured: vbpfx.Captured, small: nn.Module, plan: vbpfx.Plan, data: Any, outcome: Outcome) -> None:
    verified = vbpfx.verify(captured, small, plan, data, tolerance=TOLERANCE)
    outcome.error, outcome.effect = max(outcome.error, verified.error), max(outcome.effect, verified.effect)
    _check_unseen_blocks(captured.reference, plan, verified)


def _check_all_are_found(planted: Any, analysis: vbpfx.Analysis) -> None:
    """Every planted block is found with exactly its layers."""
    found = {(frozenset(b.producers), frozenset(c.weight for c in b.consumers), b.width) for b in analysis.usual}
    for plant in planted:
        if (plant.producers, plant.consumers, plant.width) not in found:
            why = {r.reason for r in analysis.refusals if plant.producers & set(r.producers)} or {
                "another block stands there"
            }
            raise AssertionError(f"a planted block is missed, {'; '.join(sorted(why))}\n{plant}\n{analysis}")


def _check_all_are_named(model: nn.Module, analysis: vbpfx.Analysis) -> None:
    """Every weight inside a module that tracing does not enter is in a block or refused by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {name for b in analysis.blocks for name in (*b.producers, *(c.weight for c in b.consumers))}
    known |= {name for refusal in analysis.refusals for name in refusal.producers}
    for block in model.blocks:
        for name in (names[id(parameter)] for parameter in block.inside()):
            modules = {name.rsplit(".", part)[0] for part in range(1, name.count("."))}
            assert name in known or modules & {refusal.name for refusal in analysis.refusals}, (
                f"no block and no refusal names {name}\n{analysis}"
            )


def _check_constant_blocks(model: nn.Module, plan: vbpfx.Plan) -> None:
    """Blocks that read no data are not narrowed to meet a budget."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    constant = {names[id(parameter)] for block in model.blocks for parameter in block.constant()}
    for entry in plan.blocks:
        assert not constant & set(entry.block.producers), f"{entry.block.name} reads no data and is narrowed"


def _check_unseen_blocks(model: nn.Module, plan: vbpfx.Plan, verified: vbpfx.Verification) -> None:
    """If the output hides a block, verify compares behind the block's layers; blocks hidden there, too, are named."""
    assert verified.behind is not None or verified.unproven or not verified.hidden
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for producer, consumer in (pair for block in model.blocks for pair in block.unseen()):
        for entry in plan.blocks:
            readers = {reader.weight for reader in entry.block.consumers}
            if names[id(producer)] in entry.block.producers and readers == {names[id(consumer)]}:
                assert entry.block.reductions or entry.block.name in verified.unproven, f"{entry.block.name} is proven"


def _check_twins(model: nn.Module, plan: vbpfx.Plan, analysis: vbpfx.Analysis, multiple: int) -> None:
    """Blocks that are copies of each other are equally wide, except for one step if the budget ends between them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    widths = {name: plan.widths.get(b.name, b.width) for b in analysis.usual for name in b.producers}
    for block in model.blocks:
        for first, second in block.twins():
            a, b = (widths.get(names[id(weight)]) for weight in (first, second))
            assert a == b or (a is not None and b is not None and abs(a - b) <= multiple), f"twins are {a} and {b} wide"


def _check_widths(dense: nn.Module, small: nn.Module, plan: vbpfx.Plan) -> None:
    """Every tensor has the shape that follows from the plan."""
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(dense).items()}
    for entry in plan.blocks:
        assert 0 < len(entry.kept) < entry.block.width
        for parameter in entry.block.parameters:
            shapes[parameter.name][parameter.axis] -= entry.lost(parameter)  # packed parts are narrowed one by one
    for name, tensor in named_tensors(small).items():
        if name in shapes:
            assert list(tensor.shape) == shapes[name], (
                f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}"
            )
