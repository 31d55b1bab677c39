"""Small networks with their expected blocks, and small networks whose hidden axis must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Case:
    """A network, an example batch, and the expected result of the analysis.

    ``blocks`` maps names to widths. ``own`` is the reason why the model's own class cannot hold the result. ``refused`` maps
    layers to a part of the reason for which their axis is refused.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    blocks: dict[str, int]
    refused: dict[str, str] | None = None
    frontends: tuple[str, ...] = ("symbolic", "export")
    own: str = ""


class Net(nn.Module):
    """A module with given layers as attributes and a given forward function."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._body = forward

    def forward(self, x: Tensor) -> Any:
        return self._body(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tokens() -> Tensor:
    return torch.randn(3, 5, 8)


def images() -> Tensor:
    return torch.randn(3, 4, 6, 6)


def mlp(forward: Callable[..., Any], **layers: Any) -> Callable[[], nn.Module]:
    """Return a maker of a network with fc1 8 -> 12, fc2 12 -> 8, and further layers of the case."""
    return lambda: Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8), **layers)


def packed(forward: Callable[..., Any], **layers: Any) -> Callable[[], nn.Module]:
    """Return a maker of a network with fc1 8 -> 24, whose halves gate each other, and fc2 12 -> 8 without a bias."""
    return lambda: Net(forward, fc1=nn.Linear(8, 24), fc2=nn.Linear(12, 8, bias=False), **layers)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.scale = parameter(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


class EqualSizes(nn.Module):
    """Tokens, channels and hidden width have the same length, so that only arguments can tell the axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h = self.fc1(x.transpose(1, 2)).transpose(1, 2).relu()
        return self.fc2(h.transpose(1, 2)).transpose(1, 2) + x.reshape(b, n, c)


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 12), nn.Linear(12, 5)
        self.fc3, self.fc4 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.fc4(F.gelu(self.fc3(x)))


