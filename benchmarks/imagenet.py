"""Load a real ImageNet ViT-Tiny, its calibration images and its validation images.

The data is not part of the repository. It is read from the folder that the environment variable ``VBPFX_DATA`` names, or
otherwise from ``shared/data`` beside the repository. That folder holds ``imagenet/vit_tiny_patch16_224.safetensors`` and
the folders ``imagenet/calibration`` and ``imagenet/validation``, each with a CSV file of ``file,label``. Needs the extra
``vbpfx[timm]``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "vit_tiny_patch16_224"
CALIBRATION_IMAGES = 1000

_NORMALISED = (transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3))
# The calibration photographs have a shorter side of 256 pixels. The validation images are already cropped.
_CALIBRATION = transforms.Compose(
    (transforms.Resize(249, InterpolationMode.BICUBIC), transforms.CenterCrop(224), *_NORMALISED)
)
_VALIDATION = transforms.Compose((transforms.Resize((224, 224), InterpolationMode.BICUBIC), *_NORMALISED))


def data_folder() -> Path:
    """Return the folder in which the data is expected; it need not exist."""
    return Path(os.environ.get("VBPFX_DATA") or ROOT.parent / "shared" / "data") / "imagenet"


def is_present(folder: Path) -> bool:
    """Return whether the folder holds the weights and both image lists."""
    return all((folder / name).is_file() for name in (f"{NETWORK}.safetensors", "calibration.csv", "validation.csv"))


def load_network(folder: Path) -> nn.Module:
    """Load the trained ViT-Tiny in eval mode on the CPU."""
    network: nn.Module = timm.create_model(NETWORK)
    network.load_state_dict(load_file(folder / f"{NETWORK}.safetensors"), strict=True)
    return network.eval()


def load_calibration(folder: Path, count: int, console: Console) -> Tensor:
    """Load ``count`` calibration images, spread evenly over the classes, (count, 3, 224, 224), without labels."""
    files = [file for file, _ in _listed(folder / "calibration.csv")]
    chosen = [files[i * len(files) // count] for i in range(count)]
    return _decode(folder, chosen, _CALIBRATION, "decoding calibration images", console)


def load_validation(folder: Path, console: Console) -> tuple[Tensor, Tensor]:
    """Load all validation images, (N, 3, 224, 224), and their labels, (N,)."""
    listed = _listed(folder / "validation.csv")
    images = _decode(folder, [file for file, _ in listed], _VALIDATION, "decoding validation images", console)
    return images, torch.tensor([label for _, label in listed])


def _listed(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="") as file:
        return [(row["file"], int(row["label"])) for row in csv.DictReader(file)]


def _decode(
    folder: Path, files: Sequence[str], transform: Callable[[Image.Image], Tensor], title: str, console: Console
) -> Tensor:
    images = torch.empty(len(files), 3, 224, 224)
    for row, name in enumerate(track(files, title, console=console, transient=True)):
        with Image.open(folder / name) as image:
            images[row] = transform(image.convert("RGB"))
    return images
