"""Every row of the operator table is checked with the oracle: the operator treats axes as its row says."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import double, randomize, stages
from torch import Tensor, nn
from zoo import Net

import vbpfx
from vbpfx.rules import shapes, table
from vbpfx.rules.pointwise import elementwise

# Operators that take more than one tensor, or no hidden activation.
_OTHERWISE = {"type_as", "where", "lerp", "addcmul", "addcdiv", "masked_fill", "maximum", "minimum", "to", "type"}
# Operators that are only defined from 1 upwards, are random by default, or need other dtypes.
_OTHERWISE |= {"acosh", "native_dropout", "logical_and", "logical_or", "and_", "or_", "cuda", "invert"}
_OTHERWISE |= {"bitwise_and", "bitwise_or", "bitwise_not"}
# Operators that only use the shape of their argument, so that no data reaches their output (see tests/test_blocks.py).
_OTHERWISE |= {"zeros_like", "ones_like", "full_like"}
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("threshold", "_threshold"), (0.1, 0.0)),
    **dict.fromkeys(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
        (0.5, False),
    ),
    "pow": (2,),
    "clamp": (-0.5, 0.5),
    "clip": (-0.5, 0.5),
    **dict.fromkeys(("clamp_min", "clamp_max"), (0.1,)),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "multiply", "div", "true_divide", "truediv"), (1.7,)),
    **dict.fromkeys(("floordiv", "floor_divide", "remainder", "fmod"), (1.7,)),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), (0.1,)),
}
_MODULES: dict[type[nn.Module], Callable[[], nn.Module]] = {nn.Threshold: lambda: nn.Threshold(0.1, 0.0)}


def _call(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    return lambda h: function(h, *arguments)


def _networks() -> list[Any]:
    """Return one network fc2(op(fc1(x))) per spelling of an elementwise operator."""
    cases = []
    for spelling, row in table._TABLE.items():
        if row.rule is not elementwise or isinstance(spelling, (torch._ops.OpOverloadPacket, table.Attribute)):
            continue
        if isinstance(spelling, type):
            cases.append(pytest.param(_MODULES.get(spelling, spelling)(), id=f"nn.{spelling.__name__}"))
            continue
        name = spelling if isinstance(spelling, str) else spelling.__name__
        if name.endswith("_") or name in _OTHERWISE or name in ("iadd", "isub", "imul", "itruediv"):
            continue
        arguments = _ARGUMENTS.get(name, ())
        call = operator.methodcaller(name, *arguments) if isinstance(spelling, str) else _call(spelling, arguments)
        cases.append(pytest.param(call, id=f"{getattr(spelling, '__module__', 'Tensor')}.{name}"))
    return cases


@pytest.mark.filterwarnings("ignore")  # some spellings are deprecated
@pytest.mark.parametrize("op", _networks())
def test_elementwise_operators_are_elementwise(op: Callable[..., Tensor]) -> None:
    """The float64 oracle holds if the operator returns finite floating-point values; others are not activations."""
    layers = {"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)}
    if isinstance(op, nn.Module):
        model = Net(lambda m, x: m.fc2(m.act(m.fc1(x)).to(x.dtype)), act=op, **layers)
    else:
        model = Net(lambda m, x: m.fc2(op(m.fc1(x)).to(x.dtype)), **layers)
    model = double(randomize(model))
    batch = torch.rand(16, 8, dtype=torch.float64)
    finite = bool(model(batch).isfinite().all())
    if not finite:
        with torch.no_grad():  # logarithms and roots need positive arguments
            model.fc1.weight.abs_().mul_(0.2)
            model.fc1.bias.fill_(0.2)
    result = stages(model, batch, frontend="symbolic")
    assert result.analysis.blocks[0].width == 12
    if bool(model(batch).isfinite().all()):
        vbpfx.verify(result.captured, result.small, result.plan, tolerance=1e-12)


def test_the_table_has_every_activation_of_torch_nn() -> None:
    multi_axis = {"MultiheadAttention", "GLU", "Softmax", "Softmin", "Softmax2d", "LogSoftmax", "PReLU", "SwiGLU"}
    activations = {
        name
        for name, found in inspect.getmembers(torch.nn.modules.activation, inspect.isclass)
        if issubclass(found, nn.Module) and found.__module__ == "torch.nn.modules.activation"
    }
    missing = {name for name in activations - multi_axis if getattr(nn, name, None) not in table._TABLE}
    assert missing <= {"Module"}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ((7, 5, 12), (35, 12), {2: 1}),
        ((35, 12), (7, 5, 12), {1: 2}),
        ((7, 12, 3, 3), (7, 12, 9), {0: 0, 1: 1}),
        ((7, 9, 12), (7, 3, 3, 12), {0: 0, 2: 3}),
        ((7, 12), (7, 12, 1, 1), {0: 0, 1: 1}),
        ((7, 1, 12), (7, 12), {0: 0, 2: 1}),
        ((7, 12), (7, 3, 4), {0: 0}),
        ((4, 4), (2, 8), {}),
        ((2, 6), (6, 2), {}),
        ((8, 8, 8), (8, 64), {0: 0}),
        ((3, 4, 5), (5, 4, 3), {}),
    ],
)
def test_what_a_reshape_keeps_whole(before: tuple[int, ...], after: tuple[int, ...], kept: dict[int, int]) -> None:
    assert shapes._kept_whole(before, after) == kept
    # The oracle: if and only if an axis is kept, entries numbered along it keep their numbers after the reshape.
    for dim in range(len(before)):
        index = torch.arange(before[dim]).reshape([-1 if d == dim else 1 for d in range(len(before))]).expand(before)
        reshaped = index.reshape(after)
        whole = [
            out
            for out, size in enumerate(after)
            if size == before[dim] > 1
            and torch.equal(
                reshaped, torch.arange(size).reshape([-1 if d == out else 1 for d in range(len(after))]).expand(after)
            )
        ]
        assert whole == ([kept[dim]] if dim in kept else []) or before[dim] == 1


def test_an_operator_that_is_not_in_the_table_is_named() -> None:
    model = Net(lambda m, x: m.fc2(torch.special.entr(m.fc1(x))), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8))
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.randn(2, 8)))
    assert not analysis.blocks
    reason = {r.name: r.reason for r in analysis.refusals}["fc1"]
    assert reason == "operator special_entr is not in the operator table (see docs/adding_an_operator.md)"
