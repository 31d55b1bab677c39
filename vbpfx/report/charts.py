"""Charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from vbpfx.display.figures import percent, power_of_ten
from vbpfx.display.markup import Markup, joined, tag
from vbpfx.report.spectrum import Spectrum

# The spectrum's picture in its own units, and what axes and labels take of it.
_WIDTH, _HEIGHT = 320, 194
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 22, 34
_SHADES = 4  # of the colour of what stays, where an entry stands for several neurons
_MOST_DECADES = 8
_ROOM = 0.15  # decades


def bar(now: float, before: float, full: float) -> Markup:
    """A bar of two lengths on a scale that ends at ``full``; the figures stand beside it."""
    track = tag("rect", class_="track", width=f"{100 * before / full:.2f}%", height="100%", rx=2)
    filled = tag("rect", class_="stays", width=f"{100 * now / full:.2f}%", height="100%", rx=2)
    return tag("svg", track, filled, class_="bar", aria_hidden="true")


def common_scale(spectra: Iterable[Spectrum]) -> tuple[float, float]:
    """The powers of ten that a log scale for all blocks goes from and to.

    Outliers, a hundredth at each end, may leave it; two whole powers are always on it, to read it by.
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
    """Whether a variance is beyond the scale, so that it is drawn at its end."""
    return any(not 10 ** scale[0] <= v <= 10 ** scale[1] for v in spectrum.variances)


def describe(spectrum: Spectrum) -> str:
    """What the picture shows, in words."""
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


def spectrum_chart(name: str, spectrum: Spectrum, scale: tuple[float, float]) -> Markup:
    """Variances in descending order on a log scale; columns of neurons that stay are coloured.

    Args:
        name: of the block.
        scale: what :func:`common_scale` gave for all blocks.
    """
    low, high = scale
    n, floor, right = spectrum.neurons, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    xs = [_LEFT + (right - _LEFT) * rank / n for rank in spectrum.bounds]

    def y(exponent: float) -> float:
        return floor - (floor - _TOP) * (min(max(exponent, low), high) - low) / (high - low)

    ys = [y(math.log10(v)) if v > 0 else floor for v in spectrum.variances]
    columns = list(zip(itertools.pairwise(xs), ys, _shades(spectrum), strict=True))
    step = math.ceil((high - low) / 5)
    lines = [
        joined(
            tag("line", class_="grid", x1=_LEFT, x2=right, y1=_number(y(e)), y2=_number(y(e))),
            tag("text", power_of_ten(e), x=_LEFT - 5, y=_number(y(e) + 3.5), text_anchor="end"),
        )
        for e in range(math.floor(high), math.ceil(low) - 1, -step)
    ]
    outline = "".join(f"V{_number(top)}H{_number(stop)}" for (_, stop), top, _ in columns)
    areas = [tag("path", class_="goes", d=f"M{_LEFT} {floor}{outline}V{floor}Z")]
    for shade in range(1, _SHADES + 1):
        drawn = "".join(
            f"M{_number(start)} {floor}V{_number(top)}H{_number(stop)}V{floor}Z"
            for (start, stop), top, own in columns
            if own == shade
        )
        if drawn:
            areas.append(tag("path", class_="stays", fill_opacity=f"{shade / _SHADES:g}", d=drawn))
    curve = tag("path", class_="curve", d=f"M{_LEFT} {_number(ys[0])}{outline}")
    top = spectrum.variances[0]
    labels = joined(
        tag("text", f"variance, up to {top:.3g}" if top > 10**high else "variance", x=0, y=9),
        tag("text", "1", x=_LEFT, y=floor + 14, text_anchor="middle"),
        tag("text", f"{n:,}", x=right, y=floor + 14, text_anchor="end") if n > 1 else None,
        tag("text", "neurons by rank of variance", x=(_LEFT + right) / 2, y=floor + 28, text_anchor="middle"),
    )
    return tag(
        "svg", tag("title", f"{name}: {describe(spectrum)}"), *lines, *areas, curve, _cut(spectrum, floor, right), labels,
        class_="spectrum", role="img", aria_label=f"Variance spectrum of {name}: {describe(spectrum)}",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
    )  # fmt: skip


def _cut(spectrum: Spectrum, floor: int, right: int) -> Markup | None:
    """Where a cut by variance alone would be: behind the K highest, K of which stay."""
    kept = sum(spectrum.kept)
    if kept == spectrum.neurons:
        return None
    x = _LEFT + (right - _LEFT) * kept / spectrum.neurons
    near_end = kept / spectrum.neurons > 0.6
    return joined(
        tag("line", class_="cut", x1=_number(x), x2=_number(x), y1=_TOP - 11, y2=floor),
        tag(
            "text",
            f"{kept:,}",
            class_="strong",
            x=_number(x + (-4 if near_end else 4)),
            y=_TOP - 3,
            text_anchor="end" if near_end else "start",
        ),
    )


def _shades(spectrum: Spectrum) -> list[int]:
    """Per entry how strongly it is coloured: not at all where none of its neurons stays, fully where all do."""
    shares = [
        kept / (stop - start)
        for kept, (start, stop) in zip(spectrum.kept, itertools.pairwise(spectrum.bounds), strict=True)
    ]
    return [math.ceil(share * _SHADES) if share < 0.5 else math.floor(share * _SHADES) for share in shares]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
