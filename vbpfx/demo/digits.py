"""The demo: a small vision transformer trained on scikit-learn's bundled 8x8 digits.

Nothing is downloaded. scikit-learn contains the images, and the weights are next to this file. They were made by
``vbpfx/demo/train_digits.py``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["WEIGHTS", "Split", "accuracy", "build_model", "load_digits", "load_trained"]

WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")

# The mean and standard deviation of the training pixels after scaling to [0, 1], rounded. They are fixed, so that the
# shipped weights always see the inputs that they were trained on.
PIXEL_MEAN = 0.305
PIXEL_STD = 0.376

TRAIN_SIZE = 1200
SPLIT_SEED = 0


class Split(NamedTuple):
    """Normalised float32 images of shape (N, 1, 8, 8) and their int64 labels, for training and testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def _require(module: str, distribution: str) -> ModuleType:
    """Import an optional module of the demo, or raise an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the digits demo needs {distribution}, which could not be imported ({error}); "
            f"install it with: pip install {distribution}"
        ) from error


def load_digits() -> Split:
    """Return the 1797 digits as a fixed, stratified split: 1200 for training and 597 for testing."""
    datasets = _require("sklearn.datasets", "scikit-learn")
    model_selection = _require("sklearn.model_selection", "scikit-learn")
    raw = datasets.load_digits()
    pixels = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    images = (pixels - PIXEL_MEAN) / PIXEL_STD
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, test = model_selection.train_test_split(
        range(len(labels)), train_size=TRAIN_SIZE, random_state=SPLIT_SEED, stratify=raw.target
    )
    return Split(images[train], labels[train], images[test], labels[test])


def build_model() -> nn.Module:
    """Return the demo's vision transformer with fresh random weights: 6 blocks of 256 MLP neurons each."""
    vision_transformer = _require("timm.models.vision_transformer", "timm")
    model: nn.Module = vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=4, mlp_ratio=4
    )
    return model


def load_trained() -> nn.Module:
    """Return the demo's vision transformer with the shipped weights, on the CPU and in eval mode."""
    safetensors = _require("safetensors.torch", "safetensors")
    model = build_model()
    model.load_state_dict(safetensors.load_file(WEIGHTS))
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Return the fraction of ``images`` whose highest logit is at their label.

    The model runs in its current mode. Switching to eval mode here would fail for exported modules, which do not allow
    it.
    """
    correct = 0
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    with torch.no_grad():
        for batch, target in batches:
            correct += int((model(batch).argmax(dim=-1) == target).sum())
    return correct / len(labels)
