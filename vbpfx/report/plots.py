"""Plot a report's figures in matplotlib, which is an optional package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from vbpfx.errors import VbpfxError
from vbpfx.report.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAYS, _GOES, _TRACK = "#0b63ce", "#c9d0d9", "#e1e5ea"


def plot_widths(widths: Mapping[str, tuple[int, int]], ax: Axes | None = None) -> Axes:
    """Draw a bar for every block: its width before (light) and now, with the first block on top."""
    ax = ax or _new(len(widths))
    names = list(widths)
    ax.barh(names, [before for before, _ in widths.values()], color=_TRACK, label="before")
    now = ax.barh(names, [now for _, now in widths.values()], color=_STAYS, label="now")
    ax.bar_label(now, [f"{now:,}" for _, now in widths.values()], padding=4, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="hidden neurons")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _plain(ax)


def plot_costs(costs: Mapping[str, tuple[int, int]], ax: Axes | None = None) -> Axes:
    """Draw a bar for every cost: the pruned network's as a share of the dense network's."""
    ax = ax or _new(len(costs))
    shares = [pruned / dense if dense else 1.0 for dense, pruned in costs.values()]
    names = list(costs)
    ax.barh(names, [1.0] * len(names), color=_TRACK, label="dense")
    left = ax.barh(names, shares, color=_STAYS, label="pruned")
    ax.bar_label(left, [f"{share:.1%}" for share in shares], padding=4, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="share of the dense network's")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _plain(ax)


def plot_spectra(spectra: Mapping[str, Spectrum], axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Draw one plot per block: variances in descending order on a log scale, with the columns of kept neurons coloured.

    The dashed line is where a cut by variance alone would be.

    Raises:
        VbpfxError: there are no spectra, or their number is not the number of axes.
    """
    if not spectra:
        raise VbpfxError("the report holds no spectra: it was written by an older vbpfx; prune again")
    axes = _grid(len(spectra)) if axes is None else axes
    if len(axes) != len(spectra):
        raise VbpfxError(f"{len(spectra)} blocks need as many axes, found {len(axes)}")
    for ax, (name, spectrum) in zip(axes, spectra.items(), strict=True):
        bounds = spectrum.bounds
        widths = [stop - start for start, stop in itertools.pairwise(bounds)]
        shares = [kept / width for kept, width in zip(spectrum.kept, widths, strict=True)]
        colours = [_mixed(share) for share in shares]
        ax.bar(bounds[:-1], spectrum.variances, widths, align="edge", color=colours, log=any(spectrum.variances))
        if (kept := sum(spectrum.kept)) < spectrum.neurons:
            ax.axvline(kept, color="black", linestyle="--", linewidth=1)
        ax.set(xlim=(0, spectrum.neurons), xlabel="neurons by rank of variance", ylabel="variance")
        ax.set_title(f"{name}: {kept:,} of {spectrum.neurons:,} stay", loc="left", fontsize="small")
        _plain(ax)
    return list(axes)


def _mixed(share: float) -> tuple[float, ...]:
    """Return the colour of a column of neurons of which this share is kept."""
    goes, stays = (tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)) for colour in (_GOES, _STAYS))
    return tuple(g + share * (s - g) for g, s in zip(goes, stays, strict=True))


def _new(bars: int) -> Axes:
    _, ax = _pyplot().subplots(figsize=(7.0, 1.2 + 0.28 * bars), layout="constrained")
    return ax  # type: ignore[no-any-return]


def _grid(plots: int) -> list[Axes]:
    columns = min(3, plots)
    rows = math.ceil(plots / columns)
    size = (4.0 * columns, 2.6 * rows)
    figure, grid = _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in grid.flat[plots:]:
        figure.delaxes(ax)
    return list(grid.flat[:plots])


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise VbpfxError(f"plots need matplotlib ({error}): pip install matplotlib") from error
    return pyplot
