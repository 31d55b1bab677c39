"""Data from paths, with torchvision's and timm's own transforms and folders as the oracle, on generated images."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

import vbpfx
import vbpfx.models.names
from vbpfx.data import sources
from vbpfx.data.batches import Data, spread
from vbpfx.data.reader import DataReader, ReadOptions
from vbpfx.data.readers.texts import _Tokens
from vbpfx.data.sources import READERS
from vbpfx.errors import CalibrationError

SIDE = 40


class Classifier(nn.Module):
    """A model without information on how its images are prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.fc1, self.act, self.fc2 = (
            nn.AdaptiveAvgPool2d(4),
            nn.Linear(48, 32),
            nn.GELU(),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.pool(x).flatten(1))))


def _picture(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE + 12), mode: str = "RGB") -> Path:
    """Write an image of noise that is smooth enough for resizing to matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for number in range(5):
        _picture(tmp_path / "flat" / f"{number}.{'png' if number % 2 else 'jpg'}", number)
    return tmp_path / "flat"


@pytest.fixture
def classed(tmp_path: Path) -> Path:
    for name, count in (("cat", 6), ("bird", 2), ("dog", 4)):
        for number in range(count):
            _picture(tmp_path / "classed" / name / f"{number}.png", number)
    return tmp_path / "classed"


def _open(path: Path, model: nn.Module | None = None, **options: Any) -> Data:
    images = path.is_dir() and model is None
    return vbpfx.open_data(path, model or Classifier(), **({"shape": (3, 32, 32)} if images else {}) | options)


def _all(data: Data) -> Tensor:
    return torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in data])


def _by(transform: Any, files: list[Path]) -> Tensor:
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


# how images are prepared


def test_timm_says_how_its_images_are_prepared(flat: Path) -> None:
    model = timm.create_model("test_vit", num_classes=4)  # 160 pixels, with its own mean and std
    config = timm.data.resolve_model_data_config(model)
    expected = _by(timm.data.create_transform(**config, is_training=False), sorted(flat.iterdir()))
    data = vbpfx.open_data(flat, model, batch=2)
    assert torch.equal(_all(data), expected)
    assert (len(data), data.samples, data.labels) == (3, 5, None)
    assert "as timm says: bicubic, shorter side to" in str(data)


def test_overrides_of_timm_are_timms_own_settings(flat: Path) -> None:
    model = timm.create_model("test_vit", num_classes=4)
    config = timm.data.resolve_model_data_config(model) | {"crop_pct": 1.0, "mean": (0.1,) * 3, "std": (0.2, 0.3, 0.4)}
    config["input_size"] = (3, 96, 96)
    expected = _by(timm.data.create_transform(**config, is_training=False), sorted(flat.iterdir()))
    data = vbpfx.open_data(flat, model, crop=1, mean=(0.1,) * 3, std=(0.2, 0.3, 0.4), shape=(3, 96, 96))
    assert torch.equal(_all(data), expected)


def test_torchvision_says_how_its_images_are_prepared(flat: Path) -> None:
    model = torchvision.models.get_model("resnet18", weights=None, num_classes=4)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms
    data = vbpfx.open_data(flat, model, name="torchvision:resnet18")
    assert torch.equal(_all(data), _by(preset(), sorted(flat.iterdir())))
    halved = vbpfx.open_data(flat, model, name="torchvision:resnet18", shape=(3, 112, 112))
    assert torch.equal(_all(halved), _by(preset(crop_size=112, resize_size=128), sorted(flat.iterdir())))
    shifted = vbpfx.open_data(flat, model, name="torchvision:resnet18", mean=(0.2,) * 3, std=(0.5,) * 3, crop=1)
    expected = preset(mean=(0.2,) * 3, std=(0.5,) * 3, resize_size=224)
    assert torch.equal(_all(shifted), _by(expected, sorted(flat.iterdir())))
    with pytest.raises(CalibrationError, match="ResNet does not say what its images look like; pass shape="):
        vbpfx.open_data(flat, model)
    for name in ("fcn_resnet50", "fasterrcnn_resnet50_fpn"):  # transforms of detectors have no settings
        with pytest.raises(CalibrationError, match=f"torchvision:{name} is not an image classifier"):
            vbpfx.open_data(flat, model, name=f"torchvision:{name}")


def test_own_models_get_what_imagenet_models_get(flat: Path) -> None:
    transforms = torchvision.transforms
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(), normalise]
    data = _open(flat)
    assert torch.equal(_all(data), _by(transforms.Compose(steps), sorted(flat.iterdir())))
    assert "from ImageNet, because the model states none" in str(data)
    steps = [transforms.Resize((32, 48)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    told = _open(flat, shape=(3, 32, 48), crop=1, mean=(0.5,), std=(0.25,))
    assert torch.equal(_all(told), _by(transforms.Compose(steps), sorted(flat.iterdir())))
    assert "because the model states none" not in str(told)


def test_grey_images_and_the_models_dtype(flat: Path) -> None:
    data = _open(flat, Classifier().double(), shape=(1, 32, 32), mean=(0,), std=(1,))
    first = next(iter(data))
    assert first.shape == (5, 1, 32, 32)
    assert first.dtype == torch.float64
    assert 0 <= first.min() < first.max() <= 1
    with pytest.raises(CalibrationError, match="grey images have no usual normalisation"):
        _open(flat, shape=(1, 32, 32))


def _vit(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    loaded: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(folder)
    return loaded


def test_hugging_face_models_have_their_own_processor(flat: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _vit(tmp_path / "model")
    without = vbpfx.open_data(flat, model)
    assert next(iter(without))["pixel_values"].shape == (5, 3, 32, 32)
    assert "no preprocessor_config.json" in str(without)
    own = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.7] * 3)
    own.save_pretrained(tmp_path / "model")
    data = vbpfx.open_data(flat, model)
    pictures = [Image.open(file).convert("RGB") for file in sorted(flat.iterdir())]
    # Images are prepared one by one here and all at once there, so only the order of sums in resizing differs.
    expected = own(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(next(iter(data))["pixel_values"], expected, rtol=0, atol=1e-5)
    changed = vbpfx.open_data(flat, model, mean=(0.2,) * 3, std=(0.7,) * 3)
    assert torch.allclose(next(iter(changed))["pixel_values"], expected - 0.1 / 0.7, atol=1e-5)
    with pytest.raises(CalibrationError, match=r"sizes of images are those of preprocessor_config\.json"):
        vbpfx.open_data(flat, model, shape=(3, 16, 16))
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    assert pruned.plan.removed == 16


# which images, and of which classes


def test_classes_are_torchvisions(classed: Path) -> None:
    (classed / "empty").mkdir()
    (classed / ".git").mkdir()
    _picture(classed / ".git" / "0.png", 0)
    (classed / "cat" / ".DS_Store").write_bytes(b"\0")
    data = _open(classed)
    expected = torchvision.datasets.ImageFolder(str(classed), allow_empty=True)
    names = [name for name in expected.classes if name != ".git"]
    assert data.classes == tuple(names) == ("bird", "cat", "dog", "empty")
    samples = [(file, label) for file, label in expected.samples if ".git" not in file]
    assert [names[label] for label in data.labels] == [expected.classes[label] for _, label in samples]
    assert [str(file) for file in data.dataset.files] == [file for file, _ in samples]
    assert torch.cat([labels for _, labels in data]).tolist() == list(data.labels)
    assert "ignored" not in str(data)


def test_other_files_are_told(flat: Path) -> None:
    for name in ("notes.txt", "a.csv", "b.json", "c.md"):
        (flat / name).write_text("")
    assert "ignored 4 files of other kinds: a.csv, b.json, c.md, ..." in str(_open(flat))


def test_names_of_classes_number_the_folders(classed: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("n00000001 fish\nn00000002 dog, hound\nbird\ncat\n")
    (classed / "dog").rename(classed / "n00000002")
    data = _open(classed, classes=names)
    assert data.classes == ("fish", "dog, hound", "bird", "cat")
    assert list(data.labels) == [2] * 2 + [3] * 6 + [1] * 4
    names.write_text("cat\nbird\n")
    with pytest.raises(CalibrationError, match=r"the folder n00000002 of .* is not a name of a class"):
        _open(classed, classes=names)


def test_a_folder_without_images_is_a_class_without_samples(classed: Path) -> None:
    """As in torchvision, an empty folder counts; otherwise the labels of all later folders would be shifted."""
    (classed / "cow").mkdir()
    data = _open(classed)
    theirs = torchvision.datasets.ImageFolder(classed, allow_empty=True)
    assert list(data.classes) == theirs.classes == ["bird", "cat", "cow", "dog"]
    assert list(data.labels) == theirs.targets


def test_a_folder_is_the_class_of_a_whole_line_before_that_of_a_first_word(classed: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfcat\ndog house\nbird\ndog\n")  # a byte order mark, as Windows writes it
    assert set(_open(classed, classes=names).labels) == {0, 2, 3}
    names.write_text("cat\ndog house\nbird\ndog rose\n")
    with pytest.raises(
        CalibrationError, match=r"the folder dog of .* may be line 2 or line 4 .*'dog house', 'dog rose'"
    ):
        _open(classed, classes=names)


@pytest.mark.parametrize("prefix", ["", "flat/"])
def test_labels_from_a_list(flat: Path, prefix: str) -> None:
    """Files are relative to the list or to the folder; entries for other folders are ignored."""
    lines = [f"{prefix}{name},{label}" for name, label in (("3.png", 7), ("0.jpg", 2), ("1.png", 0))]
    others = ["elsewhere/0.jpg,1"] if prefix else []
    (flat.parent / "list.csv").write_text("\n".join(["file,label", *lines, *others]) + "\n")
    data = _open(flat, labels=flat.parent / "list.csv")
    assert [file.name for file in data.dataset.files] == ["0.jpg", "1.png", "3.png"]
    assert data.labels == (2, 0, 7)
    assert "left out 2 images without a label" in str(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.jpg,1\n", r"list\.csv begins with 0\.jpg,1; expected a line that names the columns: file,label"),
        (
            "file,label\n0.jpg,cat\n",
            r"list\.csv, line 2: expected a file and the number of its class, found '0\.jpg', 'cat'",
        ),
        ("file,label\n0.jpg\n", "line 2: expected a file"),
        ("file,label\n0.jpg,1\n9.jpg,1\n", r"names .*9\.jpg, which does not exist \(1 such files\)"),
        ("file,label\n0.jpg,1\nnotes.md,1\n", r"names .*notes\.md, which is not an image"),
        ("file,label\n0.jpg,1\n0.jpg,2\n", r"line 3: 0\.jpg has label 2 here and 1 above"),
        ("file,label\n0.jpg,1\n\n\n1.png\n", "line 5: expected a file"),
        ("file,label\nother/x.jpg,1\n", r"lists no image that is in .*flat. The list begins with other/x\.jpg"),
        ("", "begins with nothing"),
    ],
)
def test_lists_that_do_not_fit(flat: Path, text: str, message: str) -> None:
    (flat / "notes.md").write_text("")
    (flat.parent / "list.csv").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        _open(flat, labels=flat.parent / "list.csv")


def test_a_limit_is_spread_over_the_classes(classed: Path) -> None:
    """Of 6, 2 and 4 images of three classes, a limit of six takes two of each, always the same, in the folders' order."""
    data = _open(classed, limit=6)
    assert [data.labels.count(label) for label in range(3)] == [2, 2, 2]
    files = list(data.dataset.files)
    assert files == sorted(files)
    assert [batch[1].tolist() for batch in data] == [batch[1].tolist() for batch in data]
    assert torch.equal(_all(data), _all(_open(classed, limit=6)))
    assert "6 of 12 images" in str(data)
    chosen = {tuple(_open(classed, limit=6, seed=seed).dataset.files) for seed in range(8)}
    assert len(chosen) > 4
    assert _open(classed, limit=100).samples == 12


