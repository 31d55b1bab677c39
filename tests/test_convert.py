"""convert leaves the model unchanged and copies what it needs, and the oracle notices wrong conversions."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from oracle import assert_unchanged, double, randomize, stages, state
from torch import nn
from zoo import FOUND, Attention, InvertedBottleneck, Nested, TwoConsumers, images, tokens

import vbpfx
from vbpfx.errors import VerificationError


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(("make", "batch"), [(Attention, tokens), (InvertedBottleneck, images)])
def test_the_callers_model_never_changes(make, batch, frontend: str) -> None:
    model = randomize(make()).train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    next(model.children()).register_forward_hook(lambda module, args, output: None)
    before = state(model)
    pruned = vbpfx.prune(model, [batch(), batch()], ratio=0.5, frontend=frontend, progress=False)
    pruned.apply_to(model)
    trainable = pruned.graph_module.train()
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in trainable.named_parameters()}
    for _ in range(10):
        optimizer.zero_grad()
        trainable(batch()).square().mean().backward()
        optimizer.step()
    moved = [n for n, p in trainable.named_parameters() if not torch.equal(p, start[n])]
    assert len(moved) > len(start) / 2, "training did nothing, so the test shows nothing"
    assert_unchanged(model, before)


@pytest.mark.parametrize("share", [False, True])
def test_what_is_shared(share: bool) -> None:
    model = InvertedBottleneck().eval()
    result = stages(randomize(model), images())
    small = vbpfx.convert(result.captured, result.plan, share=share)
    own = {t.data_ptr() for t in model.parameters()}
    narrowed = {axis.name for entry in result.plan.blocks for axis in entry.block.parameters}
    folded = {c.bias for entry in result.plan.blocks for c in entry.block.consumers}
    for name, parameter in small.named_parameters():
        expected = share and name not in narrowed | folded
        assert (parameter.data_ptr() in own) == expected, name
    buffers = {t.data_ptr() for t in model.buffers()}
    assert not any(t.data_ptr() in buffers for t in small.buffers())


def test_modules_say_their_true_widths() -> None:
    result = stages(randomize(InvertedBottleneck()), images())
    for small in (result.small, vbpfx.apply_plan(InvertedBottleneck(), result.plan)):
        width = result.plan.widths["expand->project"]
        assert (small.expand.out_channels, small.bn1.num_features, small.project.in_channels) == (width, width, width)
        depthwise = small.depthwise
        assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (width, width, width)
        assert small.reduce.in_channels == small.grow.out_channels == width
        assert small.bn1.running_mean.shape == (width,)
        fresh = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        fresh.load_state_dict(depthwise.state_dict())


def test_shapes_on_the_converted_graph_are_true() -> None:
    result = stages(randomize(TwoConsumers()), tokens())
    recorded = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            value = super().run_node(n)
            recorded[n.name] = value
            return value

    Record(result.small).run(tokens())
    checked = 0
    for node in result.small.graph.nodes:
        if isinstance(recorded[node.name], torch.Tensor):
            assert tuple(node.meta["val"].shape)[1:] == tuple(recorded[node.name].shape)[1:], node.name
            checked += 1
    assert checked >= 6


def test_frozen_parameters_stay_frozen() -> None:
    model = randomize(Attention())
    for parameter in model.mlp.parameters():
        parameter.requires_grad_(False)
    small = stages(model, tokens()).small
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        n for n, p in model.named_parameters() if not p.requires_grad
    }


def test_a_narrowed_graph_can_be_prepared_again() -> None:
    """Blocks are pruned one at a time with statistics of the narrowed network; plans of disjoint blocks add up."""
    model, batch = double(randomize(Nested())), tokens().double()
    captured = vbpfx.capture(model, batch)
    analysis = vbpfx.find_blocks(captured)
    current, entries = captured, []
    for block in analysis.blocks:
        observed = vbpfx.prepare(current, analysis, blocks=[block])
        with torch.no_grad():
            observed(batch)
        gathered = vbpfx.statistics(observed)
        step = vbpfx.make_plan(analysis, gathered, ratio=0.5, include=block.name)
        entries += step.blocks
        total = dataclasses.replace(step, blocks=tuple(entries))
        current = dataclasses.replace(captured, graph_module=vbpfx.convert(captured, total))
    assert len(entries) == 3
    verified = vbpfx.verify(captured, current.graph_module, total, tolerance=1e-12)
    assert verified.effect > 1e-6


BREAKAGES = {
    "weight": lambda net: net.get_parameter("fc3.weight").data.mul_(1.01),
    "fold": lambda net: net.get_parameter("fc4.bias").data.add_(0.01),
    "swapped rows": lambda net: net.get_parameter("fc3.weight").data.copy_(
        net.get_parameter("fc3.weight").data.roll(1, 0)
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_oracle_notices_a_wrong_rewrite(breakage: str) -> None:
    case = next(case for case in FOUND if case.name == "token mixing")
    result = stages(randomize(case.make()), case.batch())
    vbpfx.verify(result.captured, result.small, result.plan)
    wrong = copy.deepcopy(result.small)
    BREAKAGES[breakage](wrong)
    with pytest.raises(VerificationError, match="differs from the substitution reference"):
        vbpfx.verify(result.captured, wrong, result.plan)


def test_the_oracle_notices_a_wrong_shape_and_a_nan() -> None:
    case = next(case for case in FOUND if case.name == "sequential")
    result = stages(case.make(), case.batch())
    with pytest.raises(VerificationError, match="returns shapes"):
        vbpfx.verify(result.captured, nn.Linear(8, 3), result.plan)
    wrong = copy.deepcopy(result.small)
    wrong.get_parameter("2.bias").data.fill_(float("nan"))
    with pytest.raises(VerificationError, match="inf"):
        vbpfx.verify(result.captured, wrong, result.plan)


def test_bfloat16_models() -> None:
    model = randomize(Attention()).bfloat16()
    pruned = vbpfx.prune(model, [tokens().bfloat16()], ratio=0.5, progress=False)
    assert {p.dtype for p in pruned.graph_module.parameters()} == {torch.bfloat16}
    assert pruned.verification is not None
    assert pruned.verification.dtype == "bfloat16"
