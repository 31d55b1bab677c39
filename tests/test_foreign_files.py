"""The benchmark on other people's ONNX files: its inputs, measures and page. No package is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign_files
import foreign_inputs
import foreign_networks
import foreign_packages
import numpy as np
import pytest
from onnx import TensorProto, helper, save
from PIL import Image

NOWHERE = Path("nowhere")


def test_lines_are_read_without_repeats_and_blanks() -> None:
    characters = ["", "a", "b", " "]
    rows = np.array([[1, 1, 0, 1, 2, 2, 3, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert foreign_networks.read_lines(rows, characters) == ["aab b", ""]


def test_kept_lines_are_those_that_the_dense_network_reads_too(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = helper.make_model(graph)
    helper.set_model_props(model, {"character": "a\nb\nc"})
    save(model, tmp_path / "in.onnx")
    truth = ["a", "b", "c", "ab"]
    dense = [np.array([[1, 0], [2, 2], [1, 0], [1, 2]])]  # decodes to a, b, a, ab: three are right
    small = [np.array([[1, 1], [1, 0], [3, 0], [1, 2]])]  # decodes to a, a, c, ab: two of these three are right
    assert foreign_networks.of_lines(dense, small, truth, tmp_path / "in.onnx") == (pytest.approx(2 / 3), 0.75)


def test_what_else_is_counted() -> None:
    dense, small = [np.array([0, 1, 1, 2])], [np.array([0, 1, 2, 0])]
    assert foreign_networks.of_classes(dense, small, np.array([0, 1, 2, 2]), NOWHERE) == (pytest.approx(2 / 3), 0.75)
    assert foreign_networks.of_classes(dense, small, None, NOWHERE) == (0.5, None)
    masks = [np.array([[0.9, 0.9, 0.1]])], [np.array([[0.9, 0.1, 0.1]])]
    assert foreign_networks.of_pixels(*masks, None, NOWHERE) == (0.5, None)
    scores, others = np.arange(6.0).reshape(3, 2), np.arange(6.0).reshape(3, 2) + np.array([1.0, 0.0])
    one = 1 - 1 / (8 / 3)  # an error of 1 relative to a variance of 8/3; the other score is exact
    assert foreign_networks.of_scores([scores], [others], None, NOWHERE)[0] == pytest.approx((one + 1) / 2)
    eye, half = np.eye(2), np.array([[1.0, 1.0], [0.0, 2.0]])
    assert foreign_networks.of_embeddings([eye], [half], None, NOWHERE)[0] == pytest.approx((1 / np.sqrt(2) + 1) / 2)


def test_inputs_are_drawn_from_seeds_and_of_the_stated_sizes() -> None:
    texts = [f"number {i} of some words that follow each other" for i in range(60)]
    made = [foreign_inputs.lines(texts, 6, seed) for seed in (0, 0, 1)]
    assert made[0][0] == made[1][0] != made[2][0]
    arrays = [np.stack([foreign_inputs.as_line(image, (48, 320)) for image in images]) for _, images in made]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert arrays[0].shape == (6, 3, 48, 320)
    assert np.abs(arrays[0]).max() <= 1
    (page,) = foreign_inputs.pages(texts[:8], 1, 0)
    assert foreign_inputs.as_page(page).shape == (3, 640, 640)
    assert foreign_inputs.as_crop(page).shape == (3, 224, 224)


def test_a_line_is_scaled_to_its_height_and_padded_with_zeros_blue_first() -> None:
    found = foreign_inputs.as_line(Image.new("RGB", (20, 10), (255, 0, 0)), (48, 320))
    np.testing.assert_allclose(found[:, 0, 0], [-1, -1, 1])
    np.testing.assert_array_equal(found[:, :, 96:], 0)
    assert (found[:, :, :96] != 0).all()


def test_spectra_are_those_of_windows_that_lap_by_half() -> None:
    """The reference for one window in the middle is the Fourier transform by its definition."""
    clip = np.sin(np.arange(4096) * 0.3)
    found = foreign_inputs.spectra(clip)
    assert found.shape == (1, 17, 257)
    n = np.arange(512)
    window = (0.54 - 0.46 * np.cos(2 * np.pi * n / 512)) * clip[256 * 5 - 256 : 256 * 5 + 256]
    power = abs((window * np.exp(-2j * np.pi * 20 * n / 512)).sum()) ** 2
    assert found[0, 5, 20] == pytest.approx(np.log(power) / 20, abs=1e-6)


def test_files_are_read_from_both_ends(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"  abc\n")
    found = foreign_inputs._bytes(tmp_path / "short")
    assert found.shape == (2048,)
    assert found[:4].tolist() == [97, 98, 99, 10]
    assert found[-3:].tolist() == [97, 98, 99]
    assert set(found[4:-5].tolist()) == {256}
    (tmp_path / "long").write_bytes(bytes(range(256)) * 64)
    found = foreign_inputs._bytes(tmp_path / "long")
    assert found[1024:].tolist() == list(range(256)) * 4
    assert found[:1024].tolist() == (list(range(256)) * 5)[:1024]


def test_what_is_wanted_is_pinned_and_named() -> None:
    assert {network.package for network in foreign_networks.NETWORKS.values()} < set(foreign_packages.PACKAGES)
    assert len(foreign_networks.NETWORKS) == 10


def test_the_page_shows_rows_refusals_and_what_is_not_faster(tmp_path: Path) -> None:
    at: dict[str, Any] = {
        "kept": 0.987, "right": 0.955, "speed": {"median": 1.25, "lower": 1.2, "upper": 1.3}, "macs": [200, 150],
        "params": [100, 60], "neurons": [10, 8], "blocks": 2, "left_alone": {}, "seconds": 3.0,
        "refused_axes": {"a padded convolution reads it": 6, "it reaches the output of the model": 1},
    }  # fmt: skip
    slow = at | {"speed": {"median": 0.97, "lower": 0.9, "upper": 1.1}, "right": None}
    one = {"exporter": "keras2onnx 1.8", "opset": 12, "bytes": 1_250_000, "samples": [32, 48], "machine": "a machine"}
    results = {
        "PP-OCRv6 recogniser": one | {"exporter": "", "ratios": {"0.2": at}},
        "DNSMOS": one | {"ratios": {"0.2": slow, "0.4": {"refused": "AnalysisError: no block"}}},
    }
    (tmp_path / "found.json").write_text(json.dumps(results))
    where = ["--out", str(tmp_path / "found.json"), "--docs", str(tmp_path)]
    assert foreign_files.main(["--page", *where]) == 0
    page = (tmp_path / "foreign_files.md").read_text()
    assert "| PP-OCRv6 recogniser | rapidocr 3.10.0 | PaddlePaddle | 12 | 1.2 | 32, 48 |" in page
    assert "| PP-OCRv6 recogniser | lines read exactly | 20% | 98.7% | 95.5% | 1.25x (1.20-1.30) | 75% | 60% |" in page
    assert "- DNSMOS at 20%: 0.97x, with 75.00% of the MACs left. Most layers" in page
    assert "cannot be narrowed: a padded convolution reads it (6 layers or axes)." in page
    assert "- DNSMOS at 40%: AnalysisError: no block" in page
    assert page.endswith("a machine\n")
    with pytest.raises(SystemExit):
        foreign_files.main(["resnet", *where])
