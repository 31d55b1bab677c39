"""Shapes and MACs of repeated calls are copied, and are the same as when every call is run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import vbpfx
from vbpfx.graph.fake import run_fake
from vbpfx.graph.frontends import unfused_attention
from vbpfx.rules import table
from vbpfx.rules.pointwise import unchanged

CASES = [case for cases in (zoo.FOUND, zoo.PACKED, zoo.NORMS, zoo.SHARED, zoo.REFUSED) for case in cases]
NETWORKS = ("test_vit", "test_convnext", "swin_tiny_patch4_window7_224", "mobilenetv2_050")


def described(value: Any) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.layout, leaf.requires_grad
        return leaf

    return pytree.tree_map(one, value)


def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of both products per head: (tokens, width) x (width, keys), (tokens, keys) x (keys, value width)."""
    heads, (tokens, width), (keys, value_width) = math.prod(query[:-2]), query[-2:], value[-2:]
    return 2 * heads * tokens * keys * (width + value_width)


# Some versions of torch count no FLOPs for attention on the CPU. The formula above makes all versions count them.
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def counted_call_by_call(captured: vbpfx.Captured) -> dict[str, int]:
    """Run every call and return the MACs per node and sample."""
    samples, counts = 1 if captured.batch else captured.inputs.batch_size or 1, {}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, unfused_attention():

        def count(node: fx.Node, run: Callable[[], Any]) -> Any:
            before = counter.get_total_flops()
            value = run()
            counts[node.name] = (counter.get_total_flops() - before) // (2 * samples)
            return value

        run_fake(captured.graph_module, captured.inputs, samples, count)
    return {name: macs for name, macs in counts.items() if macs}


def assert_as_if_all_were_run(captured: vbpfx.Captured) -> int:
    """Compare with a run of every call; return how many nodes share a value with an earlier one."""
    differ, seen, shared = [], set(), 0

    def compare(node: fx.Node, run: Callable[[], Any]) -> Any:
        nonlocal shared
        value, recorded = run(), node.meta["val"]
        if described(value) != described(recorded):
            differ.append((node.name, described(value), described(recorded)))
        shared += isinstance(recorded, Tensor) and id(recorded) in seen
        seen.add(id(recorded))
        return value

    run_fake(captured.graph_module, captured.inputs, captured.batch or captured.inputs.batch_size, compare)
    assert not differ
    assert captured.macs == counted_call_by_call(captured)
    return shared


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small_networks(case: zoo.Case) -> None:
    assert_as_if_all_were_run(vbpfx.capture(case.make(), case.batch(), frontend=case.frontends[0]))


def test_an_exported_network() -> None:
    captured = vbpfx.capture(timm.create_model("test_vit").eval(), torch.ones(2, 3, 160, 160), frontend="export")
    assert assert_as_if_all_were_run(captured) > len(captured.nodes) / 4


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    captured = vbpfx.capture(model, torch.empty(2, *size, device="meta"))
    assert assert_as_if_all_were_run(captured) > len(captured.nodes) / 10


