"""Small networks that carry their expected blocks, and small networks whose hidden axis must be refused."""

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
    """A network, an example batch, and what the analysis must find.

    ``blocks`` is name -> width. ``refused`` is a part of the reason for which the axis of a layer is refused.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    blocks: dict[str, int]
    refused: dict[str, str] | None = None
    frontends: tuple[str, ...] = ("symbolic", "export")


class Net(nn.Module):
    """Layers as attributes, the forward pass as a function of them."""

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
    """fc1 8 -> 12 and fc2 12 -> 8, beside what else the case wants."""
    return lambda: Net(forward, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8), **layers)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.scale = parameter(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


class EqualSizes(nn.Module):
    """Tokens, channels, hidden width and head count all of one length: only arguments can tell them apart."""

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
    """Each layer in the middle is consumer of one block and producer of the next; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((8, 12), (12, 10), (10, 14), (14, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


class TwoConsumers(nn.Module):
    """Two layers read the hidden axis behind different functions: two statistics, one choice of neurons."""

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
    """Weights that belong to no layer, without biases, and a depthwise convolution whose groups are a number."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.dw = parameter(12, 4, 1, 1), parameter(4, 12, 1, 1), parameter(12, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(F.gelu(F.conv2d(x, self.w1)), self.dw, None, 1, 1, 1, 12)
        return F.conv2d(h, self.w2)


class Reshaped(nn.Module):
    """Literal sizes, sizes read from the tensor itself, permutations and flattened positions."""

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


class HiddenStream(nn.Module):
    """h = h + act(fc(h)): the width of a network, not of a block."""

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
    Case("functional", Functional, images, {"w1->w2": 12}),
    Case("reshaped", Reshaped, images, {"conv1->conv2": 12}),
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
    Case("unpadded window reads it", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 3, 3)), images, {"0->2": 12}),
    Case("concatenated positions", mlp(lambda m, x: m.fc2(torch.cat([m.fc1(x).relu()[:, 1:], m.t.expand(x.shape[0], -1, -1)], 1)), t=parameter(1, 1, 12)), tokens, {"fc1->fc2": 12}),
    Case("attention over tokens", mlp(lambda m, x: m.fc2(torch.softmax(x @ x.transpose(1, 2), -1) @ m.fc1(x).relu())), tokens, {"fc1->fc2": 12}),
]  # fmt: skip

REFUSED = [
    Case("output", mlp(lambda m, x: (m.fc2(h := m.fc1(x).relu()), h)), tokens, {}, {"fc1": "reaches the output"}),
    Case("residual from hidden", HiddenStream, tokens, {}, {"": "residual stream"}),
    Case("softmax", mlp(lambda m, x: m.fc2(m.fc1(x).softmax(-1))), tokens, {}, {"fc1": "softmax mixes"}),
    Case("cumulative", mlp(lambda m, x: m.fc2(m.fc1(x).cumsum(dim=-1))), tokens, {}, {"fc1": "cumsum mixes"}),
    Case("inner norm", mlp(lambda m, x: m.fc2(m.norm(m.fc1(x))), norm=nn.LayerNorm(12)), tokens, {}, {"fc1": "norm takes its statistics"}),
    Case("sorted", mlp(lambda m, x: m.fc2(m.fc1(x).sort(-1).values)), tokens, {}, {"fc1": "sort"}),
    Case("flipped", mlp(lambda m, x: m.fc2(m.fc1(x).flip(-1))), tokens, {}, {"fc1": "is not in the operator table"}),
    Case("heads", mlp(lambda m, x: m.fc2(m.fc1(x).unflatten(-1, (3, 4)).relu().flatten(2))), tokens, {}, {"fc1": "splits or merges"}),
    Case("size in arithmetic", mlp(lambda m, x: m.fc2((h := m.fc1(x)) / h.shape[-1])), tokens, {}, {"fc1": "its size enters"}, ("symbolic",)),
    Case("size of another axis", lambda: Net(lambda m, x: m.fc2(m.fc1(x).relu().reshape(x.shape)), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 4)), tokens, {}, {"fc1": "it is an input"}, ("symbolic",)),
    Case("padded convolution", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)), images, {}, {"0": "padded convolution"}),
    Case("grouped convolution", lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=2)), images, {}, {"0": "in groups"}),
    Case("tied", tied, tokens, {}, {"fc1": "tied to"}),
    Case("called twice", lambda: Net(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc2(m.fc1(-x).relu()), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8)), tokens, {}, {"fc1": "shared by 2 calls"}),
    Case("computed weight", mlp(lambda m, x: m.fc2(F.linear(x, m.fc1.weight * 2).relu())), tokens, {}, {}),
    Case("weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 12)), nn.ReLU(), nn.Linear(12, 8)), tokens, {}, {}),
    Case("product with an input", lambda: Net(lambda m, x: m.fc2(m.fc1(x) * x), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 4)), tokens, {}, {"fc1": "input of the model"}),
    Case("part taken", mlp(lambda m, x: m.fc2(m.fc1(x)) + m.fc1(x)[..., :8]), tokens, {}, {}),
    Case("recurrent", Recurrent, tokens, {}, {}),
    Case("constant of the trace", mlp(lambda m, x: m.fc2(m.fc1(x) * torch.arange(12.0).to(x))), tokens, {}, {"fc1": "constant"}, ("symbolic",)),
]  # fmt: skip
