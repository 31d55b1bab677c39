"""What must hold for every random network: found, exact, unchanged, and never an error of another kind."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import assert_unchanged, state
from random_networks import Spec, batch, build
from torch import nn

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.errors import AnalysisError, ArtifactError, BudgetError, CaptureError, VerificationError
from vbpfx.graph.capture import named_tensors

# In float64 rounding stays below 1e-12 of the output here: middles are bounded or grow linearly, weights are of natural size.
TOLERANCE = 1e-9


@dataclass
class Outcome:
    """What became of one network.

    Attributes:
        ended: the last stage: ``verified``, ``no block``, ``no budget``, or ``not captured``: torch.export from an empty
            batch or of parts changed in place, and `+=` that tracing took for `+`, which was noticed.
        planted: blocks that had to be found.
        found: blocks that were found.
        rewritten: blocks that were narrowed.
        effect: of the substitution, relative to the output.
        error: of the graph against the reference, relative to the output.
        refusals: reasons, without names and numbers.
        own_class: what ``apply_plan`` made: ``exact``, ``refused`` or ``not run``.
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
    """Take the network through every stage; an AssertionError or any exception is a failure of the library."""
    model, planted = build(spec)
    before, example = state(model), batch(spec, spec.batch, 0)
    kept = copy.deepcopy(example)
    outcome = Outcome(planted=len(planted))
    _through(spec, model, planted, example, outcome)
    assert_unchanged(model, before)
    for a, b in zip(as_inputs(example, model).tensors, as_inputs(kept, model).tensors, strict=True):
        assert torch.equal(a, b), "the batch changed"
    return outcome


def _through(spec: Spec, model: nn.Module, planted: Any, example: Any, outcome: Outcome) -> None:
    try:
        captured = vbpfx.capture(model, example, frontend=spec.frontend)
    except CaptureError as error:
        # torch.export runs with gradients, under which the parts of a split cannot be changed in place
        if spec.frontend != "export" or (spec.batch and "modified inplace" not in str(error)):
            raise
        outcome.ended = "not captured"
        return
    analysis = vbpfx.find_blocks(captured)
    outcome.found = len(analysis.blocks)
    outcome.refusals.update(refusal.reason for refusal in analysis.refusals)
    found = {(frozenset(b.producers), frozenset(c.weight for c in b.consumers), b.width) for b in analysis.blocks}
    for plant in planted:
        if (plant.producers, plant.consumers, plant.width) not in found:
            why = {r.reason for r in analysis.refusals if plant.producers & set(r.producers)} or {
                "another block stands there"
            }
            raise AssertionError(f"a planted block is missed, {'; '.join(sorted(why))}\n{plant}\n{analysis}")
    if not analysis.blocks:
        try:
            vbpfx.prepare(captured, analysis)
        except AnalysisError:
            return
        raise AssertionError("a graph without blocks was prepared")
    observed = vbpfx.prepare(captured, analysis)
    for number, samples in enumerate(spec.calibrated, start=1):
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
    batches = [batch(spec, spec.other, 7), *([example] if spec.batch else [])]
    # torch.export may fix the batch where the network is called on a single sample or none
    fixed = spec.frontend == "export" and captured.batch is None
    for data in batches[1:] if fixed else batches:
        try:
            verified = vbpfx.verify(captured, small, plan, data, tolerance=TOLERANCE)
        except VerificationError as error:
            # fx traces `h += 1` as h = h + 1, which whoever else reads h does not see; verify must notice it
            if "captured graph differs" in str(error) and any(
                "iadd" in step.middle + step.other for step in spec.steps
            ):
                outcome.ended = "not captured"
                return
            raise
        outcome.error, outcome.effect = max(outcome.error, verified.error), max(outcome.effect, verified.effect)
    try:
        own = vbpfx.apply_plan(model, plan)
    except ArtifactError:
        outcome.own_class = "refused"
        return
    assert type(own) is type(model)
    try:
        vbpfx.verify(captured, own, plan, batches[-1 if fixed else 0], tolerance=TOLERANCE)
    except VerificationError as error:
        if "does not run" not in str(error):  # code may state a width, but never compute another function
            raise
        outcome.own_class = "not run"
    else:
        outcome.own_class = "exact"


def _check_widths(dense: nn.Module, small: nn.Module, plan: vbpfx.Plan) -> None:
    """Every tensor is as long along every axis as the plan says."""
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(dense).items()}
    for entry in plan.blocks:
        assert 0 < len(entry.kept) < entry.block.width
        for parameter in entry.block.parameters:
            shapes[parameter.name][parameter.axis] -= entry.block.width - len(
                entry.kept
            )  # packed parts are cut one by one
    for name, tensor in named_tensors(small).items():
        if name in shapes:
            assert list(tensor.shape) == shapes[name], (
                f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}"
            )