class Nested(nn.Module):
    """Each inner layer is the consumer of one block and the producer of the next; there are no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((8, 12), (12, 10), (10, 14), (14, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


class TwoConsumers(nn.Module):
    """Two layers read the hidden axis behind different functions, which gives two statistics for one choice of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.fc1(x)
        return self.a(h.tanh()), {"b": self.b(F.relu(h) * 2 + 1)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class InvertedBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.reduce, self.grow = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project, self.bn3 = nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.bn1(self.expand(x)))
        h = F.hardswish(self.bn2(self.depthwise(h)))
        h = h * self.grow(F.relu(self.reduce(h.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.bn3(self.project(h))


class Functional(nn.Module):
    """Weights that belong to no layer, no biases, and a depthwise convolution whose groups are a literal number."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.dw = parameter(12, 4, 1, 1), parameter(4, 12, 1, 1), parameter(12, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(F.gelu(F.conv2d(x, self.w1)), self.dw, None, 1, 1, 1, 12)
        return F.conv2d(h, self.w2)


class Reshaped(nn.Module):
    """Literal sizes, sizes read from the tensor, permutations and flattened positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x).relu()
        h = h.flatten(2).transpose(1, 2)
        h = h.reshape(h.shape[0], 36, 12).permute(0, 2, 1)
        return self.conv2(h.view(h.size(0), h.size(1), 6, 6).contiguous())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(x)


class SpatialGate(nn.Module):
    """gMLP: one half is normalised, mixed over the tokens, and gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm, self.mix = nn.Linear(8, 24), nn.Linear(12, 8), nn.LayerNorm(12), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.fc1(x)).chunk(2, dim=-1)
        v = self.mix(self.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return x + self.fc2(u * v)


class Parallel(nn.Module):
    """One layer makes the hidden axes of two branches and a part that must not be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out1, self.out2 = nn.Linear(8, 27), nn.Linear(12, 8), nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.packed(x).split([8, 12, 7], dim=-1)
        return x * a + self.out1(F.gelu(b)) + self.out2(c.tanh())


class FusedOutput(nn.Module):
    """Packed producer and packed consumer: the parts are split in one order and concatenated in another."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(8, 17), nn.Linear(17, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.packed(x)
        return self.out(torch.cat([h[..., 10:].tanh(), h[..., :10].relu()], -1))


class Dense(nn.Module):
    """DenseNet: every layer reads the outputs of all earlier layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.out = nn.Conv2d(5, 6, 1, bias=False), nn.Conv2d(11, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(F.relu(self.bn(a)))
        return self.out(F.gelu(torch.cat([a, b], 1)))


class ResponseNorm(nn.Module):
    """The block of ConvNeXt V2, with its response norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.weight, self.bias = nn.Linear(4, 12), nn.Linear(12, 4), parameter(12), parameter(12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x.permute(0, 2, 3, 1)))
        length = h.norm(p=2, dim=(1, 2), keepdim=True)
        h = h + torch.addcmul(
            self.bias.view(1, 1, 1, -1),
            self.weight.view(1, 1, 1, -1),
            h * (length / (length.mean(-1, keepdim=True) + 1e-6)),
        )
        return x + self.fc2(h).permute(0, 3, 1, 2)


def convolved(forward: Callable[..., Any], **layers: Any) -> Callable[[], nn.Module]:
    """Return a maker of a network with convolutions a 4 -> 12 and b 12 -> 5, which is padded, and further layers of the case."""
    return lambda: Net(forward, **{"a": nn.Conv2d(4, 12, 1), "b": nn.Conv2d(12, 5, 3, padding=1)} | layers)


class Frozen(nn.Module):
    """A BatchNorm whose numbers are fixed, as the backbones of detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.mean, self.var = (parameter(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.mean, self.var))
        scale = weight * (var.abs() + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def normed(norm: nn.Module, activation: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Return a maker of a network with a norm and an activation between a convolution without a bias and a padded one."""
    return convolved(lambda m, x: m.b(activation(m.norm(m.a(x)))), a=nn.Conv2d(4, 12, 1, bias=False), norm=norm)


def two_paths() -> nn.Module:
    net = Net(lambda m, x: m.second(m.first(x)), first=nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
    net.second = net.first
    return net


class HiddenStream(nn.Module):
    """h = h + act(fc(h)): this width belongs to the residual stream and not to a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.fc(h.relu()))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc2 = parameter(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.linear(F.linear(x, self.w).relu(), self.w).relu())


def tied() -> nn.Module:
    layers = {"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8), "fc3": nn.Linear(8, 12), "fc4": nn.Linear(12, 8)}
    net = Net(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc4(m.fc3(x).tanh()), **layers)
    net.fc3.weight = net.fc1.weight
    return net


FOUND = [
    Case("sequential", lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), tokens, {"0->2": 12}),
    Case("residual", ResidualBlock, tokens, {"fc1->fc2": 12}),
    Case("equal sizes", EqualSizes, lambda: torch.randn(8, 8, 8), {"fc1->fc2": 8}),
    Case("token mixing", TokenMixing, tokens, {"fc1->fc2": 12, "fc3->fc4": 16}),
    Case("nested", Nested, tokens, {"layers.0->layers.1": 12, "layers.1->layers.2": 10, "layers.2->layers.3": 14}),
    Case("two consumers", TwoConsumers, tokens, {"fc1->b": 12}),
    Case("gated", Gated, tokens, {"gate->down": 12}),
    Case("inverted bottleneck", InvertedBottleneck, images, {"expand->project": 12, "reduce->grow": 3}),
    Case("functional", Functional, images, {"w1->w2": 12}, own="states the hidden width 12 as a number"),
    Case("reshaped", Reshaped, images, {"conv1->conv2": 12}, own="states the hidden width 12 as a number"),
    Case("attention", Attention, tokens, {"mlp": 12}),
    Case("encoder layer", lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), tokens, {"linear1->linear2": 12}, frontends=("export",)),
    Case("scale and shift", mlp(lambda m, x: m.fc2(m.fc1(x).relu() * m.g + m.s), g=parameter(12), s=parameter(1, 1, 12)), tokens, {"fc1->fc2": 12}),
    Case("broadcast from one", mlp(lambda m, x: m.fc2(m.fc1(x).tanh() * m.g), g=parameter(5, 1)), tokens, {"fc1->fc2": 12}),
    Case("in place", mlp(lambda m, x: m.fc2(F.relu(m.fc1(x), inplace=True).mul_(2).add_(1))), tokens, {"fc1->fc2": 12}),
    Case("shared activation", lambda: Net(lambda m, x: m.fc4(m.act(m.fc3(m.fc2(m.act(m.fc1(x)))))), act=nn.GELU(), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 6), fc3=nn.Linear(6, 10), fc4=nn.Linear(10, 4)), tokens, {"fc1->fc2": 12, "fc2->fc3": 6, "fc3->fc4": 10}),
    Case("prelu", mlp(lambda m, x: m.fc2(m.act(m.fc1(x[:, 0]))), act=nn.PReLU(12)), tokens, {"fc1->fc2": 12}),
    Case("attribute T", mlp(lambda m, x: m.fc2(m.fc1(x[:, 0]).T.relu().T)), tokens, {"fc1->fc2": 12}),
    Case("movedim", mlp(lambda m, x: m.fc2(m.fc1(x).movedim(-1, 0).relu().movedim(0, -1))), tokens, {"fc1->fc2": 12}),
    Case("mean over tokens", mlp(lambda m, x: m.fc2(m.fc1(x).relu().mean(1))), tokens, {"fc1->fc2": 12}),
    Case("strided convolution makes it", lambda: nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 3, 1)), images, {"0->3": 12}),
    Case("grouped convolution", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=2)), images, {"0->2": 12}),
    Case("unpadded window reads it", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 3, 3)), images, {"0->2": 12}),
    Case("concatenated positions", mlp(lambda m, x: m.fc2(torch.cat([m.fc1(x).relu()[:, 1:], m.t.expand(x.shape[0], -1, -1)], 1)), t=parameter(1, 1, 12)), tokens, {"fc1->fc2": 12}),
    Case("fused attention over tokens", mlp(lambda m, x: m.fc2(F.scaled_dot_product_attention(x, x * 2, m.fc1(x).relu()))), tokens, {"fc1->fc2": 12}),
    Case("einsum over tokens", mlp(lambda m, x: m.fc2(torch.einsum("bnm,bmc->bnc", torch.softmax(x @ x.transpose(1, 2), -1), m.fc1(x).relu()))), tokens, {"fc1->fc2": 12}),
    Case("sampled at places of a grid", lambda: Net(lambda m, x: m.out(F.grid_sample(m.first(x), x[:, :2].movedim(1, -1).tanh(), align_corners=False)), first=nn.Conv2d(4, 12, 1), out=nn.Conv2d(12, 3, 1)), images, {"first->out": 12}),
    Case("padded, rolled, repeated", lambda: Net(lambda m, x: m.out(F.interpolate(F.pad(m.first(x), (1, 2)).roll(1, -1), scale_factor=2).repeat(1, 1, 1, 2)), first=nn.Conv2d(4, 12, 1), out=nn.Conv2d(12, 3, 1)), images, {"first->out": 12}),
    Case("padded by computed amounts", lambda: Net(lambda m, x: m.out(F.pad(m.first(x).relu(), (0, -x.shape[2] % 4, 0, -x.shape[3] % 4))), first=nn.Conv2d(4, 12, 1), out=nn.Conv2d(12, 3, 1)), images, {"first->out": 12}),
    Case("instance norm", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.InstanceNorm2d(12, affine=True), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(12, 3, 1)), images, {"0->4": 12}),
    Case("transposed convolution makes it", lambda: nn.Sequential(nn.ConvTranspose2d(4, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 3, 1)), images, {"0->2": 12}),
    Case("groups of channels", mlp(lambda m, x: m.fc2(m.fc1(x).unflatten(-1, (3, 4)).relu().flatten(2))), tokens, {"fc1->fc2": 12}, own="states the hidden width 12"),
    Case("unflattened by one", mlp(lambda m, x: m.fc2(m.fc1(x).unflatten(-1, (12, 1)).tanh().squeeze(-1))), tokens, {"fc1->fc2": 12}, own="states the hidden width 12"),
    Case("stacked", mlp(lambda m, x: m.fc2(torch.stack([m.fc1(x).relu(), m.fc1(-x)], 1).mean(1))), tokens, {"fc1->fc2": 12}),
    Case("embedding", lambda: Net(lambda m, x: m.fc2(m.fc1(m.words(x.abs().ceil().clamp(max=6).long()[..., 0])).relu()), words=nn.Embedding(7, 8), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8)), tokens, {"fc1->fc2": 12}),
    Case("attention over tokens", mlp(lambda m, x: m.fc2(torch.softmax(x @ x.transpose(1, 2), -1) @ m.fc1(x).relu())), tokens, {"fc1->fc2": 12}),
]  # fmt: skip

