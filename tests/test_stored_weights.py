"""Layers that compute their weights from parameters become plain layers with these weights, which are narrowed like others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import assert_unchanged, randomize, stages, state
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ArtifactError, CaptureError


def standardised(weight: Tensor) -> Tensor:
    """Return a weight whose rows have the mean 0 and the variance 1, as in weight standardisation."""
    rows = weight.flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return rows.view_as(weight)


class StandardConvolution(nn.Conv2d):
    """A convolution with weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the weight, and convolve."""
        weight = standardised(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, groups=self.groups)


class StandardLinear(nn.Linear):
    """A linear layer with weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the weight, and multiply."""
        return F.linear(input, standardised(self.weight), self.bias)


class OwnPadding(StandardConvolution):
    """A convolution that pads by as much as the size of the picture asks for (SAME in TensorFlow)."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad, and convolve."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class OfItsInput(nn.Conv2d):
    """A convolution whose weight depends on what it reads."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the weight, and convolve."""
        return F.conv2d(input, self.weight * input.mean().tanh(), self.bias)


def network(first: type[nn.Conv2d] = StandardConvolution, **options: int) -> nn.Sequential:
    """Return convolutions with padding, stride and groups, and a linear layer, in float64."""
    layers = [
        first(3, 16, 2 if first is OwnPadding else 1, **options),
        nn.ReLU(),
        StandardConvolution(16, 12, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        StandardLinear(12, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    ]
    return randomize(nn.Sequential(*layers).double())


def pictures() -> Tensor:
    return torch.randn(4, 3, 7, 6, dtype=torch.float64)


def test_the_copy_computes_the_same_with_plain_layers() -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    before, x = state(model), pictures()
    stored = vbpfx.store_weights(model, x)
    assert_unchanged(model, before)
    assert type(stored) is type(model)
    assert [type(stored[i]) for i in (0, 2, 6)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert all(layer.training for layer in stored.modules())
    assert [stored[i].weight.requires_grad for i in (0, 2, 6)] == [False, True, True]
    assert stored[2].bias is None
    assert torch.equal(stored[6].weight, standardised(model[6].weight))
    other = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(stored(other), model(other), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_copy_is_narrowed_in_its_own_class(frontend: str) -> None:
    model, x = network(), pictures()
    refused = vbpfx.find_blocks(vbpfx.capture(model, x, frontend=frontend))
    (reason,) = (refusal.reason for refusal in refused.refusals if "0.weight" in refusal.producers)
    assert "computes its weight from 0.weight before every call" in reason
    assert "vbpfx.store_weights(model, batch)" in reason
    assert not refused.blocks

    stored = vbpfx.store_weights(model, x).eval()
    result = stages(stored, x, frontend=frontend, ratio=0.5, method="vbp")
    assert sorted(block.width for block in result.analysis.blocks) == [10, 12, 16]
    other = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    own = vbpfx.apply_plan(stored, result.plan)
    for small in (result.small, own):
        assert vbpfx.verify(result.captured, small, result.plan, other, tolerance=1e-9).effect > 1e-3
    with pytest.raises(ArtifactError, match="another structure"):
        vbpfx.apply_plan(model, result.plan)


@pytest.mark.parametrize("first", [OwnPadding, OfItsInput])
def test_layers_that_are_no_plain_layer_stay(first: type[nn.Conv2d]) -> None:
    model, x = network(first), pictures()
    stored = vbpfx.store_weights(model, x)
    assert type(stored[0]) is first
    assert type(stored[2]) is nn.Conv2d
    torch.testing.assert_close(stored(x), model(x), rtol=1e-13, atol=1e-13)


def test_a_weight_that_depends_on_the_data_is_refused_without_that_advice() -> None:
    analysis = vbpfx.find_blocks(vbpfx.capture(network(OfItsInput), pictures()))
    (reason,) = (refusal.reason for refusal in analysis.refusals if refusal.width == 16)
    assert reason == "the weight of the layer is a computed value"


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = StandardLinear(5, 5)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer twice."""
        return self.b(self.a(x).relu())


def test_a_layer_with_two_names_stays_one_layer() -> None:
    stored = vbpfx.store_weights(Twice(), torch.randn(3, 5))
    assert stored.a is stored.b
    assert type(stored.a) is nn.Linear


def test_a_single_layer() -> None:
    layer, x = StandardLinear(5, 3), torch.randn(4, 5)
    stored = vbpfx.store_weights(layer, x)
    assert type(stored) is nn.Linear
    torch.testing.assert_close(stored(x), layer(x))


class ReadsTheWeight(nn.Module):
    """A model whose code reads the weight that a layer computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = StandardLinear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scale by the weight."""
        return self.layer(x) * self.layer.weight.abs().sum()


def test_a_model_that_reads_the_weight_besides_is_an_error() -> None:
    model = ReadsTheWeight()
    with pytest.raises(CaptureError, match="ReadsTheWeight with stored weights differs from the model"):
        vbpfx.store_weights(model, torch.randn(3, 5))


def test_a_network_of_timm() -> None:
    model = randomize(timm.create_model("test_nfnet", num_classes=5)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = vbpfx.find_blocks(vbpfx.capture(model, x))
    stored = vbpfx.store_weights(model, x)
    result = stages(copy.deepcopy(stored), x, ratio=0.5, method="vbp")
    assert len(result.analysis.blocks) > len(before.blocks)
    other = torch.randn(1, 3, 96, 80, dtype=torch.float64)
    assert vbpfx.verify(result.captured, result.small, result.plan, other, tolerance=1e-9).effect > 1e-4
