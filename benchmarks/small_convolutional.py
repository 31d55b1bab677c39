"""Small convolutional networks with padded 3x3 convolutions, and the task of removing noise.

A ResNet and a ResNeXt of timm's residual blocks read the 8x8 digits without a stem that shrinks them. A U-Net removes
Gaussian noise from the same images: it has skip connections by concatenation, strided convolutions on the way down, and
transposed convolutions on the way up. All have BatchNorm and ReLU. ``small_networks.py`` trains and loads them.
"""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn
from torch.nn import functional as F

from vbpfx.demo.digits import PIXEL_STD

NOISE = 0.25 / PIXEL_STD  # standard deviation, in units of the normalised images; 0.25 where white is 1 and black 0
TEST_NOISE_SEED = 0
_BLOCKS_A_STAGE = 2


def _residual(kind: type[nn.Module], entered: int, stages: tuple[int, ...], **options: int) -> nn.Sequential:
    """Return a network of residual blocks.

    Args:
        kind: timm's class of a block.
        entered: channels behind the first convolution.
        stages: the ``planes`` of the blocks of each stage; every stage but the first halves the image.
        options: further arguments of every block.
    """
    layers: list[nn.Module] = [_convolution(1, entered)]
    channels = entered
    for stage, planes in enumerate(stages):
        width = planes * kind.expansion
        for block in range(_BLOCKS_A_STAGE):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = downsample_conv(channels, width, 1, stride=stride) if (channels, stride) != (width, 1) else None
            layers.append(kind(channels, planes, stride, shortcut, **options))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a padded 3x3 convolution with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def resnet() -> nn.Module:
    """Return a ResNet of two basic blocks in each of three stages, with the widths of the ResNets for CIFAR."""
    return _residual(BasicBlock, 16, (16, 32, 64))


def resnext() -> nn.Module:
    """Return a ResNeXt of two bottlenecks in each of two stages, whose 3x3 convolutions have 4 groups of 8 channels."""
    return _residual(Bottleneck, 16, (8, 8), cardinality=4, base_width=64)


class UNet(nn.Module):
    """A U-Net that predicts the noise in an image, and returns the image without it.

    Args:
        widths: channels at full, half and quarter resolution.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        full, half, quarter = widths
        self.enter = nn.Sequential(_convolution(1, full), _convolution(full, full))
        self.down1 = nn.Sequential(_convolution(full, half, 2), _convolution(half, half))
        self.down2 = nn.Sequential(_convolution(half, quarter, 2), _convolution(quarter, quarter))
        self.up2 = nn.ConvTranspose2d(quarter, half, 2, stride=2)
        self.join2 = nn.Sequential(_convolution(2 * half, half), _convolution(half, half))
        self.up1 = nn.ConvTranspose2d(half, full, 2, stride=2)
        self.join1 = nn.Sequential(_convolution(2 * full, full), _convolution(full, full))
        self.leave = nn.Conv2d(full, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return images of the same shape, (n, 1, height, width), whose sides must be multiples of 4."""
        full = self.enter(images)
        half = self.down1(full)
        up = self.up2(self.down2(half))
        up = self.up1(self.join2(torch.cat([half, up], 1)))
        return images - self.leave(self.join1(torch.cat([full, up], 1)))


def unet() -> nn.Module:
    """Return a U-Net of 8, 16 and 24 channels."""
    return UNet((8, 16, 24))


def noisy(images: Tensor, seed: int) -> Tensor:
    """Return the images with Gaussian noise, always the same for one seed."""
    return images + NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def denoising_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error of what the model makes of the images with new noise; the labels are not used."""
    return F.mse_loss(model(images + NOISE * torch.randn_like(images)), images)


def shares_removed(cleaned: Tensor, noise: Tensor, images: Tensor) -> Tensor:
    """Return 1 - e_i / mean(n), (n,) float64: their mean is the share of the noise's squared error that is removed.

    Args:
        cleaned: output of the network, of the shape of ``images``; e_i is its squared error.
        noise: its input; n_i is the squared error of that.
        images: images without noise.
    """
    left, before = ((x - images).double().square().flatten(1).mean(1) for x in (cleaned, noise))
    return 1 - left / before.mean()


def noise_removed(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the squared error of the test noise that the model removes; the labels are not used."""
    noise = noisy(images, TEST_NOISE_SEED)
    with torch.no_grad():
        return shares_removed(model(noise), noise, images).mean().item()
