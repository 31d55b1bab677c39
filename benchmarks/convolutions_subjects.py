"""The networks of the benchmark on padded convolutions, with the data that every method gets and the test data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import small_networks
import torch
from small_convolutional import TEST_NOISE_SEED, shares_removed
from torch import Tensor, nn
from torch.nn import functional as F

from vbpfx.demo.digits import PIXEL_STD, load_digits

BATCH = 100


@dataclass(frozen=True)
class Draw:
    """Calibration data that is drawn from the training images.

    Attributes:
        inputs: what the network sees, (n, 1, 8, 8).
        targets: labels, (n,), or images without noise, (n, 1, 8, 8); only methods that need them use them.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def batches(self) -> list[Tensor]:
        """The inputs in batches."""
        return list(self.inputs.split(BATCH))


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network with its data.

    Attributes:
        title: title of its part of the page.
        about: description for the page.
        model: the network in eval mode, on the CPU.
        writes_stream: names of the layers that write to a residual stream.
        draw: function from a number of images and a seed to calibration data.
        test_inputs: inputs on which networks are compared.
        values: function from the outputs on them to one value per test image, (n,) float64; the score is their mean.
        loss: function from outputs and targets to the loss that Taylor importance takes the gradient of.
        noise_psnr: peak signal-to-noise ratio of the test inputs in dB, if the network removes noise.
    """

    title: str
    about: str
    model: nn.Module
    writes_stream: tuple[str, ...]
    draw: Callable[[int, int], Draw]
    test_inputs: Tensor
    values: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    noise_psnr: float | None


TEXTS = {
    "resnet": ("A small ResNet", "Six of timm's basic blocks in three stages of 16, 32 and 64 channels"),
    "resnext": ("A small ResNeXt", "Four of timm's bottlenecks, whose 3x3 convolutions have 4 groups of 8 channels"),
    "unet": (
        "A small U-Net that removes noise",
        "8, 16 and 24 channels, skip connections by concatenation, transposed convolutions on the way up",
    ),
}


def subject(name: str) -> Subject:
    """Load one of the networks in ``small_networks.CONVOLUTIONAL``."""
    split, model, task = load_digits(), small_networks.load(name), small_networks.task(name)
    removes_noise = name == "unet"
    test_inputs = task.inputs(split.test_images, TEST_NOISE_SEED)

    def draw(count: int, seed: int) -> Draw:
        chosen = torch.randperm(len(split.train_images), generator=torch.Generator().manual_seed(seed))[:count]
        images = split.train_images[chosen]
        inputs = task.inputs(images, TEST_NOISE_SEED + 1 + seed)
        return Draw(inputs, images if removes_noise else split.train_labels[chosen])

    def values(outputs: Tensor) -> Tensor:
        if removes_noise:
            return shares_removed(outputs, test_inputs, split.test_images)
        return (outputs.argmax(1) == split.test_labels).double()

    return Subject(
        *TEXTS[name],
        model,
        tuple(_stream_writers(model)),
        draw,
        test_inputs,
        values,
        F.mse_loss if removes_noise else F.cross_entropy,
        _psnr(test_inputs, split.test_images) if removes_noise else None,
    )


def _psnr(noise: Tensor, images: Tensor) -> float:
    """Return -10 log10 of the mean squared error, in pixels where white is 1 and black 0."""
    return -10 * math.log10(F.mse_loss(noise, images).item() * PIXEL_STD**2)


def _stream_writers(model: nn.Module) -> list[str]:
    """Return the names of the first convolution and of the last one of every residual block, with its shortcut."""
    blocks = {name: child for name, child in model.named_children() if hasattr(child, "downsample")}
    if not blocks:
        return []
    last = {"BasicBlock": "conv2", "Bottleneck": "conv3"}
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    ends = tuple(f"{name}.{last[type(block).__name__]}" for name, block in blocks.items())
    return [name for name in named if "." in name and (name in ends or ".downsample." in name or name == named[0])]
