"""Convert an image to the tensor that a model expects, by the rules of the model's own package or by given settings.

A timm model knows its image size and normalisation. For a torchvision model they are those of the default weights for
its name. A Hugging Face model has ``preprocessor_config.json`` in its folder. For other models the shape must be given.

Images are decoded as in torchvision's ``ImageFolder``: by Pillow, without applying EXIF rotation, and without
transparency.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from vbpfx.display.quiet import quiet_warnings
from vbpfx.errors import CalibrationError, first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's modes with more than 8 bits per channel
_CROP = 0.875  # 224 of 256 pixels, with which most classifiers are evaluated


@dataclass(frozen=True)
class Overrides:
    """Settings that replace those of the model's package. None keeps the package's setting.

    Attributes:
        shape: (channels, height, width) of a sample.
        mean, std: one number per channel, for pixel values between 0 and 1.
        crop: the side of the central crop divided by the side of the resized image. 1 keeps the whole image, for images
            that are already cropped.
    """

    shape: tuple[int, ...] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop: float | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and (len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1):
            raise CalibrationError(
                f"images of shape {'x'.join(map(str, self.shape))}: expected channels (1 or 3) x height x width, such as 3x224x224"
            )
        if self.crop is not None and not 0 < self.crop <= 1:
            raise CalibrationError(f"crop must be above 0 and at most 1, found {self.crop!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) not in (1, 3) or (name == "std" and min(values) <= 0)):
                raise CalibrationError(f"{name} must be 1 or 3 numbers, those of std above 0; found {list(values)}")
            if values is not None and self.shape is not None and len(values) > self.shape[0]:
                raise CalibrationError(f"{name} must be 1 number for images of 1 channel, found {list(values)}")


@dataclass(frozen=True)
class ImageTransform:
    """Converts a decoded image to a tensor (channels, height, width).

    Attributes:
        apply: the transform.
        mode: the Pillow mode of the image that it takes, ``"RGB"`` or ``"L"`` (grey).
        argument: the name of the model's argument, or None if it has only one.
        about: a line that says what the transform does, and where its settings come from.
    """

    apply: Callable[[Image.Image], Tensor]
    mode: str
    argument: str | None
    about: str


def image_transform(model: nn.Module, name: str, overrides: Overrides) -> ImageTransform:
    """Return the transform that prepares images for a model.

    Args:
        name: the string that the model was loaded by, such as ``torchvision:resnet18``.

    Raises:
        CalibrationError: the image size or normalisation is not known, or the overrides do not fit the model.
    """
    _package("torchvision", "torchvision")
    if isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        return _of_timm(model, overrides)
    if name.startswith("torchvision:"):
        return _of_torchvision(name.partition(":")[2], overrides)
    if getattr(model, "main_input_name", None) == "pixel_values":
        return _of_transformers(model, overrides)
    return _plain(model, overrides)


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CalibrationError(f"images need {name} ({error}); install it: pip install {install}") from error


def _of_timm(model: nn.Module, overrides: Overrides) -> ImageTransform:
    data = _package("timm.data", "timm torchvision")
    given: dict[str, Any] = {"input_size": overrides.shape, "crop_pct": overrides.crop}
    given |= {"mean": _tuple(overrides.mean), "std": _tuple(overrides.std)}
    settings = data.resolve_model_data_config(model) | {key: value for key, value in given.items() if value is not None}
    transform = data.create_transform(**settings, is_training=False)
    channels, height, width = settings["input_size"]
    about = (
        f"as timm says: {settings['interpolation']}, {_sizes(settings['crop_mode'], settings['crop_pct'], height, width)}, "
        f"{_normalisation(settings['mean'], settings['std'])}"
    )
    return ImageTransform(transform, _mode(channels), None, about)


def _of_torchvision(name: str, overrides: Overrides) -> ImageTransform:
    models = _package("torchvision.models", "torchvision")
    presets = _package("torchvision.transforms._presets", "torchvision")
    try:
        weights = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise CalibrationError(
            f"torchvision has no weights for {name!r} ({error}); pass shape=, mean= and std="
        ) from error
    make = weights.transforms
    preset = getattr(make, "func", make)  # a preset with settings is a functools.partial, one without is a class
    if preset is not presets.ImageClassification:
        raise CalibrationError(
            f"torchvision:{name} is not an image classifier: its images are prepared by {preset.__name__}; pass arrays (.npz)"
        )
    standard = make()
    changed: dict[str, Any] = {}
    side, resized = standard.crop_size[0], standard.resize_size[0]
    if overrides.shape is not None:
        channels, height, width = overrides.shape
        if channels != 3 or height != width:
            raise CalibrationError(
                f"torchvision's models take square images of 3 channels, found shape {overrides.shape}"
            )
        side, resized = height, round(height * resized / side)
        changed |= {"crop_size": side, "resize_size": resized}
    if overrides.crop is not None:
        changed["resize_size"] = resized = int(side / overrides.crop)
    changed |= {k: v for k, v in (("mean", _tuple(overrides.mean)), ("std", _tuple(overrides.std))) if v is not None}
    transform = make(**changed)
    about = (
        f"as torchvision's {weights} says: {transform.interpolation.value}, shorter side to {resized}, the central {side}x{side}, "
        f"{_normalisation(transform.mean, transform.std)}"
    )
    return ImageTransform(transform, "RGB", None, about)


def _of_transformers(model: nn.Module, overrides: Overrides) -> ImageTransform:
    transformers = _package("transformers", "transformers")
    folder = getattr(model, "name_or_path", "")
    config = getattr(model, "config", None)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False) if folder else None
    except (OSError, ValueError, ImportError):  # there is no preprocessor_config.json, or its kind is not known
        processor = None
    if processor is None:
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        shape = overrides.shape or ((channels, size, size) if isinstance(size, int) else None)
        changed = Overrides(shape, overrides.mean, overrides.std, overrides.crop)
        plain = _plain(model, changed)
        return ImageTransform(plain.apply, plain.mode, "pixel_values", f"no preprocessor_config.json; {plain.about}")
    if overrides.shape is not None or overrides.crop is not None:
        raise CalibrationError(
            f"sizes of images are those of preprocessor_config.json in {folder}: change them there, or remove it and pass shape="
        )
    given = {"image_mean": overrides.mean, "image_std": overrides.std}
    kwargs = {key: list(value) for key, value in given.items() if value is not None}
    about = f"as preprocessor_config.json in {folder} says ({type(processor).__name__})"
    return ImageTransform(partial(_processed, processor, kwargs), _mode(getattr(config, "num_channels", 3)),
                          "pixel_values", about)  # fmt: skip


def _processed(processor: Any, kwargs: dict[str, Any], image: Image.Image) -> Tensor:
    values: Tensor = processor(images=[image], return_tensors="pt", **kwargs)["pixel_values"][0]
    return values


def _plain(model: nn.Module, overrides: Overrides) -> ImageTransform:
    """Return the transform for other models: resize and crop to the shape, with ImageNet's mean and std by default."""
    if overrides.shape is None:
        raise CalibrationError(
            f"{type(model).__name__} does not say what its images look like; pass shape=(3, 224, 224) (--shape 3x224x224), or "
            f"the name of a torchvision model that it is"
        )
    transforms = _package("torchvision.transforms", "torchvision")
    channels, height, width = overrides.shape
    crop = overrides.crop or _CROP
    given = overrides.mean is not None and overrides.std is not None
    if channels == 1 and not given:
        raise CalibrationError(
            "grey images have no usual normalisation; pass mean= and std= (--mean 0 --std 1 for none)"
        )
    mean, std = overrides.mean or IMAGENET_MEAN, overrides.std or IMAGENET_STD
    square = height == width
    resized = (int(height / crop), int(width / crop))
    resize = transforms.Resize(resized[0] if square else resized)
    steps = (resize, transforms.CenterCrop((height, width)), transforms.ToTensor())
    normalise = transforms.Normalize(torch.tensor(mean), torch.tensor(std))
    about = (
        f"bilinear, {f'shorter side to {resized[0]}' if square else 'to {}x{}'.format(*resized)}, the central {height}x{width}, "
        f"{_normalisation(mean, std)}{'' if given else ' (from ImageNet, because the model states none)'}"
    )
    return ImageTransform(transforms.Compose((*steps, normalise)), _mode(channels), None, about)


