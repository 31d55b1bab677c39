"""Networks that tests of the command line name as ``cli_networks:NAME``."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    """Return an MLP for images of 3x8x8 with two blocks, of 32 and 16 neurons."""
    torch.manual_seed(1)
    layers = nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(nn.Flatten(), *layers)


def single() -> nn.Module:
    """Return a network of one layer, which has no hidden axis."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def branching() -> nn.Module:
    """Return a network whose control flow depends on its input."""
    return _Branching()


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.words(tokens).mean(1) * scale)


class _Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + torch.special.bessel_j0(x.flatten(1)[:, :5])


def bessel() -> nn.Module:
    """Return the MLP plus a Bessel function, for which ONNX has no operator."""
    return _Bessel()


def hollow() -> nn.Module:
    """Return a network on the meta device, whose weights hold no numbers."""
    with torch.device("meta"):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


def two() -> nn.Module:
    """Return a network that takes ``tokens`` (samples, length) below 9 and ``scale`` (samples, 1)."""
    torch.manual_seed(1)
    return _Two()


def wide() -> nn.Module:
    """Return the MLP in float64."""
    return mlp().double()


def text() -> str:
    """Return a text instead of a network."""
    return "no network"


def raising() -> nn.Module:
    """Raise an error instead of making a network."""
    raise ValueError("out of layers")


def failing_in_rank_1() -> nn.Module:
    """Return the MLP, or raise in the process of rank 1."""
    if os.environ["RANK"] == "1":
        raise ValueError("not in rank 1")
    return mlp()


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        x = self.words(tokens)
        return self.head(x + self.attention(x, x, x, key_padding_mask=pad, need_weights=False)[0])


def padded() -> nn.Module:
    """Return a network that takes ``tokens`` (samples, length) below 9 and ``pad`` of that shape, True at padding."""
    torch.manual_seed(1)
    return _Padded()