def test_every_beginning_is_spread() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 200).tolist()
    order = spread(labels, 200, 3)
    assert sorted(order) == list(range(200))
    for count in (7, 14, 60):
        found = np.bincount([labels[number] for number in order[:count]], minlength=7)
        assert found.max() - found.min() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"nothing does not exist"),
        (lambda p: p.mkdir(), r"nothing holds no images \(\.jpg"),
        (
            lambda p: (p.mkdir(), (p / "a.txt").write_text("")),
            r"holds no images .*; it holds 1 other files, such as a\.txt",
        ),
        (
            lambda p: (_picture(p / "a.png", 0), _picture(p / "b" / "a.png", 0)),
            r"both directly \(a\.png\) and in folders \(b\)",
        ),
        (
            lambda p: (_picture(p / "train" / "a.png", 0), _picture(p / "val" / "a.png", 0)),
            "train, val, which are not classes",
        ),
        (
            lambda p: p.write_text(""),
            "nothing: this kind of file is not supported; pass a folder of images, or a file that ends in .npy, .npz, .txt, .jsonl",
        ),
    ],
    ids=["missing", "empty", "text", "mixed", "splits", "unknown"],
)
def test_what_is_no_data_is_said(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match=message):
        _open(tmp_path / "nothing", Classifier(), **({"shape": (3, 32, 32)} if (tmp_path / "nothing").is_dir() else {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, found 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"bad_images": "keep"}, "bad_images='keep' is unknown"),
        ({"shape": (4, 32, 32)}, "images of shape 4x32x32: expected channels"),
        ({"crop": 1.5}, "crop must be above 0 and at most 1"),
        ({"shape": (1, 32, 32), "mean": (0.0,) * 3, "std": (1.0,)}, "mean must be 1 number for images of 1 channel"),
        ({"std": (0.0,)}, "std must be 1 or 3 numbers"),
        ({"max_length": 8}, "max_length is for a text file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_are_none(flat: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        _open(flat, **options)


def test_two_links_to_one_folder_are_two_folders(classed: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name, target in (("a", "bird"), ("b", "bird"), ("c", "dog")):
        (linked / name).symlink_to(classed / target)
    (linked / "c" / "round").symlink_to(linked)  # a link back to the root folder makes a cycle
    data = _open(linked)
    assert data.classes == ("a", "b", "c")
    assert list(data.labels) == [0] * 2 + [1] * 2 + [2] * 4


def test_one_image_is_no_plural(classed: Path) -> None:
    assert str(_open(classed, limit=1)).startswith("1 of 12 images from")
    for number in range(1, 2):
        (classed / "bird" / f"{number}.png").unlink()
    assert str(_open(classed / "bird")).startswith("1 image from")


def test_a_link_that_leads_back_is_followed_once(flat: Path) -> None:
    (flat / "again").symlink_to(flat)
    assert _open(flat).samples == 5


# images that cannot be read


@pytest.fixture
def broken(flat: Path) -> Path:
    whole = _picture(flat / "5.jpg", 5, (400, 300)).read_bytes()
    (flat / "5.jpg").write_bytes(whole[: len(whole) // 2])
    (flat / "6.png").write_text("not a picture")
    (flat / "7.jpg").write_bytes(b"")
    return flat


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(broken: Path, workers: int) -> None:
    data = _open(broken, workers=workers)
    with pytest.raises(CalibrationError) as caught:
        list(data)
    assert str(caught.value).startswith(f"cannot read the image {broken / '5.jpg'}: ")
    assert "truncated" in str(caught.value)
    assert str(caught.value).endswith("bad_images='skip' (--bad-images skip)")


def test_images_that_cannot_be_read_are_skipped_and_counted(broken: Path) -> None:
    data = _open(broken, bad_images="skip")
    assert data.samples == len(_all(data)) == 5
    assert [entry.partition(": ")[0] for entry in data.skipped] == [
        str(broken / n) for n in ("5.jpg", "6.png", "7.jpg")
    ]
    assert "skipped 3 images that cannot be read" in str(data)
    limited = _open(broken, bad_images="skip", limit=5)
    assert torch.equal(_all(limited), _all(data))
    for file in broken.glob("[0-4].*"):
        file.unlink()
    with pytest.raises(CalibrationError, match=r"none of the 3 images of .* can be read, such as"):
        _open(broken, bad_images="skip")


def test_images_that_pillow_would_cut_are_refused(flat: Path) -> None:
    """Pillow would turn almost all 16-bit values into white."""
    deep = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    Image.fromarray(deep).save(flat / "9.png")
    with pytest.raises(CalibrationError, match=r"9\.png: Pillow would clip its values \(mode I;16\) at 255"):
        list(_open(flat))
    assert len(_open(flat, bad_images="skip").skipped) == 1


def test_transparency_is_left_out_quietly(flat: Path) -> None:
    palette = Image.open(flat / "0.jpg").quantize(16)
    palette.save(flat / "9.png", transparency=bytes(range(16)))
    assert torch.equal(_all(_open(flat)), _all(_open(flat)))
    assert _open(flat).samples == 6


# arrays


def test_arrays(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 48))
    np.save(tmp_path / "a.npy", values)
    data = vbpfx.open_data(tmp_path / "a.npy", nn.Linear(48, 2), batch=3)
    assert [tuple(batch.shape) for batch in data] == [(3, 48), (3, 48), (1, 48)]
    assert torch.equal(torch.cat(list(data)), torch.from_numpy(values).float())
    limited = vbpfx.open_data(tmp_path / "a.npy", nn.Linear(48, 2), limit=4)
    (batch,) = limited
    rows = [int(np.flatnonzero((values.astype(np.float32) == row.numpy()).all(1))[0]) for row in batch]
    assert rows == sorted(rows)
    assert len(set(rows)) == 4


def test_arrays_in_the_other_byte_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", values.astype(values.dtype.newbyteorder()))
    (batch,) = vbpfx.open_data(tmp_path / "a.npy", nn.Linear(4, 2))
    assert torch.equal(batch, torch.from_numpy(values))


def test_named_arrays_and_their_labels(tmp_path: Path) -> None:
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), np.int64)
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask, labels=np.array([1, 0, 1, 0]))
    data = vbpfx.open_data(tmp_path / "a.npz", nn.Linear(2, 2), batch=4)
    ((batch, labels),) = data
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
    }
    assert labels.tolist() == list(data.labels) == [1, 0, 1, 0]
    np.savez(tmp_path / "one.npz", x=np.ones((4, 2), np.float32))
    assert next(iter(vbpfx.open_data(tmp_path / "one.npz", nn.Linear(2, 2)))).shape == (4, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.ones((3, 2)), "labels": np.ones(3)},
            r"labels must be one integer a sample, found float64 of shape \(3,\)",
        ),
        ({"labels": np.ones(3, np.int64)}, "holds only labels"),
        ({"x": np.array(["a", "b"])}, "array x has dtype <U1; expected real numbers of at most 8 bytes"),
        (
            {"x": np.ones((3, 2), np.longdouble)},
            r"array x has dtype float\d+; expected real numbers of at most 8 bytes",
        ),
        ({"x": np.ones((3, 2)), "y": np.ones((4, 2))}, "must all have the same number of samples, at least 1; found"),
    ],
)
def test_arrays_that_are_none(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        vbpfx.open_data(tmp_path / "a.npz", nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match=r"labels is for a folder of images, and .*a\.npz is something else"):
        vbpfx.open_data(tmp_path / "a.npz", nn.Linear(2, 2), labels="list.csv")


def test_of_several_wrong_options_the_first_is_named(tmp_path: Path) -> None:
    """Not another one in every run, as the order of a set of names would have it."""
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    with pytest.raises(CalibrationError, match=r"^shape is for a folder of images"):
        vbpfx.open_data(
            tmp_path / "a.npy", nn.Linear(2, 2), max_length=4, crop=0.5, std=(1.0,), mean=(0.0,), shape=(1, 2, 2)
        )


# texts

WORDS = "the cat sat on a mat while dogs ran over hills far away"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small encoder with random weights and a whole-word tokenizer."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", *WORDS.split()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def _texts(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_texts_are_tokenised_and_padded(bert: Path, tmp_path: Path) -> None:
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    words = ["[PAD]", "[UNK]", *WORDS.split()]
    file = _texts(tmp_path / "a.txt", "the cat\n\ndogs ran over zebras\n  a mat  \n")
    data = vbpfx.open_data(file, model, batch=2)
    batches = list(data)
    assert batches[0]["input_ids"].tolist() == [
        [words.index("the"), words.index("cat"), 0, 0],
        [words.index("dogs"), words.index("ran"), words.index("over"), 1],
    ]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batches[1]["input_ids"].tolist() == [[words.index("a"), words.index("mat")]]
    assert set(batches[0]) <= {"input_ids", "attention_mask", "token_type_ids"}
    assert data.samples == 3
    cut = next(iter(vbpfx.open_data(file, model, batch=2, max_length=3)))
    assert cut["input_ids"].shape == (2, 3)
    with pytest.raises(CalibrationError, match="max_length=25: this model takes from 1 to 24 tokens"):
        vbpfx.open_data(file, model, max_length=25)


def test_a_model_gets_the_arguments_that_it_takes() -> None:
    """A tokenizer may return token types that the model does not accept."""
    made = {name: torch.ones(1, 2) for name in ("input_ids", "token_type_ids", "attention_mask")}
    tokens = _Tokens(lambda texts, **options: made, frozenset({"input_ids", "attention_mask"}), 8)
    assert set(tokens(["the cat"])) == {"input_ids", "attention_mask"}


def test_texts_calibrate_a_model(bert: Path, tmp_path: Path) -> None:
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    lines = [" ".join(np.random.default_rng(n).choice(WORDS.split(), 3 + n % 7)) for n in range(24)]
    data = vbpfx.open_data(_texts(tmp_path / "a.txt", "\n".join(lines)), model, batch=8)
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    assert pruned.plan.removed == 32


def test_lines_of_json(bert: Path, tmp_path: Path) -> None:
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    rows = [{"text": "the cat", "label": 1}, {"text": "a mat", "label": 0}, {"text": "dogs ran", "label": 1}]
    data = vbpfx.open_data(_texts(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), model)
    ((batch, labels),) = data
    assert labels.tolist() == [1, 0, 1]
    assert batch["input_ids"].shape == (3, 2)
    del rows[1]["label"]
    assert vbpfx.open_data(_texts(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), model).labels is None


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_answer_for_the_decoder(kind: str, bert: Path, tmp_path: Path) -> None:
    """The decoder gets the answer shifted by one token behind the start token, as in training."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, dict[str, int]] = {
        "T5": {"d_model": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2, "d_kv": 8},
        "Bart": {"d_model": 16, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_layers": 2, "decoder_layers": 2,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20, pad_token_id=0, decoder_start_token_id=3, eos_token_id=4, bos_token_id=5, **sizes[kind]
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "model")
    model = vbpfx.models.names.load_model(f"hf:{tmp_path / 'model'}")
    words = ["[PAD]", "[UNK]", *WORDS.split()]
    rows = [{"text": "the cat sat", "target": "dogs ran", "label": 1}, {"text": "a mat", "target": "far", "label": 0}]
    data = vbpfx.open_data(_texts(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows * 8))), model, batch=2, limit=16)
    batch = next(iter(data))
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert batch["input_ids"].shape == (2, 3)
    assert batch["decoder_input_ids"].tolist() == [[3, words.index("dogs")], [3, words.index("far")]]
    pruned = vbpfx.prune(model, data, ratio=0.5, method="vbp", progress=False)
    assert {block.width for block in pruned.analysis.usual} == {40}
    assert len(pruned.analysis.usual) == 4
    with pytest.raises(CalibrationError, match=r'is an encoder-decoder model; .* a "text" and its answer as "target"'):
        vbpfx.open_data(_texts(tmp_path / "a.txt", "the cat"), model)


@pytest.mark.parametrize(("name", "text"), [("a.txt", "the cat\n"), ("a.jsonl", '{"text": "the cat"}')])
def test_a_byte_order_mark_is_no_text(bert: Path, tmp_path: Path, name: str, text: str) -> None:
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    (plain,) = vbpfx.open_data(_texts(tmp_path / name, text), model)
    (marked,) = vbpfx.open_data(_texts(tmp_path / name, "\ufeff" + text), model)
    assert torch.equal(marked["input_ids"], plain["input_ids"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty: expected a text on each line"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "line 2 is not valid JSON"),
        ("a.jsonl", '{"words": "a"}', 'line 1: expected an object with a "text"'),
    ],
)
def test_texts_that_are_none(bert: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    with pytest.raises(CalibrationError, match=message):
        vbpfx.open_data(_texts(tmp_path / name, text), model)


def test_a_model_without_a_tokenizer(bert: Path, tmp_path: Path) -> None:
    file = _texts(tmp_path / "a.txt", "the cat")
    with pytest.raises(
        CalibrationError, match=r"text is read for Hugging Face models .* for this Linear pass its tokens"
    ):
        vbpfx.open_data(file, nn.Linear(2, 2))
    model = vbpfx.models.names.load_model(f"hf:{bert}")
    model.save_pretrained(tmp_path / "bare")
    bare = vbpfx.models.names.load_model(f"hf:{tmp_path / 'bare'}")
    with pytest.raises(
        CalibrationError, match=r"bare holds no tokenizer that can be loaded \(its vocabulary has only special tokens\)"
    ):
        vbpfx.open_data(file, bare)


def test_a_reading_has_the_arguments_of_open_data() -> None:
    """A reader gets every argument of ``open_data``, and a call that gives none gets the same defaults."""
    arguments = list(inspect.signature(vbpfx.open_data).parameters.values())[2:]
    fields = dataclasses.fields(ReadOptions)
    assert {field.name: field.default for field in fields} == {a.name: a.default for a in arguments}


def test_no_two_readers_read_the_same_file() -> None:
    assert {reader.suffixes is None for reader in READERS} == {True, False}
    suffixes = [suffix for reader in READERS for suffix in reader.suffixes or ()]
    assert sorted(suffixes) == [".jsonl", ".npy", ".npz", ".txt"]
    assert sum(reader.suffixes is None for reader in READERS) == 1, "a folder is read as images"
    for reader in READERS:
        assert {*reader.options} <= {field.name for field in dataclasses.fields(ReadOptions)}, reader.about


def test_a_kind_of_data_is_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers.csv").write_text("1,2\n3,4\n5,6\n")

    def read(path: Path, model: nn.Module, how: ReadOptions) -> Data:
        rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))[: how.limit]
        return Data(path, len(rows), None, None, (), (), how.batch, 0, list(rows), default_collate)  # type: ignore[arg-type]

    tables = DataReader("a table", read, suffixes=(".csv",), options=("max_length",))
    monkeypatch.setattr(sources, "READERS", (*READERS, tables))
    data = vbpfx.open_data(tmp_path / "numbers.csv", nn.Linear(2, 2), limit=2, batch=2)
    torch.testing.assert_close(next(iter(data)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rtol=0, atol=0)
    with pytest.raises(
        CalibrationError, match=r"max_length is for a text file .* or a table, and .*words\.npy is something else"
    ):
        vbpfx.open_data(tmp_path / "words.npy", nn.Linear(2, 2), max_length=3)
