"""The shipped small networks load their weights, are trained, and have blocks to prune."""

from __future__ import annotations

import pytest
from small_networks import CONVOLUTIONAL, NAMES, WEIGHTS, load, task

import vbpfx
from vbpfx.demo.digits import Split, load_digits

# Measured score, number of blocks and hidden neurons; half a per cent is three of the 597 test images.
MEASURED = {
    "convnext": (0.9966, 7, 384),
    "mixer": (0.9883, 12, 720),
    "swin": (0.9799, 4, 192),
    "swiglu": (0.9816, 4, 96),
    "resnet": (0.9983, 6, 224),
    "resnext": (0.9983, 9, 272),
    "unet": (0.7110, 12, 168),
}


@pytest.fixture(scope="module")
def split() -> Split:
    return load_digits()


def test_every_weight_file_has_its_network() -> None:
    assert {path.stem for path in WEIGHTS.iterdir()} == set(NAMES) == set(MEASURED) > set(CONVOLUTIONAL)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_network_is_trained_and_prunable(name: str, split: Split) -> None:
    expected, blocks, neurons = MEASURED[name]
    model = load(name)
    assert task(name).score(model, split.test_images, split.test_labels) >= expected - 0.005
    analysis = vbpfx.find_blocks(vbpfx.capture(model, split.train_images[:4]))
    assert (len(analysis.usual), analysis.neurons) == (blocks, neurons)