class Counting(nn.Module):
    """A layer of the user, whose result changes with every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return x[..., : Counting.calls]


def hooked() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, value: value[..., :5])
    return layer


def overridden() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x[..., :2]  # type: ignore[method-assign]
    return layer


CALLS = [0]


@fx.wrap
def counting(x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x[..., : CALLS[0]]


class Calls(nn.Module):
    """A network of calls that differ from an earlier one in a single property."""

    def __init__(self, forward: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self._body = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Any:
        return self._body(self.layers, x)


def all_layers(layers: nn.ModuleList, x: Tensor) -> Any:
    return [layer(x) for layer in layers]


def in_place(layers: nn.ModuleList, x: Tensor) -> Any:
    a, b = x.relu(), x.relu()
    a.unsqueeze_(0)
    return a.sum(0), b


ALIKE: list[tuple[str, Callable[..., Any], tuple[nn.Module, ...], Any]] = [
    ("types of numbers", lambda _, x: (x * 2, x * 2.0, x * True, x + 1j), (), torch.ones(3, 4, dtype=torch.int64)),
    ("strides", lambda _, x: (x.relu(), x.mT.relu(), x[:, ::2].mT.relu(), x.expand(3, 8, 8).relu()), (), torch.ones(3, 8, 8)),
    ("dtypes", lambda _, x: (x.sum(-1), x.double().sum(-1), x.bool().sum(-1)), (), torch.ones(3, 8)),
    ("keywords", lambda _, x: (x.sum(dim=-1), x.sum(dim=-1, keepdim=True), F.pad(x, (1, 0)), F.pad(x, (1, 1))), (), torch.ones(3, 8)),
    ("slices", lambda _, x: (x[:, 1:3], x[:, 1:4], x[:, 1:3:2], x[:, 1], x[..., None]), (), torch.ones(3, 8)),
    ("layers", all_layers, (nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4), nn.LayerNorm(8)), torch.ones(3, 8)),
    ("hooks", all_layers, (nn.Linear(8, 8), hooked()), torch.ones(3, 8)),
    ("a forward of its own", all_layers, (nn.Linear(8, 8), overridden()), torch.ones(3, 8)),
    ("options of layers", all_layers, (nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(3, 4, 3, dilation=2), nn.MaxPool1d(2), nn.MaxPool1d(2, 1)), torch.ones(3, 3, 8)),
    ("several values", lambda _, x: (x.chunk(2, -1), x.chunk(2, -1), x.split(3, -1), x.split(2, -1), x.max(-1)), (), torch.ones(3, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "layers", "x"), [pytest.param(*rest, id=name) for name, *rest in ALIKE])
def test_calls_that_are_alike_in_all_but_one_thing(
    forward: Callable[..., Any], layers: tuple[nn.Module, ...], x: Tensor
) -> None:
    assert_as_if_all_were_run(vbpfx.capture(Calls(forward, *layers), x, frontend="symbolic"))


def shapes(captured: vbpfx.Captured, name: str) -> list[tuple[int, ...]]:
    values = [node.meta["val"] for node in captured.nodes.values() if node.name.startswith(name)]
    return [tuple(value.shape[1:]) for value in values]


def test_a_function_of_the_users_is_run_every_time() -> None:
    captured = vbpfx.capture(Calls(lambda _, x: (counting(x), counting(x))), torch.ones(3, 8), frontend="symbolic")
    first, second = shapes(captured, "counting")
    assert second == (first[0] + 1,)


@pytest.mark.parametrize("overload", [False, True])
def test_an_operator_of_the_users_library_is_run_every_time(overload: bool) -> None:
    with torch.library._scoped_library("vbpfx_counting", "DEF") as library:
        calls = []
        library.define("count(Tensor x) -> Tensor")
        library.impl("count", lambda x: [calls.append(x), x.new_empty(len(x), len(calls))][1], "Meta")
        count = torch.ops.vbpfx_counting.count
        operator = count.default if overload else count
        forward = Calls(lambda _, x: (operator(x), operator(x)))
        first, second = shapes(vbpfx.capture(forward, torch.ones(3, 8), frontend="symbolic"), "count")
    assert second == (first[0] + 1,)


def test_what_is_reshaped_in_place_is_reshaped_under_its_own_name_alone() -> None:
    captured = vbpfx.capture(Calls(in_place), torch.ones(3, 8), frontend="symbolic")
    assert shapes(captured, "relu") == [(captured.batch, 8), (8,)]


@fx.wrap
def reshaping(x: Tensor, how: str) -> Tensor:
    if how == "out=":
        torch.add(x[0], 1, out=x.resize_(0))
    else:
        getattr(x, how)(0)
    return x.sum()


@pytest.mark.parametrize("how", ["unsqueeze_", "resize_", "out="])
@pytest.mark.parametrize("before", [False, True], ids=["first", "second"])
def test_what_a_function_of_the_users_reshapes_in_place_is_not_the_result_of_like_calls(how: str, before: bool) -> None:
    """If a function reshapes one of two equal results in place, the other one keeps its shape."""

    def forward(_: nn.ModuleList, x: Tensor) -> Any:
        a, b = x.relu(), x.relu()
        total = reshaping(a if before else b, how)
        return total, (b if before else a).sum(-1)

    captured = vbpfx.capture(Calls(forward), torch.ones(1, 3, 8), frontend="symbolic")
    kept = captured.nodes["relu_1" if before else "relu"]
    assert tuple(kept.meta["val"].shape) == (captured.batch, 3, 8)
    assert shapes(captured, "sum") == [(3,)]
    assert captured.macs == counted_call_by_call(captured)


def test_a_layer_of_the_users_is_run_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table._TABLE, Counting, table.Operator(unchanged))
    captured = vbpfx.capture(Calls(all_layers, Counting(), Counting()), torch.ones(3, 8), frontend="symbolic")
    first, second = shapes(captured, "layers")
    assert second == (first[0] + 1,)


def test_autocast_within_a_graph_counts() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    products = [graph.call_function(torch.matmul, (x, x))]
    for dtype in (torch.bfloat16, torch.float16):
        entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", dtype, True, False))
        products.append(graph.call_function(torch.matmul, (x, x)))
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output(tuple(products))
    captured = vbpfx.capture(fx.GraphModule(nn.Module(), graph), torch.ones(3, 8, 8))
    dtypes = [node.meta["val"].dtype for node in captured.nodes.values() if node.name.startswith("matmul")]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]
