"""Statistics over a narrowed axis, in which the removed channels go on counting as constants.

A sum, a mean or a norm between the layers reads every channel of the hidden axis. With N channels of which P were
removed and stand at the constants a, sum_P a and sum_P a^2 are numbers; so the statistic over all N is known from the K
that are left, and nothing is approximated. Sums are centred before they are squared, so that a large mean loses no
digits: with m the mean over all N and a' the mean of a,

    N var = sum_K (h - m)^2 + P (m - a')^2 + sum_P (a - a')^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.rules.ops import called_module


@dataclass(frozen=True)
class CarriedSums:
    """All that a statistic needs to know of the removed channels of one axis, as numbers.

    Attributes:
        size: N, the size of the dense axis.
        removed: P, how many channels are gone.
        sum, square_sum: sum_P a and sum_P a^2.
        mean: a', the mean of a.
        spread: sum_P (a - a')^2.
    """

    size: int
    removed: int
    sum: float
    square_sum: float
    mean: float
    spread: float


@dataclass(frozen=True)
class Carried:
    """What the removed channels of one axis add to a statistic over it.

    Attributes:
        size: N, the size of the dense axis.
        constants: a, (P,) float64.
    """

    size: int
    constants: Tensor

    @cached_property
    def summed(self) -> CarriedSums:
        """The same as numbers."""
        a = self.constants
        return CarriedSums(
            size=self.size,
            removed=len(a),
            sum=float(a.sum()),
            square_sum=float(a.square().sum()),
            mean=float(a.mean()),
            spread=float((a - a.mean()).square().sum()),
        )


def carry(graph_module: fx.GraphModule, node: fx.Node, kind: str, carried: Carried) -> None:
    """Make a statistic over a narrowed axis count the removed channels again, in place.

    Args:
        node: the call that takes it; its input is narrowed already.
        kind: of :attr:`vbpfx.plans.records.Reduction.kind`.
    """
    graph = graph_module.graph
    before = set(graph.nodes)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(node.next):
        call = _Call(graph_module, node, tracer)
        result = _FORMULAS[kind](call, carried.summed).node
    made = [new for new in graph.nodes if new not in before]
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)
    for new in made:
        _infer(graph_module, new)
    if not node.users:
        graph.erase_node(node)


class CarriedNorm(nn.Module):
    """A norm over the last axis in which channels that are no longer there go on counting.

    It stands for an ``nn.LayerNorm`` or ``nn.RMSNorm`` in a narrowed model of its own class, with the same parameters under
    the same names. What the removed channels add is a few numbers (:class:`CarriedSums`), so that its forward is plain tensor
    arithmetic: it can be traced, exported and narrowed again.

    Args:
        norm: what it stands for; their parameters are the same.
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        carried: what the removed channels add.
    """

    def __init__(self, norm: Any, kind: str, carried: Carried) -> None:
        super().__init__()
        self.kind, self.carried, self.eps = kind, carried.summed, norm.eps
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name, None))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, (..., K)."""
        h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y: Tensor = NORMALISE[self.kind](h, self.carried, _eps(self.kind, self.eps, x.dtype)).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.kind}, {self.carried.size - self.carried.removed} of {self.carried.size} channels"


class _Call:
    """A norm or a reduction, its arguments as proxies."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node, tracer: fx.proxy.GraphAppendingTracer) -> None:
        self.graph_module, self.node, self.tracer = graph_module, node, tracer
        self.module = called_module(graph_module, node)
        self.out: Any = fx.Proxy(node, tracer)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.x: Any = fx.Proxy(source, tracer)
        self.dtype = source.meta["val"].dtype

    def argument(self, position: int, name: str) -> Any:
        if self.module is not None:
            return getattr(self.module, name, None)
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name)

    def scaled(self, y: Any, weight: tuple[int, str], bias: tuple[int, str] | None) -> Any:
        """y * weight + bias, those of them that the call has."""
        for entry, combine in ((weight, torch.mul), (bias, torch.add)):
            tensor = self.argument(*entry) if entry else None
            if isinstance(tensor, nn.Parameter) and entry is not None:
                with self.graph_module.graph.inserting_before(self.node):
                    tensor = self.graph_module.graph.get_attr(f"{self.node.target}.{entry[1]}")
            if tensor is not None:
                operand: Any = fx.Proxy(tensor, self.tracer)
                y = combine(y, operand)
        return y

    def widened(self) -> Any:
        """The input in at least float32, as norms compute."""
        return self.x.to(torch.float32) if self.dtype in (torch.float16, torch.bfloat16) else self.x

    def narrowed(self, y: Any) -> Any:
        return y.to(self.dtype) if self.dtype in (torch.float16, torch.bfloat16) else y


def _sum(call: _Call, carried: CarriedSums) -> Any:
    return call.out + carried.sum


def _mean(call: _Call, carried: CarriedSums) -> Any:
    share = (carried.size - carried.removed) / carried.size
    return call.out * share + carried.sum / carried.size


def _layer_norm(call: _Call, carried: CarriedSums) -> Any:
    eps = _eps("layer_norm", call.argument(4, "eps"), call.dtype)
    return call.scaled(call.narrowed(_centred(call.widened(), carried, eps)), (2, "weight"), (3, "bias"))


def _rms_norm(call: _Call, carried: CarriedSums) -> Any:
    eps = _eps("rms_norm", call.argument(3, "eps"), call.dtype)
    return call.scaled(call.narrowed(_scaled_to_one(call.widened(), carried, eps)), (2, "weight"), None)


def _centred(h: Any, carried: CarriedSums, eps: float) -> Any:
    """(h - m) / sqrt(var + eps) over the last axis, tensors or proxies."""
    mean = (h.sum(-1, keepdim=True) + carried.sum) / carried.size
    centred = h - mean
    offset = mean - carried.mean
    squares = (centred * centred).sum(-1, keepdim=True) + offset * offset * carried.removed + carried.spread
    return centred * torch.rsqrt(squares / carried.size + eps)


def _scaled_to_one(h: Any, carried: CarriedSums, eps: float) -> Any:
    """h / sqrt(mean square + eps) over the last axis, tensors or proxies."""
    squares = (h * h).sum(-1, keepdim=True) + carried.square_sum
    return h * torch.rsqrt(squares / carried.size + eps)


# Norms over the last axis, of anything that computes like a tensor.
NORMALISE: Mapping[str, Callable[[Any, CarriedSums, float], Any]] = {"layer_norm": _centred, "rms_norm": _scaled_to_one}


def _eps(kind: str, stated: float | None, dtype: torch.dtype) -> float:
    """What torch adds where nothing is stated."""
    return stated if stated is not None else 1e-5 if kind == "layer_norm" else torch.finfo(dtype).eps


_FORMULAS: Mapping[str, Callable[[_Call, CarriedSums], Any]] = {
    "sum": _sum,
    "mean": _mean,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}


def _infer(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Write ``meta["val"]`` on a new node, from its arguments'."""
    example = next(n for n in reversed(graph_module.graph.nodes) if isinstance(n.meta.get("val"), Tensor))
    mode = example.meta["val"].fake_mode
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            value = getattr(graph_module.get_submodule(owner), attribute)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        elif node.op == "call_method":
            node.meta["val"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            node.meta["val"] = node.target(*args, **kwargs)
