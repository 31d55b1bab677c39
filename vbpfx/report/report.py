"""``Report``: the effect of pruning, as figures and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vbpfx.display.figures import kept
from vbpfx.display.tables import counted, table
from vbpfx.errors import ArtifactError, VbpfxError
from vbpfx.measurement.bench_result import BenchResult
from vbpfx.plans.records import Refusal
from vbpfx.report.notebook import notebook_view
from vbpfx.report.plots import plot_costs, plot_spectra, plot_widths
from vbpfx.report.spectrum import Spectrum
from vbpfx.rewrite.verify import Verification
from vbpfx.runtimes.table import best_multiple
from vbpfx.storage.files import read_json, settle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The settings of a plan that a report shows.
_SETTINGS = {"criterion", "compensation", "budget", "at_floor"}


@dataclass(frozen=True)
class Report:
    """A comparison of the pruned network with the dense one.

    Attributes:
        params, macs, neurons: ``(dense, pruned)``. MACs are per sample, as :mod:`torch.utils.flop_counter` counts them:
            the products of layers and of attention, but no norms and no activations.
        sample: the sizes of the sample that the MACs are for, such as 3x224x224; "" in reports of older versions.
        widths: block -> ``(before, after)``.
        refused: the number of axes that could not be narrowed.
        settings: the settings with which the plan was made.
        verification: the result of the substitution oracle; None if it was switched off.
        latency: with a latency budget, the runtime, and the latency relative to the dense network's as it was
            requested, predicted and measured on the result.
        uneven: the convolution blocks whose new width is not a multiple of the number that ONNX Runtime needs to be
            fast.
        network: the class of the model.
        size: the bytes of all parameters and buffers ``(dense, pruned)``. For :func:`vbpfx.prune_files` and
            :func:`vbpfx.prune_onnx` they are counted as stored in the files. None in reports of older versions.
        spectra: block -> the variances of its neurons, and which of them were kept.
        refusals: the axes that could not be narrowed, with the reasons.
        arguments: the arguments of ``prune`` that differ from the defaults.
        versions: the versions of vbpfx, torch, Python and the platform.
        evaluation: an evaluation of both networks, in the form that :meth:`vbpfx.Pruned.save` takes.
        tuning: how the network was fine-tuned afterwards, in words; "" if it was not.
        bench: the result of :func:`vbpfx.bench`, in the form of :meth:`vbpfx.BenchResult.to_json`.
        command: the command line that made the network; "" if it was made in Python.
        fixed: input sizes that the graph has fixed although the model accepts others (:attr:`vbpfx.Captured.fixed`), in
            words.
    """

    params: tuple[int, int]
    macs: tuple[int, int]
    neurons: tuple[int, int]
    widths: Mapping[str, tuple[int, int]]
    refused: int
    settings: Mapping[str, Any]
    verification: Verification | None
    latency: Mapping[str, Any] | None = None
    uneven: tuple[str, ...] = ()
    network: str = ""
    sample: str = ""
    size: tuple[int, int] | None = None
    spectra: Mapping[str, Spectrum] = field(default_factory=dict, repr=False)
    refusals: tuple[Refusal, ...] = field(default=(), repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    tuning: str = ""
    bench: Mapping[str, Any] | None = None
    command: str = ""
    fixed: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Restore a report from the dictionaries of :meth:`to_json`. Fields that older versions lack get defaults.

        Args:
            data: the dictionaries, after they were written as JSON and read again.

        Raises:
            ArtifactError: the data is not a report.
        """
        try:
            given = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
            pairs = {name: _pair(given[name]) for name in ("params", "macs", "neurons")}
            if lacking := _SETTINGS - set(given["settings"]):
                raise KeyError(f"settings: {sorted(lacking)[0]}")
            if given.get("bench"):
                BenchResult.from_json(given["bench"])
            return cls(
                **given
                | pairs
                | {
                    "size": _pair(given["size"]) if given.get("size") else None,
                    "widths": {name: _pair(widths) for name, widths in given["widths"].items()},
                    "uneven": tuple(given.get("uneven", ())),
                    "fixed": tuple(given.get("fixed", ())),
                    "verification": Verification(**given["verification"]) if given["verification"] else None,
                    "spectra": {name: Spectrum.from_json(s) for name, s in given.get("spectra", {}).items()},
                    "refusals": tuple(
                        Refusal(**r | {"producers": tuple(r["producers"])}) for r in given.get("refusals", ())
                    ),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"the report is damaged ({type(error).__name__}: {error}); save the network again"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read ``report.json`` of a saved network.

        Args:
            folder: the folder that :func:`vbpfx.save` wrote.

        Raises:
            ArtifactError: the report is missing or damaged.
        """
        settle(Path(folder))
        return cls.from_json(read_json(Path(folder) / "report.json"))

    def measured(
        self, *, evaluation: Mapping[str, Any] | None = None, bench: BenchResult | None = None, command: str = ""
    ) -> Report:
        """Return this report with later measurements added. Arguments that are left out change nothing.

        Args:
            evaluation: an evaluation of both networks on a data set: ``name -> (dense, pruned)`` for measures of both,
                such as ``{"top-1 accuracy": (0.755, 0.741)}``. Any other value is shown as it is, such as
                ``{"agreement": 0.93, "samples": 10_000, "data": "val"}``. If a name contains "accuracy" or "agreement",
                its values are shares of 1, and are shown in percent.
            bench: the result of :func:`vbpfx.bench`.
            command: the command line that made the network.

        Raises:
            ArtifactError: the evaluation cannot be written as JSON.
        """
        given: dict[str, Any] = {}
        if evaluation is not None:
            try:
                given["evaluation"] = json.loads(json.dumps(dict(evaluation), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ArtifactError(
                    f"evaluation= cannot be written as JSON ({error}); pass names with numbers, pairs of numbers or text"
                ) from error
        if bench is not None:
            given["bench"] = json.loads(json.dumps(bench.to_json()))
        if command:
            given["command"] = command
        return dataclasses.replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-ready dictionaries."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        parts = (f"{name} {dense:,} -> {pruned:,}" for name, (dense, pruned) in self.costs.items())
        return f"<Report of {self.network or 'a network'}: {', '.join(parts)}>"

    def _repr_html_(self) -> str:
        return notebook_view(self.summary, self.costs, self.widths)

    @property
    def summary(self) -> str:
        """One sentence about what was removed and what is left."""
        dense, pruned = self.neurons
        narrowed = sum(now < before for before, now in self.widths.values())
        return (
            f"{dense - pruned:,} of {counted(dense, 'hidden neuron')} {'is' if dense - pruned == 1 else 'are'} gone from "
            f"{counted(narrowed, 'block')}; {kept(*self.params)} of the parameters and {kept(*self.macs)} of the "
            f"multiply-accumulates are left."
        )

    @property
    def sizes(self) -> str:
        """A sentence about the input sizes that the graph has fixed; "" if it accepts all that the model accepts."""
        return (
            f"the graph only accepts these input sizes: {'; '.join(self.fixed)} (open_sizes=True may leave them open)"
            if self.fixed
            else ""
        )

    @property
    def costs(self) -> dict[str, tuple[int, int]]:
        """The neurons, parameters and MACs as ``(dense, pruned)``, by the names under which they are shown."""
        return {"hidden neurons": self.neurons, "parameters": self.params, "MACs per sample": self.macs}

    def plot_widths(self, ax: Axes | None = None) -> Axes:
        """Draw the width of every block before and now, as bars in matplotlib.

        Args:
            ax: the axes to draw on; by default new ones.

        Raises:
            VbpfxError: matplotlib is not installed.
        """
        return plot_widths(self.widths, ax)

    def plot_costs(self, ax: Axes | None = None) -> Axes:
        """Draw which share of the neurons, parameters and MACs is left, as bars in matplotlib.

        Args:
            ax: the axes to draw on; by default new ones.

        Raises:
            VbpfxError: matplotlib is not installed.
        """
        return plot_costs(self.costs, ax)

    def plot_spectra(self, axes: Sequence[Axes] | None = None, *, blocks: Sequence[str] | None = None) -> list[Axes]:
        """Draw the activation variances of every block, and which neurons are kept, in matplotlib.

        Args:
            axes: one for each block; by default new ones.
            blocks: the names of the blocks to draw; by default all.

        Raises:
            VbpfxError: matplotlib is not installed, there are no spectra, a block is unknown, or the number of axes is
                wrong.
        """
        if unknown := [name for name in blocks or () if name not in self.spectra]:
            raise VbpfxError(f"no spectrum of block {unknown[0]!r}; there are: {', '.join(self.spectra)}")
        names = self.spectra if blocks is None else blocks
        return plot_spectra({name: self.spectra[name] for name in names}, axes)

    @property
    def advice(self) -> str:
        """A line about how to make the network faster in ONNX Runtime; "" if there is nothing to improve."""
        if not self.uneven:
            return ""
        multiple = best_multiple("onnxruntime")
        first = ", ".join(self.uneven[:3]) + (", ..." if len(self.uneven) > 3 else "")
        return (
            f"{counted(len(self.uneven), 'block')} of convolutions {'has a width' if len(self.uneven) == 1 else 'have widths'} that "
            f"{multiple} does not divide ({first}): ONNX Runtime is faster at multiples of {multiple}, which "
            f'runtime="onnxruntime" takes'
        )

    @property
    def scarce_experts(self) -> tuple[str, ...]:
        """Lines about the experts of mixtures to which too few rows were routed, and what was done instead."""
        lines = []
        for name, found in self.settings.get("experts", {}).items():
            of = f"of {found['experts']} experts"
            if found["unseen"]:
                lines.append(
                    f"{name}: {found['unseen']} {of} saw no calibration data to speak of; their neurons were chosen by their weights, and "
                    f"nothing replaces the removed ones (give more data)"
                )
            if found["few_rows"]:
                lines.append(
                    f"{name}: {found['few_rows']} {of} saw too few rows to predict removed neurons from kept ones (give more data)"
                )
        return tuple(lines)

    def __str__(self) -> str:
        rows = [(name, dense, pruned, kept(dense, pruned)) for name, (dense, pruned) in self.costs.items()]
        budget = ", ".join(f"{kind}={stated(value)}" for kind, value in self.settings["budget"].items())
        means = self.settings["compensation"]
        compensated = "not compensated" if means == "none" else f"compensated by {means}"
        title = f"pruned by {self.settings['criterion']}; {compensated}; {budget}"
        text = table(title, ("", "dense", "pruned", "kept"), rows)
        text += f"MACs are those of one sample of shape {self.sample}\n" if self.sample else ""
        text += f"{self.sizes}\n" if self.fixed else ""
        text += table(
            f"{counted(len(self.widths), 'block')}, {counted(self.refused, 'axis', 'axes')} refused",
            ("block", "width", "now", "kept"),
            [(name, before, now, kept(before, now)) for name, (before, now) in self.widths.items()],
        )
        if self.settings["at_floor"]:
            text += (
                f"{counted(len(self.settings['at_floor']), 'block')} at the floor (min_width): "
                f"{', '.join(self.settings['at_floor'])}\n"
            )
        text += "".join(f"{line}\n" for line in self.scarce_experts)
        if refitted := self.settings.get("reconstruction", {}).get("refitted"):
            text += f"refitted beside the blocks: {counted(len(refitted), 'layer')} ({', '.join(refitted)})\n"
        if self.latency:
            found = self.latency
            text += (
                f"latency in {found['runtime']}, batch {found['batch']}: {found['measured']:.1%} of the dense network's (asked "
                f"{found['asked']:.1%}, predicted {found['predicted']:.1%})\n"
            )
        text += f"{self.advice}\n" if self.uneven else ""
        if self.verification:
            v = self.verification
            text += f"substitution oracle: error {v.error:.1e} (allowed {v.tolerance:.0e}, {v.dtype}), effect {v.effect:.1e}\n"
            text += f"{v.in_words()}\n" if self.widths and v.in_words() else ""
            if v.refits:
                text += f"fitted weights against the plan: {v.refits:.1e}\n"
        return text


def _pair(values: Any) -> tuple[int, int]:
    dense, pruned = values
    return dense, pruned


def stated(budget: float | Mapping[str, float]) -> str:
    """Return a budget as text; a ratio may be stated for every kind of blocks."""
    if isinstance(budget, Mapping):
        return " ".join(f"{kind}:{share:g}" for kind, share in budget.items())
    return f"{budget:g}"
