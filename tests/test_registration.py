"""Operators that the table lacks are refused by name; after ``register_operator`` they are analysed like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.fx
from oracle import double, randomize, stages
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import AnalysisError
from vbpfx.rules import ops
from vbpfx.rules.axes import Relation, Same, Site
from vbpfx.rules.pointwise import elementwise

# Rounding errors of a few dozen operations in float64.
ROUNDING = 1e-12


class Damped(nn.Module):
    """x exp(-|a x|) I0(a x) with one a per channel; the Bessel function is not in the table."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.i0e(self.rate * x)


def per_channel(site: Site) -> Iterator[Relation]:
    """A rule for an elementwise operator with one parameter per channel of the last axis."""
    rate = site.operand(1, "rate")
    assert rate is not None
    yield from (Same(a, b) for a, b in zip(site.x.axes, site.out.axes, strict=True))
    yield Same(site.x.axis(-1), rate.axis(0))


@torch.library.custom_op("vbpfx_tests::squash", mutates_args=())
def squash(x: Tensor, strength: float) -> Tensor:
    return x / (1 + strength * x.abs())


@squash.register_fake
def _(x: Tensor, strength: float) -> Tensor:
    return torch.empty_like(x)


@torch.fx.wrap
def limited(x: Tensor) -> Tensor:
    """A function that branches on a size, which symbolic tracing cannot follow."""
    return x.tanh() * 2 if len(x) > 1 else x


def other_rule(site: Site) -> Iterator[Relation]:
    yield from site.all_opaque("a second opinion")


class Net(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(8, 12), activation, nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Limited(nn.Module):
    """A module that calls a wrapped function, which fx keeps as one call."""

    def forward(self, x: Tensor) -> Tensor:
        return limited(x)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of the operator table."""
    monkeypatch.setattr(ops, "_TABLE", dict(ops._TABLE))


CASES = {
    "leaf module": (lambda: Damped(12), "symbolic", "special_i0e", (per_channel, Damped)),
    "custom operator": (
        lambda: (lambda x: squash(x, 0.7)), "symbolic", "vbpfx_tests.squash.default",
        (elementwise, torch.ops.vbpfx_tests.squash),
    ),
    "packet of a custom operator": (
        lambda: (lambda x: torch.ops.vbpfx_tests.squash(x, 0.7)), "symbolic", "squash",
        (elementwise, torch.ops.vbpfx_tests.squash),
    ),
    "exported custom operator": (
        lambda: (lambda x: squash(x, 0.7)), "export", "vbpfx_tests.squash.default",
        (elementwise, torch.ops.vbpfx_tests.squash),
    ),
    "wrapped function": (Limited, "symbolic", "limited", (elementwise, limited)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_registered_is_found_and_exact(name: str) -> None:
    make, frontend, operator, (rule, spelling) = CASES[name]
    model, batch = double(randomize(Net(make()))), torch.randn(6, 5, 8).double()
    before = vbpfx.find_blocks(vbpfx.capture(model, batch, frontend=frontend))
    assert not before.blocks
    (reason,) = [refusal.reason for refusal in before.refusals if refusal.name == "fc1"]
    assert reason == f"operator {operator} is not in the operator table (see docs/adding_an_operator.md)"

    vbpfx.register_operator(rule, spelling)
    result = stages(model, batch, frontend=frontend)
    assert {block.name: block.width for block in result.analysis.blocks} == {"fc1->fc2": 12}
    assert result.plan.widths == {"fc1->fc2": 6}
    verified = vbpfx.verify(result.captured, result.small, result.plan, tolerance=ROUNDING)
    assert verified.effect > 1e-3
    vbpfx.verify(result.captured, vbpfx.apply_plan(model, result.plan), result.plan, tolerance=ROUNDING)


def test_a_registered_module_is_one_call_with_its_parameter_sliced() -> None:
    vbpfx.register_operator(per_channel, Damped)
    model = randomize(Net(Damped(12)))
    result = stages(model, torch.randn(6, 8))
    assert [node.op for node in result.captured.graph_module.graph.nodes if "activation" in str(node.target)] == [
        "call_module"
    ]
    kept = list(result.plan.blocks[0].kept)
    assert torch.equal(result.small.get_submodule("activation").rate, model.activation.rate[kept])


def test_a_wrong_rule_is_caught_by_the_oracle() -> None:
    """The rule claims that softmax is elementwise, which makes narrowing inexact, and verify raises."""

    class Shares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    vbpfx.register_operator(elementwise, Shares)
    result = stages(randomize(Net(Shares())), torch.randn(6, 8))
    assert result.plan.widths == {"fc1->fc2": 6}
    with pytest.raises(vbpfx.VerificationError, match="differs from the substitution reference"):
        vbpfx.verify(result.captured, result.small, result.plan)


def test_registering_twice() -> None:
    vbpfx.register_operator(per_channel, Damped)
    vbpfx.register_operator(per_channel, Damped)  # registering the same again is allowed, as after a second import
    with pytest.raises(AnalysisError, match="stands in the table already, with the rule per_channel"):
        vbpfx.register_operator(other_rule, Damped)
    with pytest.raises(AnalysisError, match="stands in the table already, with the rule elementwise"):
        vbpfx.register_operator(other_rule, limited, nn.GELU)
    assert ops._TABLE[Damped] is per_channel
    assert limited not in ops._TABLE, "a refused call entered a part of what it was given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((elementwise, torch.ops.vbpfx_tests.squash.default), "register its packet, vbpfx_tests.squash"),
        ((elementwise, torch.ops.aten.digamma.default), "is one overload"),
        ((elementwise, 3), "neither a module class nor a function nor the name of a method"),
        ((elementwise,), "a rule and at least one operator"),
        (("elementwise", limited), "a rule and at least one operator"),
    ],
)
def test_what_cannot_be_registered(arguments: tuple, message: str) -> None:
    before = dict(ops._TABLE)
    with pytest.raises(AnalysisError, match=message):
        vbpfx.register_operator(*arguments)
    assert before == ops._TABLE
