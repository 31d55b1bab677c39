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
from vbpfx.rules import table
from vbpfx.rules.axes import Relation, Same, Site
from vbpfx.rules.pointwise import elementwise
from vbpfx.rules.shapes import regrouping

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
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))


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
    with pytest.raises(AnalysisError, match="is already in the operator table, with the rule per_channel"):
        vbpfx.register_operator(other_rule, Damped)
    with pytest.raises(AnalysisError, match="is already in the operator table, with the rule elementwise"):
        vbpfx.register_operator(other_rule, limited, nn.GELU)
    assert table._TABLE[Damped].rule is per_channel
    assert limited not in table._TABLE, "a refused call entered a part of what it was given"


@torch.fx.wrap
def turned(x: Tensor) -> Tensor:
    """Another shape in the same memory, which the graph sees as one call."""
    return x.transpose(1, 2)


def swapped(site: Site) -> Iterator[Relation]:
    """The second and the third axis change places."""
    yield from (Same(site.x.axis(dim), site.out.axis(at)) for dim, at in enumerate((0, 2, 1)))


class Turned(nn.Module):
    """What ``turned`` returns is read behind a change of the value that it may share memory with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        view = turned(h)
        changed = h.mul_(2.0)
        return self.fc2(view.transpose(1, 2)) + self.fc2(changed)


@pytest.mark.parametrize("view", [True, False])
def test_a_trait_of_a_registered_operator_counts(view: bool) -> None:
    """Two names of one memory: with ``view=True`` the analysis sees that one of them is read behind a change of the other."""
    vbpfx.register_operator(swapped, turned, view=view)
    found = vbpfx.find_blocks(vbpfx.capture(Turned(), torch.randn(3, 5, 8), frontend="symbolic"))
    if view:
        assert not found.blocks
        assert any("in place" in refusal.reason for refusal in found.refusals)
    else:
        assert {block.name: block.width for block in found.blocks} == {"fc1->fc2": 12}


def test_traits_that_are_not_given_are_those_of_the_rule_or_of_the_class_it_is_made_of() -> None:
    class Kept(nn.Dropout):
        """Eval mode hands on the very operand."""

    vbpfx.register_operator(regrouping, limited)
    vbpfx.register_operator(elementwise, Kept, Damped)
    assert table._TABLE[limited].view, "all operators that regroup are views"
    assert table._TABLE[limited].sizes is None, "some of them state sizes"
    assert table._TABLE[Kept] == table._TABLE[nn.Dropout]
    assert table._TABLE[Damped] == table.Operator(elementwise)


def test_traits_that_are_refused() -> None:
    with pytest.raises(AnalysisError, match="no trait 'views'; register_operator takes view, hands_on, "):
        vbpfx.register_operator(elementwise, limited, views=True)
    with pytest.raises(AnalysisError, match="is already in the operator table, with view=False"):
        vbpfx.register_operator(elementwise, limited, nn.GELU, view=True)
    assert limited not in table._TABLE
    vbpfx.register_operator(elementwise, nn.GELU, view=False)  # as it stands


def test_a_rule_for_an_operator_of_which_only_traits_are_known() -> None:
    vbpfx.register_operator(elementwise, torch.rand_like)
    assert table._TABLE[torch.rand_like] == table.Operator(elementwise, form_of=0)


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
    before = dict(table._TABLE)
    with pytest.raises(AnalysisError, match=message):
        vbpfx.register_operator(*arguments)
    assert before == table._TABLE