def open_image(path: Path, mode: str) -> Image.Image:
    """Decode an image.

    Raises:
        CalibrationError: it cannot be read. The message is only the reason, without the path.
    """
    with _decoding(path) as image, quiet_warnings():  # Pillow warns about palettes with transparency
        return image.convert(mode)


def check_image(path: Path) -> str:
    """Return why an image cannot be read, or "" if it can."""
    try:
        with _decoding(path) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, but decoded at an eighth of its size
            image.load()
    except CalibrationError as error:
        return str(error)
    return ""


@contextmanager
def _decoding(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode in _DEEP:
                raise CalibrationError(
                    f"Pillow would clip its values (mode {image.mode}) at 255: convert the image to 8 bits"
                )
            yield image
    except CalibrationError:
        raise
    except UnidentifiedImageError:
        raise CalibrationError(
            "the file is not an image that Pillow can read, although its name ends like one"
        ) from None
    except Exception as error:  # Pillow's plug-ins may raise any exception for a damaged file
        raise CalibrationError(first_line(error)) from error


def _sizes(crop_mode: str, crop: float, height: int, width: int) -> str:
    if crop_mode != "center" or height != width:
        return f"{crop_mode} to {height}x{width} of 1/{crop:g}"
    return f"shorter side to {math.floor(height / crop)}, the central {height}x{width}"


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> str:
    return f"mean {_numbers(mean)}, std {_numbers(std)}"


def _numbers(values: Sequence[float]) -> str:
    shown = [f"{float(value):g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)
