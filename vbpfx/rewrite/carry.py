"""Correct statistics over a narrowed axis, so that they still include the removed channels, as constants.

A sum, a mean or a norm between two layers reads every channel of the hidden axis. P of its N channels were removed, and
are replaced by the constants a. Then sum_P a and sum_P a^2 are known numbers, so the statistic over all N channels
follows exactly from the K channels that are left. Values are centred before they are squared, so that a large mean does
not cost digits. With m the mean over all N channels and a' the mean of a,

    N var = sum_K (h - m)^2 + P (m - a')^2 + sum_P (a - a')^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.rules.calls import called_module
from vbpfx.rules.table import Argument


@dataclass(frozen=True)
class CarriedSums:
    """The removed channels of one axis, reduced to the plain numbers that a statistic over the axis needs.

    Attributes:
        size: N, the size of the dense axis.
        removed: P, the number of removed channels.
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
    """The removed channels of one axis, as constants.

    Attributes:
        size: N, the size of the dense axis.
        constants: a, (P,) float64.
    """

    size: int
    constants: Tensor

    @cached_property
    def summed(self) -> CarriedSums:
        """The sums of the constants that the statistics need."""
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
    """Correct a statistic over a narrowed axis in place, so that it includes the removed channels again.

    Args:
        node: the call that computes the statistic. Its input is narrowed already.
        kind: the kind of statistic, as in :attr:`vbpfx.plans.records.Reduction.kind`.
        carried: the removed channels.
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
    """A norm over the last axis whose statistics still include channels that were removed.

    It replaces an ``nn.LayerNorm`` or ``nn.RMSNorm`` in a narrowed model of its own class, with the same parameters
    under the same names. The removed channels enter as a few numbers (:class:`CarriedSums`), so the forward is plain
    tensor arithmetic that can be traced, exported and narrowed again.

    Args:
        norm: the norm to replace; its parameters are shared.
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        carried: the removed channels.
    """

    def __init__(self, norm: Any, kind: str, carried: Carried) -> None:
        super().__init__()
        self.kind, self.carried, self.eps = kind, carried.summed, norm.eps
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name, None))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (..., K), normalised."""
        h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y: Tensor = NORMALISE[self.kind](h, self.carried, _eps(self.kind, self.eps, x.dtype)).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows."""
        return f"{self.kind}, {self.carried.size - self.carried.removed} of {self.carried.size} channels"


class _Call:
    """A call of a norm or a reduction, with its arguments as proxies."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node, tracer: fx.proxy.GraphAppendingTracer) -> None:
        self.graph_module, self.node, self.tracer = graph_module, node, tracer
        self.module = called_module(graph_module, node)
        self.out: Any = fx.Proxy(node, tracer)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.x: Any = fx.Proxy(source, tracer)
        self.dtype = source.meta["val"].dtype

    def argument(self, position: int, name: str) -> Any:
        return Argument(position, name).given(self.node, self.module)

    def scaled(self, y: Any, weight: tuple[int, str], bias: tuple[int, str] | None) -> Any:
        """Return y * weight + bias, leaving out whichever of them the call does not have."""
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
        """Return the input in float32 or wider, the precision in which norms compute."""
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
    """Return (h - m) / sqrt(var + eps) over the last axis, of a tensor or a proxy."""
    mean = (h.sum(-1, keepdim=True) + carried.sum) / carried.size
    centred = h - mean
    offset = mean - carried.mean
    squares = (centred * centred).sum(-1, keepdim=True) + offset * offset * carried.removed + carried.spread
    return centred * torch.rsqrt(squares / carried.size + eps)


def _scaled_to_one(h: Any, carried: CarriedSums, eps: float) -> Any:
    """Return h / sqrt(mean square + eps) over the last axis, of a tensor or a proxy."""
    squares = (h * h).sum(-1, keepdim=True) + carried.square_sum
    return h * torch.rsqrt(squares / carried.size + eps)


# Norms over the last axis, of anything that supports a tensor's arithmetic.
NORMALISE: Mapping[str, Callable[[Any, CarriedSums, float], Any]] = {"layer_norm": _centred, "rms_norm": _scaled_to_one}


def _eps(kind: str, stated: float | None, dtype: torch.dtype) -> float:
    """Return the stated epsilon, or torch's default if none is stated."""
    return stated if stated is not None else 1e-5 if kind == "layer_norm" else torch.finfo(dtype).eps


_FORMULAS: Mapping[str, Callable[[_Call, CarriedSums], Any]] = {
    "sum": _sum,
    "mean": _mean,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}


def _infer(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Compute ``meta["val"]`` of a new node from that of its arguments."""
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
