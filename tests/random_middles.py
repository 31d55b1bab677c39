"""Operators between producer and consumer in random networks: every operator of the table, and traps.

A :class:`Middle` maps a hidden tensor to a hidden tensor of the same shape. Its functions are bounded or grow linearly, so
that a network of many of them stays well conditioned. An error of 1e-9 cannot come from rounding then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Hidden:
    """The layout of a hidden tensor: ``flat`` (B, w), ``tokens`` (B, T, w) or ``images`` (B, w, H, W)."""

    layout: str
    positions: tuple[int, ...]
    channels: int
    width: int

    @property
    def axis(self) -> int:
        """The hidden axis, counted from the end."""
        return -3 if self.layout == "images" else -1

    @property
    def spread(self) -> tuple[int, ...]:
        """The axes of the positions."""
        return {"flat": (), "tokens": (1,), "images": (2, 3)}[self.layout]

    @property
    def per_channel(self) -> tuple[int, ...]:
        """The shape of a broadcastable tensor with one entry per channel."""
        return (self.width, 1, 1) if self.layout == "images" else (self.width,)

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        """Return a layer over the channels."""
        return nn.Conv2d(inputs, outputs, 1) if self.layout == "images" else nn.Linear(inputs, outputs)


class Op(nn.Module):
    """One middle operator with its parameters, buffers and layers."""

    def __init__(self, name: str, hidden: Hidden) -> None:
        super().__init__()
        self.middle, self.hidden = MIDDLES[name], hidden
        for key, value in self.middle.make(hidden).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(key, value)
            else:
                setattr(self, key, value)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.middle.apply(self, h, x)


@dataclass(frozen=True)
class Middle:
    """A middle operator.

    Attributes:
        apply: function from the op, the hidden tensor and the stream that the block reads to the new hidden tensor.
        make: function that makes the parameters, buffers and layers of the operator.
        fits: function that says for which layouts the operator is possible.
        in_place: whether it changes its operand in place.
        jumps: whether it is discontinuous. It then follows the producer directly, where no value lies on a jump.
    """

    apply: Callable[[Any, Tensor, Tensor], Tensor]
    make: Callable[[Hidden], dict[str, Any]] = lambda hidden: {}
    fits: Callable[[Hidden], bool] = lambda hidden: True
    in_place: bool = False
    jumps: bool = False


MIDDLES: dict[str, Middle] = {}


def _layouts(*names: str) -> Callable[[Hidden], bool]:
    return lambda hidden: hidden.layout in names


def _some(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _module(
    name: str, make: Callable[[Hidden], nn.Module], fits: Callable[[Hidden], bool] = lambda hidden: True
) -> None:
    MIDDLES[name] = Middle(lambda m, h, x: m.layer(h), lambda hidden: {"layer": make(hidden)}, fits)


def _activations() -> None:
    for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
                 nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softshrink, nn.Softsign,
                 nn.RReLU, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):  # fmt: skip
        _module(f"nn.{kind.__name__}", lambda hidden, kind=kind: kind())
    _module("nn.Dropout1d", lambda hidden: nn.Dropout1d(), _layouts("tokens"))
    _module("nn.Dropout2d", lambda hidden: nn.Dropout2d(), _layouts("images"))
    for kind in (nn.ReLU, nn.SiLU, nn.Hardswish):
        MIDDLES[f"nn.{kind.__name__}(inplace)"] = Middle(
            lambda m, h, x: m.layer(h), lambda hidden, kind=kind: {"layer": kind(inplace=True)}, in_place=True
        )
    MIDDLES["nn.Threshold"] = Middle(
        lambda m, h, x: m.layer(h), lambda hidden: {"layer": nn.Threshold(0.1, 0.2)}, jumps=True
    )
    for name in ("relu", "gelu", "silu", "leaky_relu", "elu", "selu", "celu", "relu6", "mish", "logsigmoid", "tanhshrink", "hardtanh",
                 "hardsigmoid", "hardswish", "softplus", "softshrink", "softsign", "rrelu"):  # fmt: skip
        MIDDLES[f"F.{name}"] = Middle(lambda m, h, x, n=name: getattr(F, n)(h))
    for name in ("relu", "silu", "leaky_relu", "elu", "hardtanh", "hardswish", "mish"):
        MIDDLES[f"F.{name}(inplace)"] = Middle(lambda m, h, x, n=name: getattr(F, n)(h, inplace=True), in_place=True)
    for name in ("dropout", "alpha_dropout"):
        MIDDLES[f"F.{name}"] = Middle(lambda m, h, x, n=name: getattr(F, n)(h, 0.3, False))


_DOMAINS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "any": (lambda h: h, ("relu", "sigmoid", "tanh", "neg", "abs", "sin", "cos", "atan", "asinh", "erf", "erfc", "sinc", "nan_to_num",
                          "clone", "detach", "contiguous")),
    "small": (lambda h: h.clamp(-1, 1), ("exp", "expm1", "sinh", "cosh", "tan", "square")),
    "positive": (lambda h: h.abs() + 1.5, ("log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "acosh", "lgamma")),
    "unit": (lambda h: h.tanh() * 0.9, ("asin", "acos", "atanh", "erfinv")),
    "probability": (lambda h: h.sigmoid() * 0.8 + 0.1, ("logit",)),
    "jumps": (lambda h: h, ("sign", "floor", "ceil", "round", "trunc", "frac", "hardshrink")),
}  # fmt: skip


def _unary() -> None:
    for domain, (into, names) in _DOMAINS.items():
        for name in names:
            jumps = domain == "jumps"
            if hasattr(torch.Tensor, name):
                MIDDLES[f".{name}"] = Middle(lambda m, h, x, n=name, i=into: getattr(i(h), n)(), jumps=jumps)
            if hasattr(torch, name):
                MIDDLES[f"torch.{name}"] = Middle(lambda m, h, x, n=name, i=into: getattr(torch, n)(i(h)), jumps=jumps)
            if hasattr(torch.Tensor, f"{name}_") and name != "detach":
                MIDDLES[f".{name}_"] = Middle(
                    lambda m, h, x, n=f"{name}_", i=into: getattr(i(h), n)(), in_place=True, jumps=jumps
                )


def _elementwise() -> None:
    def entry(name: str, apply: Callable[..., Tensor], *, in_place: bool = False, jumps: bool = False) -> None:
        make = lambda hidden: {"s": _some(*hidden.per_channel), "t": _some(*hidden.per_channel)}  # noqa: E731
        MIDDLES[name] = Middle(apply, make, in_place=in_place, jumps=jumps)

    def in_place_operators(m: Any, h: Tensor, x: Tensor) -> Tensor:
        h += 0.5
        h *= m.s
        return h

    entry("scale", lambda m, h, x: h * m.s)
    entry("shift", lambda m, h, x: m.t + h)
    entry("scale and shift", lambda m, h, x: h * m.s + m.t)
    entry("scale used twice", lambda m, h, x: h * m.s + m.s)
    entry("parameter cast on the way", lambda m, h, x: h * m.s.to(x.dtype))
    entry("parameter through a function", lambda m, h, x: h * m.s.sigmoid() - m.t.tanh())
    entry("numbers", lambda m, h, x: (1 - h) * 0.5 / 1.5 + 0.25)
    entry("pow", lambda m, h, x: h.clamp(-1, 1) ** 2 + torch.pow(h.tanh(), 3))
    entry("lerp", lambda m, h, x: torch.lerp(h, m.s, 0.3))
    entry("addcmul", lambda m, h, x: torch.addcmul(m.t, h, m.s, value=0.5))
    entry("addcdiv", lambda m, h, x: torch.addcdiv(h, m.t, m.s.abs() + 1))
    entry("maximum", lambda m, h, x: torch.maximum(h, m.s).minimum(m.s + 1))
    entry("clamp", lambda m, h, x: h.clip(max=1.5).clamp_min(-0.5))
    entry("where", lambda m, h, x: torch.where(h > 0, h, h * 0.1))
    entry("masked_fill", lambda m, h, x: h.masked_fill(h < 0, 0.0))
    entry("compared", lambda m, h, x: h * (h >= 0.2) + (h < m.s) * m.t, jumps=True)
    entry("logical", lambda m, h, x: h * torch.logical_and(h > -1, h < 1), jumps=True)
    entry("like", lambda m, h, x: h + torch.zeros_like(h) - torch.ones_like(h) * 0.5)
    entry("itself twice", lambda m, h, x: h * h.sigmoid() + h)
    entry("add_", lambda m, h, x: h.add_(m.t), in_place=True)
    entry("mul_", lambda m, h, x: h.mul_(0.5).clamp_(-2, 2), in_place=True)
    entry("iadd", in_place_operators, in_place=True)
    entry("cast", lambda m, h, x: h.to(torch.float64).double())
    entry("cast as the stream", lambda m, h, x: h.type_as(x).to(x.dtype))
    entry(
        "broadcast from the stream",
        lambda m, h, x: h * x.mean((-3 if m.hidden.layout == "images" else -1), keepdim=True),
    )
    MIDDLES["buffer"] = Middle(
        lambda m, h, x: h * m.c, lambda hidden: {"c": torch.randn(hidden.per_channel, dtype=torch.float64)}
    )
    MIDDLES["one for all"] = Middle(lambda m, h, x: h * m.s, lambda hidden: {"s": _some(1)})
    _module("nn.PReLU()", lambda hidden: nn.PReLU())
    _module("nn.PReLU(w)", lambda hidden: nn.PReLU(hidden.width), _layouts("images", "flat"))
    MIDDLES["F.prelu"] = Middle(
        lambda m, h, x: F.prelu(h, m.s), lambda d: {"s": _some(d.width)}, _layouts("images", "flat")
    )
    _module(
        "nn.BatchNorm",
        lambda d: (nn.BatchNorm2d if d.layout == "images" else nn.BatchNorm1d)(d.width),
        _layouts("images", "flat"),
    )
    pictures: Callable[[Hidden], bool] = lambda d: d.layout == "images" and prod(d.positions) > 1  # noqa: E731
    _module("nn.InstanceNorm", lambda d: nn.InstanceNorm2d(d.width, 1e-3), pictures)
    _module("nn.InstanceNorm(affine)", lambda d: nn.InstanceNorm2d(d.width, 1e-3, affine=True), pictures)
    MIDDLES["BatchNorm behind transpose"] = Middle(
        lambda m, h, x: m.bn(h.transpose(1, 2)).transpose(1, 2),
        lambda d: {"bn": nn.BatchNorm1d(d.width)},
        _layouts("tokens"),
    )
    MIDDLES["F.batch_norm"] = Middle(
        lambda m, h, x: F.batch_norm(h, m.mean, m.var, m.weight, m.bias),
        lambda d: {"mean": torch.randn(d.width, dtype=torch.float64), "var": torch.rand(d.width, dtype=torch.float64) + 0.5,
                   "weight": _some(d.width), "bias": _some(d.width)},
        _layouts("images", "flat"),
    )  # fmt: skip


def _positions() -> None:
    several: Callable[[Hidden], bool] = lambda d: prod(d.positions) > 1  # noqa: E731
    placed: Callable[[Hidden], bool] = lambda d: bool(d.positions)  # noqa: E731

    def entry(name: str, apply: Callable[..., Tensor], fits: Callable[[Hidden], bool] = placed, **make: Any) -> None:
        MIDDLES[name] = Middle(apply, lambda d: {key: value(d) for key, value in make.items()}, fits)

    def excite(m: Any, h: Tensor, x: Tensor) -> Tensor:
        squeezed = h.mean(m.hidden.spread, keepdim=True) if m.hidden.spread else h
        return h * m.up(m.down(squeezed).relu()).sigmoid()

    MIDDLES["squeeze and excite"] = Middle(excite, lambda d: {"down": d.layer(d.width, 3), "up": d.layer(3, d.width)})
    entry("centred over positions", lambda m, h, x: h - h.mean(m.hidden.spread, keepdim=True))
    entry("over its largest", lambda m, h, x: h / (1 + h.abs().amax(dim=m.hidden.spread, keepdim=True)))
    entry("largest over positions", lambda m, h, x: h + torch.max(h, m.hidden.spread[-1], keepdim=True)[0] * 0.5)
    entry("sorted over positions", lambda m, h, x: h.sort(dim=m.hidden.spread[0]).values.tanh())
    entry("over its spread", lambda m, h, x: h / (1 + h.std(m.hidden.spread, keepdim=True)), several)
    entry(
        "softmax over positions",
        lambda m, h, x: h.softmax(m.hidden.spread[0]) + F.log_softmax(h, dim=m.hidden.spread[-1]) * 0.1,
    )
    entry("cumsum over positions", lambda m, h, x: h.cumsum(m.hidden.spread[-1]))
    entry("positional", lambda m, h, x: h + m.p,
          p=lambda d: _some(1, *d.positions, d.width) if d.layout == "tokens" else _some(d.width, *d.positions))  # fmt: skip
    entry("positional of length one", lambda m, h, x: h * m.p,
          p=lambda d: _some(*d.positions, 1) if d.layout == "tokens" else _some(1, *d.positions))  # fmt: skip
    entry(
        "rejoined positions",
        lambda m, h, x: torch.cat([h[:, 1:], h[:, :1]], dim=1),
        lambda d: _layouts("tokens")(d) and several(d),
    )
    entry("extended positions", lambda m, h, x: torch.cat([m.p.expand(h.shape[0], -1, -1), h], 1)[:, 1:], _layouts("tokens"),
          p=lambda d: _some(1, 1, d.width))  # fmt: skip
    entry(
        "first position for all", lambda m, h, x: h + h[:, :1].expand(-1, m.hidden.positions[0], -1), _layouts("tokens")
    )
    entry("one position", lambda m, h, x: h * h[:, 0].unsqueeze(1), _layouts("tokens"))
    entry("transpose and back", lambda m, h, x: h.transpose(-1, 1).sin().transpose(1, -1))
    entry("movedim and back", lambda m, h, x: h.movedim(m.hidden.axis, 0).tanh().movedim(0, m.hidden.axis))
    entry("permute and back", lambda m, h, x: h.permute(2, 0, 1).sin().permute(1, 2, 0), _layouts("tokens"))
    entry("T and back", lambda m, h, x: h.T.sin().T, _layouts("flat"))
    entry("mT and back", lambda m, h, x: h.mT.sin().mT, _layouts("tokens"))
    entry(
        "channels last and back",
        lambda m, h, x: (h.permute(0, 2, 3, 1) * m.s).permute(0, 3, 1, 2),
        _layouts("images"),
        s=lambda d: _some(d.width),
    )
    entry("unsqueeze and back", lambda m, h, x: h.unsqueeze(1).sin().squeeze(1), lambda d: True)
    entry(
        "flattened batch",
        lambda m, h, x: h.flatten(0, 1).sin().view(-1, m.hidden.positions[0], m.hidden.width),
        _layouts("tokens"),
    )
    entry(
        "reshaped by its own sizes",
        lambda m, h, x: h.reshape(-1, h.shape[-1]).sin().reshape(h.shape),
        _layouts("tokens"),
    )
    entry("view_as", lambda m, h, x: h.flatten(0, 1).sin().view_as(h), _layouts("tokens"))
    entry("reshaped by its own size", lambda m, h, x: h.reshape(h.size(0), -1, h.size(2)).sin(), _layouts("tokens"))
    entry(
        "flattened positions",
        lambda m, h, x: h.flatten(2).sin().reshape(h.shape[0], h.shape[1], *m.hidden.positions),
        _layouts("images"),
    )
    entry(
        "width stated",
        lambda m, h, x: h.reshape(-1, m.hidden.width, prod(m.hidden.positions)).unflatten(2, m.hidden.positions),
        _layouts("images"),
    )
    entry("depthwise", lambda m, h, x: m.dw(h), _layouts("images"),
          dw=lambda d: nn.Conv2d(d.width, d.width, 3, padding=1, groups=d.width, bias=False))  # fmt: skip
    entry("F.conv2d depthwise", lambda m, h, x: F.conv2d(h, m.w, m.b, 1, 1, 1, m.hidden.width), _layouts("images"),
          w=lambda d: _some(d.width, 1, 3, 3), b=lambda d: _some(d.width))  # fmt: skip
    entry("depthwise over tokens", lambda m, h, x: m.dw(h.transpose(1, 2)).transpose(1, 2), _layouts("tokens"),
          dw=lambda d: nn.Conv1d(d.width, d.width, 3, padding=1, groups=d.width))  # fmt: skip
    entry("average pool", lambda m, h, x: m.pool(h), _layouts("images"), pool=lambda d: nn.AvgPool2d(3, 1, 1))
    entry("max pool", lambda m, h, x: F.max_pool2d(h, 3, 1, 1), _layouts("images"))
    entry(
        "sampled at places",
        lambda m, h, x: F.grid_sample(h, x[:, [0, -1]].movedim(1, -1).tanh(), align_corners=False),
        _layouts("images"),
    )
    entry("adaptive pool", lambda m, h, x: h * F.adaptive_avg_pool2d(h, 1), _layouts("images"))
    entry(
        "tokens mixed by attention", lambda m, h, x: (x @ x.transpose(1, 2)).tanh().softmax(-1) @ h, _layouts("tokens")
    )
    entry("tokens mixed by bmm", lambda m, h, x: torch.bmm((x @ x.mT).tanh(), h), _layouts("tokens"))
    entry("tokens mixed by a layer", lambda m, h, x: m.mix(h.transpose(1, 2)).transpose(1, 2), _layouts("tokens"),
          mix=lambda d: nn.Linear(d.positions[0], d.positions[0]))  # fmt: skip


def _across() -> None:
    """Register norms across the hidden axis, which are refused or rewritten with the removed channels' share."""

    def entry(
        name: str, apply: Callable[..., Tensor], fits: Callable[[Hidden], bool] = lambda d: True, **make: Any
    ) -> None:
        MIDDLES[name] = Middle(apply, lambda d: {key: value(d) for key, value in make.items()}, fits)

    def grn(m: Any, h: Tensor, x: Tensor) -> Tensor:
        size = h.square().sum(m.hidden.spread, keepdim=True).add(1e-6).sqrt() if m.hidden.spread else h.abs()
        return h + m.s * (h * (size / (size.mean(m.hidden.axis, keepdim=True) + 1e-6))) + m.t

    def by_hand(m: Any, h: Tensor, x: Tensor) -> Tensor:
        mean = h.mean(m.hidden.axis, keepdim=True)
        return (h - mean) / ((h - mean).pow(2).mean(m.hidden.axis, keepdim=True) + 1e-3).sqrt() * m.s

    affine = {"s": lambda d: _some(*d.per_channel), "t": lambda d: _some(*d.per_channel)}
    entry("LayerNorm", lambda m, h, x: m.n(h), _layouts("tokens", "flat"), n=lambda d: nn.LayerNorm(d.width, 1e-3))
    entry(
        "F.layer_norm",
        lambda m, h, x: F.layer_norm(h, h.shape[-1:], m.s, m.t, 1e-3),
        _layouts("tokens", "flat"),
        **affine,
    )
    entry("RMSNorm", lambda m, h, x: m.n(h), _layouts("tokens", "flat"), n=lambda d: nn.RMSNorm(d.width, 1e-3))
    entry(
        "LayerNorm, channels last",
        lambda m, h, x: m.n(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        _layouts("images"),
        n=lambda d: nn.LayerNorm(d.width, 1e-3),
    )
    entry(
        "GroupNorm",
        lambda m, h, x: m.n(h),
        lambda d: d.layout != "tokens" and d.width > 1,  # a single value is not accepted
        n=lambda d: nn.GroupNorm(1, d.width, 1e-3),
    )
    entry(
        "RMS by hand",
        lambda m, h, x: h * torch.rsqrt(h.pow(2).mean(m.hidden.axis, keepdim=True) + 1e-3) * m.s,
        **affine,
    )
    entry("norm by hand", by_hand, **affine)
    entry("GRN", grn, **affine)
    entry("centred across", lambda m, h, x: h - h.mean(m.hidden.axis, keepdim=True))
    entry("over its sum", lambda m, h, x: h / (1 + h.abs().sum(m.hidden.axis, keepdim=True)))


def _traps() -> None:
    equal: Callable[[Hidden], bool] = lambda d: d.channels == d.width  # noqa: E731
    even: Callable[[Hidden], bool] = lambda d: d.width % 2 == 0  # noqa: E731

    def entry(
        name: str,
        apply: Callable[..., Tensor],
        fits: Callable[[Hidden], bool] = lambda d: True,
        in_place: bool = False,
        **make: Any,
    ) -> None:
        MIDDLES[name] = Middle(apply, lambda d: {key: value(d) for key, value in make.items()}, fits, in_place)

    def half(m: Any, h: Tensor, x: Tensor) -> Tensor:
        a, b = h.chunk(2, dim=m.hidden.axis)
        return torch.cat([b, a], dim=m.hidden.axis)

    def shuffle(m: Any, h: Tensor, x: Tensor) -> Tensor:
        return (
            h.unflatten(m.hidden.axis, (2, -1))
            .transpose(m.hidden.axis, m.hidden.axis - 1)
            .flatten(m.hidden.axis - 1, m.hidden.axis)
        )

    def read_before(m: Any, h: Tensor, x: Tensor) -> Tensor:
        before = h * 2
        h.tanh_()
        return before + h

    def view_changed(m: Any, h: Tensor, x: Tensor) -> Tensor:
        h.transpose(0, 1).mul_(0.5)
        return h.sin()

    entry("times the stream", lambda m, h, x: h * x.sin(), equal)
    entry("plus the stream", lambda m, h, x: h + x, equal)
    entry("shaped as the stream", lambda m, h, x: h.reshape(x.shape), equal)
    entry("viewed as the stream", lambda m, h, x: h.view_as(x), equal)
    entry(
        "plus its transpose",
        lambda m, h, x: h + h.transpose(1, 2),
        lambda d: d.layout == "tokens" and d.positions == (d.width,),
    )
    entry("softmax", lambda m, h, x: h.softmax(m.hidden.axis))
    entry("cumsum", lambda m, h, x: h.cumsum(m.hidden.axis))
    entry("flip", lambda m, h, x: h.flip(m.hidden.axis))
    entry("roll", lambda m, h, x: h.roll(1, m.hidden.axis))
    entry("sort", lambda m, h, x: h.sort(m.hidden.axis).values)
    entry("gram", lambda m, h, x: h @ (h.transpose(-1, -2) @ h).tanh(), _layouts("tokens"))
    entry("itself and its transpose", lambda m, h, x: (h @ h.transpose(-1, -2)).softmax(-1) @ h, _layouts("tokens"))
    entry("size in arithmetic", lambda m, h, x: h / h.shape[m.hidden.axis])
    entry(
        "counted", lambda m, h, x: h * torch.arange(m.hidden.width, dtype=torch.float64).reshape(m.hidden.per_channel)
    )
    entry("halves swapped", half, even)
    entry("shuffled", shuffle, even)
    entry(
        "heads",
        lambda m, h, x: h.unflatten(-1, (2, -1)).softmax(-2).flatten(-2),
        lambda d: even(d) and d.layout != "images",
    )
    entry("positions into channels", lambda m, h, x: h.flatten(1).tanh().reshape(h.shape))
    entry(
        "transposed by a view",
        lambda m, h, x: h.reshape(h.shape[0], m.hidden.width, -1).sin().reshape(h.shape),
        _layouts("tokens"),
    )
    entry("one channel for all", lambda m, h, x: h + h.narrow(m.hidden.axis, 0, 1))
    entry("read before and after", read_before, in_place=True)
    entry("a view changed in place", view_changed, in_place=True)
    entry("squeezed everywhere", lambda m, h, x: h.squeeze().reshape(h.shape))
    entry(
        "mixed by a computed weight",
        lambda m, h, x: F.linear(h, m.w * 0.5),
        _layouts("tokens", "flat"),
        w=lambda d: _some(d.width, d.width),
    )
    entry(
        "layer back to itself",
        lambda m, h, x: h + m.q(h).sin(),
        _layouts("tokens", "flat"),
        q=lambda d: nn.Linear(d.width, d.width),
    )
    entry(
        "batch statistics",
        lambda m, h, x: m.n(h),
        lambda d: d.layout == "tokens" and d.width > 1,
        n=lambda d: nn.BatchNorm1d(d.positions[0], track_running_stats=False),
    )
    entry(
        "grouped",
        lambda m, h, x: m.c(h),
        lambda d: even(d) and d.layout == "images",
        c=lambda d: nn.Conv2d(d.width, d.width, 1, groups=2),
    )
    entry(
        "einsum",
        lambda m, h, x: torch.einsum("...c,c->...c", h, m.s),
        _layouts("tokens", "flat"),
        s=lambda d: _some(d.width),
    )


_activations()
_unary()
_elementwise()
_positions()
PLAIN = frozenset(MIDDLES)
_across()
ACROSS = frozenset(MIDDLES) - PLAIN
_traps()
TRAPS = frozenset(MIDDLES) - PLAIN - ACROSS
