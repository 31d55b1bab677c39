"""Plots return axes that show the figures of the report."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from pages import HOSTILE, two

import vbpfx
from vbpfx.errors import VbpfxError
from vbpfx.report.report import Report

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")  # an attribute of matplotlib from here on


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return vbpfx.prune(two(), [torch.randn(64, 8)], ratio=0.4, progress=False).report


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")


def test_widths_are_two_bars_a_block(report: Report) -> None:
    ax = report.plot_widths()
    ax.figure.canvas.draw()
    before, now = ax.containers
    assert [bar.get_width() for bar in before] == [pair[0] for pair in report.widths.values()]
    assert [bar.get_width() for bar in now] == [pair[1] for pair in report.widths.values()]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(report.widths)
    assert ax.get_xlabel() == "hidden neurons"
    assert ax.yaxis_inverted()


def test_costs_are_shares(report: Report) -> None:
    ax = report.plot_costs()
    ax.figure.canvas.draw()
    _, left = ax.containers
    assert [bar.get_width() for bar in left] == [
        pytest.approx(pruned / dense) for dense, pruned in (report.neurons, report.params, report.macs)
    ]


def test_spectra_are_bars_coloured_by_what_stays(report: Report) -> None:
    axes = report.plot_spectra()
    axes[0].figure.canvas.draw()
    assert len(axes) == len(report.spectra)
    for ax, (name, spectrum) in zip(axes, report.spectra.items(), strict=True):
        (bars,) = ax.containers
        assert tuple(bar.get_height() for bar in bars) == spectrum.variances
        assert tuple(bar.get_x() for bar in bars) == spectrum.bounds[:-1]
        for bar, kept in zip(bars, spectrum.kept, strict=True):
            whole = kept == round(bar.get_width())
            assert (bar.get_facecolor()[:3] == pytest.approx((0x0B / 255, 0x63 / 255, 0xCE / 255))) == whole
        assert ax.get_yscale() == "log"
        assert ax.get_title(loc="left").startswith(name)
        kept = sum(spectrum.kept)
        assert [line.get_xdata()[0] for line in ax.lines] == ([kept] if kept < spectrum.neurons else [])


def test_plots_go_where_they_are_asked_to(report: Report) -> None:
    figure, (first, second) = matplotlib.pyplot.subplots(1, 2)
    assert report.plot_widths(first) is first
    assert report.plot_spectra([second], blocks=[HOSTILE]) == [second]
    assert figure.axes == [first, second]


def test_what_cannot_be_plotted_is_said(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VbpfxError, match=r"no spectrum of block 'x'; there are: .*plain"):
        report.plot_spectra(blocks=["x"])
    with pytest.raises(VbpfxError, match="3 blocks need as many axes, found 0"):
        report.plot_spectra([])
    with pytest.raises(VbpfxError, match="no spectra"):
        report.plot_spectra(blocks=[])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (report.plot_widths, report.plot_costs, report.plot_spectra):
        with pytest.raises(VbpfxError, match=r"need matplotlib .*pip install matplotlib"):
            plot()
