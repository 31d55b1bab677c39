"""Convolutions at widths at which ONNX Runtime is slow: only the report and the export say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import parse
from torch import nn

import vbpfx
from vbpfx.report.page import html_report


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(), nn.Conv2d(24, 4, 1)]
    return nn.Sequential(*layers).eval()


def _pruned(model: nn.Module, batch: torch.Tensor, **options: object) -> vbpfx.Pruned:
    return vbpfx.prune(model, [batch], method="vbp", progress=False, **options)  # type: ignore[arg-type]


class _Scaled(nn.Module):
    """Linear layers around a scale with four axes, as in the response norm of Hugging Face's ConvNeXt V2."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 24), nn.Linear(24, 4)
        self.scale = nn.Parameter(torch.rand(1, 1, 1, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu() * self.scale)  # type: ignore[no-any-return]


class _Functional(nn.Module):
    """Linear layers around a functional depthwise convolution, as in SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 24), nn.Linear(24, 4)
        self.kernel = nn.Parameter(torch.rand(24, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.conv2d(self.one(x).movedim(-1, 1), self.kernel, groups=24)
        return self.two(h.relu().movedim(1, -1))  # type: ignore[no-any-return]


def test_layers_decide_and_no_shapes_of_parameters() -> None:
    assert _pruned(_Scaled().eval(), IMAGES, ratio=0.5).report.uneven == ()
    assert len(_pruned(_Functional().eval(), IMAGES, ratio=0.5).report.uneven) == 1


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_uneven_convolutions_are_named(tmp_path: Path) -> None:
    pruned = _pruned(_convolutions(), IMAGES, ratio=0.5)
    assert list(pruned.plan.widths.values()) == [12]
    (name,) = pruned.report.uneven
    assert pruned.report.advice in str(pruned).splitlines()
    assert f"{pruned.report.advice}." in parse(html_report(pruned.report)).text
    assert f"1 block of convolutions has a width that 8 does not divide ({name})" in pruned.report.advice
    with pytest.warns(UserWarning, match='runtime="onnxruntime"'):
        pruned.to_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("case", ["rounded", "by accident", "linear"])
def test_nothing_is_said_without_need(case: str, tmp_path: Path) -> None:
    if case == "linear":
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
        pruned = _pruned(model, IMAGES, ratio=0.5)
    else:
        options = {"ratio": 0.5, "runtime": "onnxruntime"} if case == "rounded" else {"ratio": 1 / 3}
        pruned = _pruned(_convolutions(), IMAGES, **options)
    assert set(pruned.plan.widths.values()) == {12 if case == "linear" else 16}
    assert pruned.report.uneven == ()
    assert pruned.report.advice == ""
    assert "multiples of 8" not in str(pruned)
    assert "multiples of 8" not in html_report(pruned.report)
    pruned.to_onnx(tmp_path / "model.onnx")  # a warning is an error


def test_json_keeps_it() -> None:
    report = _pruned(_convolutions(), IMAGES, ratio=0.5).report
    assert type(report).from_json(report.to_json()).uneven == report.uneven != ()
