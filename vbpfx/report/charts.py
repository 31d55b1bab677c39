"""Compute the shapes of a chart of variances. ``spectrum.svg.jinja`` draws them in the colours of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from vbpfx.display.figures import percent, power_of_ten
from vbpfx.report.spectrum import Spectrum

# The size of a spectrum's chart in its own units, and the margins for axes and labels.
_WIDTH, _HEIGHT = 320, 194
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 22, 34
_SHADES = 4  # shades of the colour for kept neurons, for columns that stand for several neurons
_MOST_DECADES = 8
_ROOM = 0.15  # decades of free space at the ends of the scale


@dataclass(frozen=True)
class Label:
    """A text in the chart: the position of its anchor, and whether the text starts, ends or is centred there."""

    text: str
    x: str
    y: str
    anchor: str


@dataclass(frozen=True)
class Cut:
    """A vertical line at a rank, with the rank as its label."""

    x: str
    top: int
    floor: int
    label: Label


@dataclass(frozen=True)
class Chart:
    """The variances of a block as shapes, in the units of the chart.

    Attributes:
        name: the name of the block.
        words: a description of the chart in words.
        width, height: the size of the chart.
        left, right: where the horizontal axis begins and ends.
        grid: for each grid line, its height and its label.
        all: the area under the curve.
        stays: for each shade, its opacity and the columns of kept neurons.
        curve: the curve of the variances.
        cut: where a cut by variance alone would be; None if all neurons are kept.
        labels: the texts beside the axes.
    """

    name: str
    words: str
    width: int
    height: int
    left: int
    right: int
    grid: tuple[tuple[str, Label], ...]
    all: str
    stays: tuple[tuple[str, str], ...]
    curve: str
    cut: Cut | None
    labels: tuple[Label, ...]


def common_scale(spectra: Iterable[Spectrum]) -> tuple[float, float]:
    """Return the smallest and largest exponent (base 10) of a log scale for the charts of all blocks.

    Outliers, one hundredth at each end, may lie beyond the scale. It always includes two whole powers of ten, so that
    it can be read.
    """
    highest, lowest = [], []
    for spectrum in spectra:
        if values := [v for v in spectrum.variances if v > 0]:
            few = len(values) // 100
            highest.append(values[few])
            lowest.append(values[-1 - few])
    top = math.log10(max(highest, default=1.0)) + _ROOM
    low = min(math.log10(min(lowest, default=1.0)) - _ROOM, math.floor(top) - 1)
    return max(low, top - _MOST_DECADES), top


def leaves(spectrum: Spectrum, scale: tuple[float, float]) -> bool:
    """Return whether a variance lies beyond the scale, and is therefore drawn at its end."""
    return any(not 10 ** scale[0] <= v <= 10 ** scale[1] for v in spectrum.variances)


def describe(spectrum: Spectrum) -> str:
    """Describe the chart of a spectrum in words."""
    kept, n = sum(spectrum.kept), spectrum.neurons
    if kept == n:
        return f"all {n:,} neurons stay" if n > 1 else "its one neuron stays"
    if not any(spectrum.variances):
        return (
            f"{kept:,} of {n:,} neurons {'stays' if kept == 1 else 'stay'}; none of them varies on the calibration data"
        )
    share = percent(spectrum.variance_kept)
    if kept == 1:
        rank = "the one" if spectrum.among_highest else "not the one"
        return f"1 of {n:,} neurons stays, {rank} of highest variance; it holds {share} of the variance"
    alike = "all" if spectrum.among_highest == kept else f"{spectrum.among_highest:,}"
    return (
        f"{kept:,} of {n:,} neurons stay, {alike} of them among the {kept:,} of highest variance; they hold {share} of the "
        f"variance"
    )


def spectrum_chart(name: str, spectrum: Spectrum, scale: tuple[float, float]) -> Chart:
    """Return the chart of variances in descending order on a log scale, with the columns of kept neurons coloured.

    Args:
        name: the name of the block.
        scale: the result of :func:`common_scale` for all blocks.
    """
    low, high = scale
    n, floor, right = spectrum.neurons, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    xs = [_LEFT + (right - _LEFT) * rank / n for rank in spectrum.bounds]

    def y(exponent: float) -> float:
        return floor - (floor - _TOP) * (min(max(exponent, low), high) - low) / (high - low)

    ys = [y(math.log10(v)) if v > 0 else floor for v in spectrum.variances]
    columns = list(zip(itertools.pairwise(xs), ys, _shades(spectrum), strict=True))
    step = math.ceil((high - low) / 5)
    outline = "".join(f"V{_number(top)}H{_number(stop)}" for (_, stop), top, _ in columns)
    shades = [
        "".join(
            f"M{_number(start)} {floor}V{_number(top)}H{_number(stop)}V{floor}Z"
            for (start, stop), top, own in columns
            if own == shade
        )
        for shade in range(1, _SHADES + 1)
    ]
    top = spectrum.variances[0]
    labels = [
        Label(f"variance, up to {top:.3g}" if top > 10**high else "variance", "0", "9", "start"),
        Label("1", str(_LEFT), str(floor + 14), "middle"),
        Label("neurons by rank of variance", str((_LEFT + right) / 2), str(floor + 28), "middle"),
    ]
    if n > 1:
        labels.insert(2, Label(f"{n:,}", str(right), str(floor + 14), "end"))
    return Chart(
        name=name,
        words=describe(spectrum),
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=right,
        grid=tuple(
            (_number(y(e)), Label(power_of_ten(e), str(_LEFT - 5), _number(y(e) + 3.5), "end"))
            for e in range(math.floor(high), math.ceil(low) - 1, -step)
        ),
        all=f"M{_LEFT} {floor}{outline}V{floor}Z",
        stays=tuple((f"{number / _SHADES:g}", drawn) for number, drawn in enumerate(shades, start=1) if drawn),
        curve=f"M{_LEFT} {_number(ys[0])}{outline}",
        cut=_cut(spectrum, floor, right),
        labels=tuple(labels),
    )


def _cut(spectrum: Spectrum, floor: int, right: int) -> Cut | None:
    """Return the line where a cut by variance alone would be: behind the K highest variances, if K neurons are kept."""
    kept = sum(spectrum.kept)
    if kept == spectrum.neurons:
        return None
    x = _LEFT + (right - _LEFT) * kept / spectrum.neurons
    near_end = kept / spectrum.neurons > 0.6
    label = Label(f"{kept:,}", _number(x + (-4 if near_end else 4)), str(_TOP - 3), "end" if near_end else "start")
    return Cut(_number(x), _TOP - 11, floor, label)


def _shades(spectrum: Spectrum) -> list[int]:
    """Return how strongly each entry is coloured: 0 if none of its neurons is kept, ``_SHADES`` if all are."""
    shares = [
        kept / (stop - start)
        for kept, (start, stop) in zip(spectrum.kept, itertools.pairwise(spectrum.bounds), strict=True)
    ]
    return [math.ceil(share * _SHADES) if share < 0.5 else math.floor(share * _SHADES) for share in shares]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