PACKED = [
    Case("chunk", packed(lambda m, x: m.fc2(F.silu((g := m.fc1(x).chunk(2, dim=-1))[0]) * g[1])), tokens, {"fc1->fc2": 12}),
    Case("split", packed(lambda m, x: m.fc2((g := F.gelu(m.fc1(x)).split(12, -1))[0] * g[1])), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("split by sizes", packed(lambda m, x: m.fc2((g := m.fc1(x).split([12, 12], dim=2))[0].relu() * g[1])), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("slices", packed(lambda m, x: m.fc2((h := m.fc1(x))[..., :12].sigmoid() * h[:, :, -12:])), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("narrow", packed(lambda m, x: m.fc2((h := m.fc1(x)).narrow(-1, 0, 12).tanh() * h.narrow(2, 12, 12))), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("glu", packed(lambda m, x: m.fc2(F.glu(m.fc1(x)))), tokens, {"fc1->fc2": 12}),
    Case("glu module along channels", lambda: nn.Sequential(nn.Conv2d(4, 24, 1), nn.GLU(1), nn.Conv2d(12, 3, 1)), images, {"0->2": 12}),
    Case("unbind of a view", packed(lambda m, x: m.fc2((p := m.fc1(x).view(x.shape[0], 5, 2, 12).unbind(2))[0].relu() * p[1])), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("entries of a view", packed(lambda m, x: m.fc2((p := m.fc1(x).view(-1, 5, 2, 12))[:, :, 0].relu() * p[..., 1, :])), tokens, {"fc1->fc2": 12}, own="states the hidden width 12 as a number"),
    Case("packed, with a norm", packed(lambda m, x: m.fc2(m.norm(F.silu((g := m.fc1(x).chunk(2, -1))[0]) * g[1])), norm=nn.LayerNorm(12)), tokens, {"fc1->fc2": 12}),
    Case("gMLP", SpatialGate, tokens, {"fc1->fc2": 12}),
    Case("parallel branches", Parallel, tokens, {"packed->out1": 12, "packed->out2": 7}, own="states the hidden width"),
    Case("fused output", FusedOutput, tokens, {"packed->out[0:10]": 10, "packed->out[10:17]": 7}, own="states the hidden width"),
    Case("concatenated", lambda: Net(lambda m, x: m.out(torch.cat([m.a(x).relu(), m.b(x).tanh()], -1)), a=nn.Linear(8, 5), b=nn.Linear(8, 7), out=nn.Linear(12, 4, bias=False)), tokens, {"a->out": 5, "b->out": 7}),
    Case("both signs", lambda: Net(lambda m, x: m.out(torch.cat([(h := m.a(x)), -h], -1).relu()), a=nn.Linear(8, 6), out=nn.Linear(12, 4)), tokens, {"a->out": 6}),
    Case("part taken", mlp(lambda m, x: m.fc2(m.fc1(x)) + m.fc1(x)[..., :8]), tokens, {"fc1->fc2": 4}),
    Case("dense connections", Dense, images, {"first->out": 5, "second->out": 6}),
]  # fmt: skip

NORMS = [
    Case("inner norm", mlp(lambda m, x: m.fc2(m.norm(m.fc1(x).relu())), norm=nn.LayerNorm(12)), tokens, {"fc1->fc2": 12}),
    Case("inner norm without parameters", mlp(lambda m, x: m.fc2(F.layer_norm(m.fc1(x).relu(), (12,)))), tokens, {"fc1->fc2": 12}, own="a statistic over the hidden axis"),
    Case("inner rms norm", mlp(lambda m, x: m.fc2(m.norm(m.fc1(x).relu())), norm=nn.RMSNorm(12)), tokens, {"fc1->fc2": 12}),
    Case("rms norm by hand", mlp(lambda m, x: m.fc2((h := m.fc1(x).relu()) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g), g=parameter(12)), tokens, {"fc1->fc2": 12}, own="a statistic over the hidden axis"),
    Case("sum over channels", mlp(lambda m, x: m.fc2((h := m.fc1(x).exp()) / h.sum(-1, True))), tokens, {"fc1->fc2": 12}, own="a statistic over the hidden axis"),
    Case("global response norm", ResponseNorm, images, {"fc1->fc2": 12}, own="a statistic over the hidden axis"),
    Case("norm over a concatenation", lambda: Net(lambda m, x: m.out(m.norm(torch.cat([m.a(x).relu(), m.b(x).tanh()], -1))), a=nn.Linear(8, 5), b=nn.Linear(8, 7), norm=nn.LayerNorm(12), out=nn.Linear(12, 4)), tokens, {"a->out": 5, "b->out": 7}),
]  # fmt: skip

SHARED = [
    Case("called twice", mlp(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc2(m.fc1(-x).relu())), tokens, {"fc1->fc2": 12}),
    Case("called twice without a bias", lambda: Net(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc2(m.fc1(-x).tanh()), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8, bias=False)), tokens, {"fc1->fc2": 12}),
    Case("one layer behind two", lambda: Net(lambda m, x: m.out(m.a(x).relu()) + m.out(F.gelu(m.b(x))), a=nn.Linear(8, 12), b=nn.Linear(8, 12), out=nn.Linear(12, 4)), tokens, {"a->out": 12}),
    Case("effective squeeze", lambda: Net(lambda m, x: m.out((h := m.expand(x).relu()) * m.gate(h.mean((2, 3), keepdim=True)).sigmoid()), expand=nn.Conv2d(4, 12, 1), gate=nn.Conv2d(12, 12, 1), out=nn.Conv2d(12, 3, 1)), images, {"expand->out": 12}),
    Case("recurrent over a hidden state", lambda: Net(lambda m, x: m.out(m.step(m.step(m.first(x).relu()).tanh()).tanh()), first=nn.Linear(8, 12), step=nn.Linear(12, 12), out=nn.Linear(12, 4)), tokens, {"first->out": 12}),
    Case("weights transposed", lambda: Net(lambda m, x: (x @ m.w1.T).relu() @ m.w2.t(), w1=parameter(12, 8), w2=parameter(4, 12)), tokens, {"w1->w2": 12}, own="adds no bias"),
    Case("a module on two paths", two_paths, tokens, {"first": 12}),
    Case("weights without layers", lambda: Net(lambda m, x: (x @ m.w1).relu() @ m.w2, w1=parameter(8, 12), w2=parameter(12, 4)), tokens, {"w1->w2": 12}, own="adds no bias"),
    Case("weights without layers, nested", lambda: Net(lambda m, x: x @ m.w1 @ m.w2 @ m.w3, w1=parameter(8, 12), w2=parameter(12, 10), w3=parameter(10, 4)), tokens, {"w1->w2": 12, "w2->w3": 10}, own="adds no bias"),
    Case("weights in front", lambda: Net(lambda m, x: m.w2 @ (m.w1 @ x).relu(), w1=parameter(12, 5), w2=parameter(4, 12)), tokens, {"w1->w2": 12}, own="adds no bias"),
    Case("addmm", lambda: Net(lambda m, x: torch.addmm(m.b2, torch.addmm(m.b1, x.flatten(0, 1), m.w1).relu(), m.w2), b1=parameter(12), b2=parameter(4), w1=parameter(8, 12), w2=parameter(12, 4)), tokens, {"w1->w2": 12}),
]  # fmt: skip

C1, C2, C3, T2 = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d
PADDED = [
    Case("padded convolution", lambda: nn.Sequential(C2(4, 12, 1), nn.ReLU(), C2(12, 3, 3, padding=1)), images, {"0->2": 12}),
    Case("padded without biases", lambda: nn.Sequential(C2(4, 12, 3, bias=False), nn.BatchNorm2d(12), nn.GELU(), C2(12, 3, 3, padding=1, bias=False)), images, {"0->3": 12}),
    Case("padded, strided and dilated", convolved(lambda m, x: x.mean() + m.b(m.a(x).relu()), b=C2(12, 5, 3, 2, padding=2, dilation=2)), images, {"a->b": 12}),
    Case("padded unevenly", convolved(lambda m, x: m.b(m.a(x).relu()), b=C2(12, 5, (3, 2), (1, 3), padding=(2, 0))), images, {"a->b": 12}),
    Case("padded to the same size", convolved(lambda m, x: m.b(m.a(x).relu()), b=C2(12, 5, (5, 3), padding="same", dilation=(1, 2))), images, {"a->b": 12}),
    Case("one entry, padded", convolved(lambda m, x: m.b(m.a(x).relu()), b=C2(12, 5, 1, padding=1)), images, {"a->b": 12}),
    Case("padded in one dimension", lambda: nn.Sequential(C1(5, 12, 3), nn.GELU(), C1(12, 4, 5, 2, padding=3)), tokens, {"0->2": 12}),
    Case("padded in three dimensions", lambda: nn.Sequential(C3(2, 12, 1), nn.SiLU(), C3(12, 3, 3, padding=(1, 0, 2))), lambda: torch.randn(3, 2, 4, 3, 5), {"0->2": 12}),
    Case("padded in a residual branch", convolved(lambda m, x: x + m.b(m.a(x).relu()), b=C2(12, 4, 3, padding=1)), images, {"a->b": 12}),
    Case("padded one after the other", lambda: nn.Sequential(C2(4, 12, 3, padding=1), nn.ReLU(), C2(12, 10, 3, padding=1), nn.ReLU(), C2(10, 5, 3, padding=1)), images, {"0->2": 12, "2->4": 10}),
    Case("transposed", convolved(lambda m, x: m.b(m.a(x).relu()), b=T2(12, 5, 3, 2, padding=1, output_padding=1)), images, {"a->b": 12}),
    Case("transposed into cells", convolved(lambda m, x: m.b(m.a(x).relu()), b=T2(12, 5, 2, 2, bias=False)), images, {"a->b": 12}),
    Case("transposed with gaps", convolved(lambda m, x: m.b(m.a(x).relu()), b=T2(12, 5, 1, 2)), images, {"a->b": 12}),
    Case("transposed in one dimension", lambda: nn.Sequential(C1(5, 12, 3), nn.GELU(), nn.ConvTranspose1d(12, 4, 4, 3, padding=1, output_padding=2)), tokens, {"0->2": 12}),
    Case("transposed in three dimensions", lambda: nn.Sequential(C3(2, 12, 1), nn.ReLU(), nn.ConvTranspose3d(12, 3, (3, 2, 1), dilation=2)), lambda: torch.randn(3, 2, 4, 3, 5), {"0->2": 12}),
    Case("transposed makes it, padded reads it", convolved(lambda m, x: m.b(m.a(x).relu()), a=T2(4, 12, 3, 2)), images, {"a->b": 12}),
    *[Case(f"{mode} border", convolved(lambda m, x: m.b(m.a(x).relu()), b=C2(12, 5, 3, padding=(2, 1), padding_mode=mode)), images, {"a->b": 12}) for mode in ("reflect", "replicate", "circular")],
    Case("reflected, then padded", convolved(lambda m, x: m.b(F.pad(m.a(x).relu(), (2, 1, 0, 1), mode="reflect"))), images, {"a->b": 12}),
    Case("padded and other readers", convolved(lambda m, x: m.b(h := m.a(x).relu()) + m.c(h.tanh()) + m.d(h), c=C2(12, 5, 1, bias=False), d=C2(12, 5, 1)), images, {"a->d": 12}),
    Case("padded readers of two values", convolved(lambda m, x: m.b(h := m.a(x).sigmoid()) + m.c(h.exp()), c=C2(12, 5, 5, padding=2)), images, {"a->c": 12}),
    Case("padded in one of two calls", lambda: Net(lambda m, x: F.conv2d(h := m.a(x).relu(), m.w, m.c, padding=1)[..., 1:-1, 1:-1] + F.conv2d(h * 1.0, m.w, m.c), a=C2(4, 12, 1), w=parameter(5, 12, 3, 3), c=parameter(5)), images, {"a->w": 12}),
    Case("padded, called twice", convolved(lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(-x).relu()).tanh()), images, {"a->b": 12}),
    Case("padded, bare weights", lambda: Net(lambda m, x: F.conv2d(F.conv2d(x, m.w, m.c).tanh() + m.s, m.v, padding=[1, 2]), w=parameter(12, 4, 1, 1), c=parameter(12), s=parameter(12, 1, 1), v=parameter(5, 12, 3, 3)), images, {"w->v": 12}),
    Case("padded behind a linear layer", lambda: Net(lambda m, x: m.b(m.a(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)), a=nn.Linear(4, 12), b=C2(12, 5, 3, padding=1)), images, {"a->b": 12}),
    Case("padded behind a product", lambda: Net(lambda m, x: m.b((m.w @ x.flatten(2)).sigmoid().unflatten(2, (6, 6))), w=parameter(12, 4), b=C2(12, 5, 3, padding=1)), images, {"w->b": 12}),
    Case("padded behind a gate", convolved(lambda m, x: m.b(F.silu((h := m.a(x).chunk(2, 1))[0]) * h[1]), a=C2(4, 24, 1)), images, {"a->b": 12}),
    Case("padded behind an interleaved gate", convolved(lambda m, x: m.b(F.silu((h := m.a(x))[:, ::2]) * h[:, 1::2]), a=C2(4, 24, 1)), images, {"a->b": 12}),
    Case("padded behind glu", convolved(lambda m, x: m.b(F.glu(m.a(x), 1)), a=C2(4, 24, 1)), images, {"a->b": 12}),
    Case("padded behind squeeze-and-excite", convolved(lambda m, x: m.b((h := m.a(x).relu()) * m.up(m.down(F.adaptive_avg_pool2d(h, 1)).relu()).sigmoid()), down=C2(12, 3, 1), up=C2(3, 12, 1)), images, {"a->b": 12, "down->up": 3}),
    Case("padded behind a scale", convolved(lambda m, x: m.b(m.a(x).relu() * m.g.view(1, -1, 1, 1) + m.s), g=parameter(12), s=parameter(12, 1, 1)), images, {"a->b": 12}),
    Case("padded behind a scale for all", convolved(lambda m, x: m.b(m.a(x).relu() * m.g), g=parameter(1, 1, 1)), images, {"a->b": 12}),
    Case("padded behind prelu", convolved(lambda m, x: m.b(m.act(m.a(x))), act=nn.PReLU(12)), images, {"a->b": 12}),
    Case("padded behind prelu for all", convolved(lambda m, x: m.b(m.act(m.a(x))), act=nn.PReLU()), images, {"a->b": 12}),
    Case("padded behind a condition", convolved(lambda m, x: m.b(torch.where((h := m.a(x)) > 0.1, h, h * 0.1))), images, {"a->b": 12}),
    Case("padded behind a depthwise convolution", convolved(lambda m, x: m.b(m.dw(m.a(x).relu()).relu()), dw=C2(12, 12, 3, padding=1, groups=12)), images, {"a->b": 12}),
    Case("padded behind a depthwise convolution and a norm", convolved(lambda m, x: m.b(m.bn(m.dw(m.a(x).relu())).sigmoid()), dw=C2(12, 12, 3, padding=1, groups=12, bias=False), bn=nn.BatchNorm2d(12)), images, {"a->b": 12}),
    Case("padded behind a grouped convolution", convolved(lambda m, x: m.b(m.a(x).tanh()), a=C2(4, 12, 3, padding=1, groups=2)), images, {"a->b": 12}),
    Case("padded readers with other groups", convolved(lambda m, x: m.b(h := m.a(x).tanh()) + m.c(h), a=C2(4, 24, 1), b=C2(24, 8, 3, padding=1, groups=2), c=C2(24, 8, 5, padding=2, groups=4)), images, {"a->c": 24}),
    Case("padded behind pooling", convolved(lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(m.a(x), 3, 1, 1), 3, 2, 1, ceil_mode=True, count_include_pad=False).relu())), images, {"a->b": 12}),
    Case("padded behind pooling modules", convolved(lambda m, x: m.b(m.up(m.pool(m.a(x))).relu()), pool=nn.AvgPool2d(2, ceil_mode=True), up=nn.Upsample(scale_factor=2, mode="bilinear")), images, {"a->b": 12}),
    Case("padded behind interpolation", convolved(lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bicubic").relu())), images, {"a->b": 12}),
    Case("padded behind a concatenation", convolved(lambda m, x: m.b(torch.cat([h := m.a(x).relu(), m.c(h).relu()], 1)), b=C2(18, 5, 3, padding=1), c=C2(12, 6, 3, padding=1)), images, {"a->b": 12, "c->b": 6}),
    Case("padded behind an instance norm", normed(nn.InstanceNorm2d(12, affine=True), F.gelu), images, {"a->b": 12}),
    Case("padded behind running instance statistics", normed(nn.InstanceNorm2d(12, track_running_stats=True), torch.sigmoid), images, {"a->b": 12}),
    Case("padded behind instance statistics", convolved(lambda m, x: m.b(F.instance_norm(m.a(x), m.n.running_mean, m.n.running_var, momentum=0.0).sigmoid()), n=nn.BatchNorm2d(12)), images, {"a->b": 12}),
    Case("padded behind a norm by hand", convolved(lambda m, x: m.b(F.gelu(m.norm(m.a(x)))), a=C2(4, 12, 1, bias=False), norm=Frozen(12)), images, {"a->b": 12}),
    Case("padded behind a norm without parameters", convolved(lambda m, x: m.b(F.gelu(m.norm(m.a(x)))), norm=nn.BatchNorm2d(12, affine=False)), images, {"a->b": 12}),
    Case("padded behind a norm and its negative", normed(nn.BatchNorm2d(12), lambda h: F.leaky_relu(-h, 0.1)), images, {"a->b": 12}),
    Case("padded behind torch.batch_norm", convolved(lambda m, x: m.b(F.leaky_relu(-torch.batch_norm(m.a(x), m.n.weight, m.n.bias, m.n.running_mean, m.n.running_var, False, 0.1, 1e-5, False), 0.1)), n=nn.BatchNorm2d(12)), images, {"a->b": 12}),
    Case("padded behind an activation that is not 0 at 0", lambda: nn.Sequential(C2(4, 12, 1, bias=False), nn.Sigmoid(), C2(12, 3, 3, padding=1)), images, {"0->2": 12}),
]  # fmt: skip

STATED = "states the hidden width 12 as a number"
INTERLEAVED = [
    Case("every other entry", packed(lambda m, x: m.fc2((h := m.fc1(x))[..., ::2].sigmoid() * h[..., 1::2])), tokens, {"fc1->fc2": 12}),
    Case("every third entry", lambda: Net(lambda m, x: m.fc2((h := m.fc1(x))[..., ::3].sigmoid() * h[..., 1::3] + h[..., 2::3]), fc1=nn.Linear(8, 36), fc2=nn.Linear(12, 8)), tokens, {"fc1->fc2": 12}),
    Case("interleaved, with a norm in front", packed(lambda m, x: m.fc2((h := m.norm(m.fc1(x)))[..., ::2].sigmoid() * h[..., 1::2]), norm=nn.LayerNorm(24)), tokens, {"fc1->fc2": 12}),
    Case("interleaved, and read as a whole", packed(lambda m, x: m.fc2((h := m.fc1(x))[..., ::2].sigmoid() * h[..., 1::2]) + m.fc3(h), fc3=nn.Linear(24, 8)), tokens, {"fc1->fc3": 12}),
    Case("interleaved parts of a part", lambda: Net(lambda m, x: m.fc2((h := m.fc1(x)[..., :24])[..., ::2].sigmoid() * h[..., 1::2]) + m.fc3(m.fc1(x)[..., 24:].relu()), fc1=nn.Linear(8, 31), fc2=nn.Linear(12, 8), fc3=nn.Linear(7, 8)), tokens, {"fc1->fc2": 12, "fc1->fc3": 7}, own="states the hidden width"),
    Case("interleaved, unbound", packed(lambda m, x: m.fc2((p := m.fc1(x).view(x.shape[0], 5, 12, 2).unbind(-1))[0].relu() * p[1])), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("interleaved, entries of a view", packed(lambda m, x: m.fc2((p := m.fc1(x).unflatten(-1, (-1, 2)))[..., 0].relu() * p.select(-1, 1))), tokens, {"fc1->fc2": 12}),
    Case("maxout", packed(lambda m, x: m.fc2(m.fc1(x).view(-1, 5, 12, 2).amax(-1))), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("maxout over parts", packed(lambda m, x: m.fc2(torch.max(m.fc1(x).view(-1, 5, 2, 12), 2)[0])), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("maxout of channels", lambda: Net(lambda m, x: m.out(m.first(x).unflatten(1, (2, -1)).max(1).values), first=nn.Conv2d(4, 24, 1), out=nn.Conv2d(12, 3, 1)), images, {"first->out": 12}),
    Case("length of pairs", packed(lambda m, x: m.fc2(m.fc1(x).view(-1, 5, 12, 2).norm(2, -1))), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("mean of parts", packed(lambda m, x: m.fc2(m.fc1(x).tanh().unflatten(-1, (2, -1)).mean(2))), tokens, {"fc1->fc2": 12}),
]  # fmt: skip

ALONG_POSITIONS = [
    Case("largest over positions", mlp(lambda m, x: m.fc2(torch.max(m.fc1(x), 1)[0])), tokens, {"fc1->fc2": 12}),
    Case("largest over positions, by name", mlp(lambda m, x: m.fc2(m.fc1(x).max(1, keepdim=True).values + m.fc1(x).tanh())), tokens, {"fc1->fc2": 12}),
    Case("median and smallest over positions", mlp(lambda m, x: m.fc2(m.fc1(x).median(dim=1)[0] + torch.min(m.fc1(x).tanh(), dim=1).values)), tokens, {"fc1->fc2": 12}),
    Case("sorted and cumulative over positions", mlp(lambda m, x: m.fc2(m.fc1(x).sort(dim=1)[0] + m.fc1(x).cummax(1)[0])), tokens, {"fc1->fc2": 12}),
    Case("the largest few over positions", mlp(lambda m, x: m.fc2(m.fc1(x).topk(2, 1).values.sum(1) + m.fc1(x).kthvalue(2, 1)[0])), tokens, {"fc1->fc2": 12}),
    Case("product over positions", mlp(lambda m, x: m.fc2(m.fc1(x).tanh().prod(1))), tokens, {"fc1->fc2": 12}),
    Case("larger of two", lambda: Net(lambda m, x: m.out(torch.max(m.a(x), m.b(x)).min(m.c)), a=nn.Linear(8, 12), b=nn.Linear(8, 12), c=parameter(12), out=nn.Linear(12, 8)), tokens, {"a->out": 12}),
]  # fmt: skip

SPLIT = [
    Case("tensor_split", packed(lambda m, x: m.fc2((g := m.fc1(x).tensor_split(2, -1))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}),
    Case("tensor_split at", packed(lambda m, x: m.fc2((g := torch.tensor_split(m.fc1(x), (12,), dim=2))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("tensor_split by name", packed(lambda m, x: m.fc2((g := torch.tensor_split(m.fc1(x), sections=2, dim=-1))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}),
    Case("dsplit", packed(lambda m, x: m.fc2((g := m.fc1(x).dsplit(2))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}),
    Case("hsplit at", packed(lambda m, x: m.fc2((g := torch.hsplit(m.fc1(x[:, 0]), [12]))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("vsplit", packed(lambda m, x: m.fc2((g := m.fc1(x[:, 0]).T.vsplit(2))[0].T.tanh() * g[1].T)), tokens, {"fc1->fc2": 12}),
    Case("split_with_sizes", packed(lambda m, x: m.fc2((g := m.fc1(x).split_with_sizes([12, 12], -1))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}, own=STATED),
    Case("unsafe_chunk", packed(lambda m, x: m.fc2((g := m.fc1(x).unsafe_chunk(2, -1))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}),
    Case("unsafe_split", packed(lambda m, x: m.fc2((g := m.fc1(x).unsafe_split(12, -1))[0].tanh() * g[1])), tokens, {"fc1->fc2": 12}, own=STATED),
]  # fmt: skip


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return all tokens as rows, and the indices of those whose first entry is positive."""
    rows = x.flatten(0, 1)
    return rows, (rows[:, 0] > 0).nonzero()[:, 0]


def put_back_by_mask(m: nn.Module, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    out, mask = rows.clone(), rows[:, 0] > 0
    out[mask] = m.fc2(m.fc1(rows[mask]).relu())
    return out


def hidden_added(m: nn.Module, x: Tensor) -> Tensor:
    rows, i = rows_of(x)
    h = m.fc1(rows)
    return m.fc2(torch.zeros_like(h).index_add(0, i, h[i].tanh()))


def hidden_put(m: nn.Module, x: Tensor) -> Tensor:
    rows, i = rows_of(x)
    h = m.fc1(rows)
    return m.fc2(h.index_put((i,), h[i].tanh()))


def hidden_scattered(m: nn.Module, x: Tensor) -> Tensor:
    rows, i = rows_of(x)
    h = m.fc1(rows)
    return m.fc2(torch.zeros_like(h).scatter_add(0, i[:, None].expand(-1, 12), h[i].tanh()))


def hidden_gathered(m: nn.Module, x: Tensor) -> Tensor:
    h = m.fc1(x)
    order = x[..., :1].argsort(1).expand(-1, -1, h.shape[-1])
    return m.fc2(h.gather(1, order).cumsum(1))


class MaskedEncoder(nn.Module):
    """An encoder with a causal mask: torch's encoder checks whether its mask is the causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.encoder(x, mask=mask)


def two_kinds() -> Tensor:
    """Return tokens, every other one of which has a positive first entry."""
    x = tokens()
    x[..., 0] = torch.tensor([1.0, -1.0]).repeat(8)[:15].view(3, 5)
    return x


PICKED = [
    Case("rows picked and added", mlp(lambda m, x: (r := rows_of(x))[0].index_add(0, r[1], m.fc2(m.fc1(r[0][r[1]]).relu()))), two_kinds, {"fc1->fc2": 12}),
    Case("rows selected and copied", mlp(lambda m, x: (r := rows_of(x))[0].index_copy(0, r[1], m.fc2(m.fc1(r[0].index_select(0, r[1])).relu()))), two_kinds, {"fc1->fc2": 12}),
    Case("rows put back by a mask", mlp(put_back_by_mask), two_kinds, {"fc1->fc2": 12}, frontends=("export",)),
    Case("rows taken by a mask", mlp(lambda m, x: (r := rows_of(x))[0].index_add(0, r[1], m.fc2(m.fc1(r[0])[r[0][:, 0] > 0].relu()))), two_kinds, {"fc1->fc2": 12}),
    Case("hidden rows added", mlp(hidden_added), two_kinds, {"fc1->fc2": 12}),
    Case("hidden rows put", mlp(hidden_put), two_kinds, {"fc1->fc2": 12}),
    Case("hidden rows scattered", mlp(hidden_scattered), two_kinds, {"fc1->fc2": 12}, own=STATED),
    Case("hidden rows gathered", mlp(hidden_gathered), tokens, {"fc1->fc2": 12}),
    Case("two indices side by side", lambda: Net(lambda m, x: m.out(m.first(x)[:, :, m.i, m.j].relu().mean(-1)), first=nn.Conv2d(4, 12, 1), out=nn.Linear(12, 3), i=nn.Buffer(torch.tensor([0, 2, 5])), j=nn.Buffer(torch.tensor([1, 1, 4]))), images, {"first->out": 12}),
    Case("two indices apart", lambda: Net(lambda m, x: m.out(m.first(x).transpose(1, 2)[:, m.i, :, m.j].relu().mean(0)), first=nn.Conv2d(4, 12, 1), out=nn.Linear(12, 3), i=nn.Buffer(torch.tensor([0, 2, 5])), j=nn.Buffer(torch.tensor([1, 1, 4]))), images, {"first->out": 12}),
    Case("encoder with a mask", MaskedEncoder, tokens, {"encoder.layers.0": 12, "encoder.layers.1": 12}, frontends=("export",)),
]  # fmt: skip

FOUND += PACKED + PADDED + NORMS + SHARED + INTERLEAVED + ALONG_POSITIONS + SPLIT + PICKED

REFUSED = [
    Case("output", mlp(lambda m, x: (m.fc2(h := m.fc1(x).relu()), h)), tokens, {}, {"fc1": "reaches the output"}),
    Case("residual from hidden", HiddenStream, tokens, {}, {"": "residual stream"}),
    Case("softmax", mlp(lambda m, x: m.fc2(m.fc1(x).softmax(-1))), tokens, {}, {"fc1": "softmax mixes"}),
    Case("cumulative", mlp(lambda m, x: m.fc2(m.fc1(x).cumsum(dim=-1))), tokens, {}, {"fc1": "cumsum mixes"}),
    Case("sorted", mlp(lambda m, x: m.fc2(m.fc1(x).sort(-1).values)), tokens, {}, {"fc1": "sort"}),
    Case("flipped", mlp(lambda m, x: m.fc2(m.fc1(x).flip(-1))), tokens, {}, {"fc1": "flip moves the channels"}),
    Case("unlisted", mlp(lambda m, x: m.fc2(torch.special.entr(m.fc1(x).abs()))), tokens, {}, {"fc1": "operator special_entr is not in the operator table (see docs/adding_an_operator.md)"}, ("symbolic",)),
    Case("interleaved, and cut in two", packed(lambda m, x: m.fc2((h := m.fc1(x))[..., ::2].sigmoid() * h[..., :12])), tokens, {}, {"fc1": "and another slice cuts between them"}),
    Case("every other entry of an odd number", lambda: Net(lambda m, x: m.fc2((h := m.fc1(x))[..., ::2].tanh()) + h[..., 1::2].sum(-1, keepdim=True), fc1=nn.Linear(8, 13), fc2=nn.Linear(7, 8)), tokens, {}, {"fc1": "a slice with a step takes only some of its entries (as x[..., ::2] does)"}),
    Case("channels picked", mlp(lambda m, x: m.fc2(m.fc1(x)[..., m.order]), order=torch.randperm(12)), tokens, {}, {"fc1": "entries of it are picked by computed indices"}),
    Case("largest of the channels", mlp(lambda m, x: m.fc2(m.fc1(x)) + m.fc1(x).max(-1, keepdim=True).values), tokens, {}, {"fc1": "max reduces it"}),
    Case("topk of the channels", mlp(lambda m, x: m.fc2(m.fc1(x)) + m.fc1(x).topk(8, -1).values), tokens, {}, {"fc1": "topk compares the channels along it"}),
    Case("largest of all", mlp(lambda m, x: m.fc2(m.fc1(x)) + m.fc1(x).max()), tokens, {}, {"fc1": "max reduces it"}),
    Case("groups that are mixed", mlp(lambda m, x: m.fc2(m.fc1(x).unflatten(-1, (3, 4)).transpose(2, 3).flatten(2))), tokens, {}, {"fc1": "transpose and flatten shuffle its channels"}),
    Case("parts of two sizes", mlp(lambda m, x: m.fc2(m.fc1(x).reshape(x.shape[0], 4, 15).relu().view(x.shape[0], 5, 12))), tokens, {}, {"fc1": "splits or merges"}),
    Case("size in arithmetic", mlp(lambda m, x: m.fc2((h := m.fc1(x)) / h.shape[-1])), tokens, {}, {"fc1": "its size enters"}, ("symbolic",)),
    Case("size of another axis", lambda: Net(lambda m, x: m.fc2(m.fc1(x).relu().reshape(x.shape)), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 4)), tokens, {}, {"fc1": "it is an input"}, ("symbolic",)),
    Case("padded, no bias in front", lambda: nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)), images, {}, {"0": "a constant value other than 0, and no bias or norm in front"}),
    Case("transposed, no bias in front", lambda: nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.Tanh(), nn.ConvTranspose2d(12, 3, 2, 2)), images, {}, {"0": "a padded or transposed convolution reads it. The constants"}),
    Case("padded, depthwise without a bias in front", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)), images, {}, {"0": "a constant value other than 0, and no bias or norm in front"}),
    Case("padded, instance norm without parameters in front", normed(nn.InstanceNorm2d(12), torch.relu), images, {}, {"a": "a constant value other than 0, and no bias or norm in front"}),
    Case("padded twice", convolved(lambda m, x: m.b(F.pad(m.a(x).relu(), (1, 0, 1, 0)))), images, {}, {"a": "behind pad no channel is constant"}),
    Case("padded, averages over its border in front", convolved(lambda m, x: m.b(F.avg_pool2d(m.a(x).relu(), 3, 1, 1))), images, {}, {"a": "behind avg_pool2d no channel is constant"}),
    Case("padded, averages over a stated number in front", convolved(lambda m, x: m.b(F.avg_pool2d(m.a(x).relu(), 2, divisor_override=3))), images, {}, {"a": "behind avg_pool2d no channel is constant"}),
    Case("padded, gated by another tensor", convolved(lambda m, x: m.b(m.a(x) * x.mean(1, keepdim=True))), images, {}, {"a": "behind mul no channel is constant"}),
    Case("padded, sampled at places", convolved(lambda m, x: m.b(F.grid_sample(m.a(x), x[:, :2].movedim(1, -1).tanh(), align_corners=False))), images, {}, {"a": "behind grid_sample"}),
    Case("padded, summed over positions", convolved(lambda m, x: m.b(m.a(x).cumsum(-1))), images, {}, {"a": "behind cumsum no channel is constant"}),
    Case("padded, positions mixed by a layer", convolved(lambda m, x: m.b(m.mix(m.a(x)).sigmoid()), mix=nn.Linear(6, 6, bias=False)), images, {}, {"a": "behind linear no channel is constant"}),
    Case("padded, positions mixed by attention", convolved(lambda m, x: m.b((torch.softmax(x @ x.mT, -1)[:, :1] @ m.a(x)).sigmoid())), images, {}, {"a": "behind matmul no channel is constant"}),
    Case("padded, a norm over the channels", convolved(lambda m, x: m.b(m.norm(m.a(x).movedim(1, -1)).movedim(-1, 1)), norm=nn.LayerNorm(12)), images, {}, {"a": "a statistic is taken over it, in which a constant channel would count"}),
    Case("padded, in calls of which one has another constant", convolved(lambda m, x: m.b(m.a(x)) + m.b(m.a(x).exp())), images, {}, {"a": "in several calls, and in these a constant channel has different values"}),
    Case("padded, its weight is read besides", convolved(lambda m, x: m.b(m.a(x)) + m.b.weight.mean((0, 2, 3), keepdim=True)[:, :1]), images, {}, {"a": "b.weight is used by more than its own layer"}),
    Case("tied convolutions", lambda: Net(lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w, m.b, padding=1).relu(), m.w, padding=1), w=parameter(12, 4, 3, 3), b=parameter(12)), images, {}, {"": "is used by more than its own layer"}),
    Case("tied", tied, tokens, {}, {"fc1": "tied to"}),
    Case("computed weight", mlp(lambda m, x: m.fc2(F.linear(x, m.fc1.weight * 2).relu())), tokens, {}, {}),
    Case("weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 12)), nn.ReLU(), nn.Linear(12, 8)), tokens, {}, {}),
    Case("weight norm of a convolution", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(12, 3, 3, padding=1))), images, {}, {}),
    Case("product with an input", lambda: Net(lambda m, x: m.fc2(m.fc1(x) * x), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 4)), tokens, {}, {"fc1": "input of the model"}),
    Case("recurrent", Recurrent, tokens, {}, {}),
    Case("constant of the trace", mlp(lambda m, x: m.fc2(m.fc1(x) * torch.arange(12.0).to(x))), tokens, {}, {"fc1": "constant"}, ("symbolic",)),
]  # fmt: skip
