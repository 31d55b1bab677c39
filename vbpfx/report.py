"""Report: what pruning did, as figures and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from vbpfx.blocks import Analysis
from vbpfx.capture import Captured
from vbpfx.records import Plan
from vbpfx.tables import counted, table
from vbpfx.verify import Verification


@dataclass(frozen=True)
class Report:
    """Dense against pruned.

    Attributes:
        params, macs, neurons: ``(dense, pruned)``. MACs per sample as :mod:`torch.utils.flop_counter` counts
            them: products of layers and of attention, no norms, no activations.
        widths: per block ``(before, after)``.
        refused: number of axes that could not be narrowed.
        settings: how the plan was made.
        verification: what the substitution oracle measured; None where it was switched off.
        latency: under a latency budget: the runtime, and the latency over the dense network's as it was asked for, predicted
            and measured on the result.
    """

    params: tuple[int, int]
    macs: tuple[int, int]
    neurons: tuple[int, int]
    widths: Mapping[str, tuple[int, int]]
    refused: int
    settings: Mapping[str, Any]
    verification: Verification | None
    latency: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON-ready dictionaries."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            (name, dense, pruned, f"{pruned / dense:.1%}")
            for name, (dense, pruned) in (
                ("hidden neurons", self.neurons),
                ("parameters", self.params),
                ("MACs per sample", self.macs),
            )
        ]
        budget = ", ".join(f"{kind}={value:g}" for kind, value in self.settings["budget"].items())
        title = f"pruned by {self.settings['criterion']}, {self.settings['compensation']} fold, {budget}"
        text = table(title, ("", "dense", "pruned", "kept"), rows)
        text += table(
            f"{counted(len(self.widths), 'block')}, {counted(self.refused, 'axis', 'axes')} refused",
            ("block", "width", "now", "kept"),
            [(name, before, now, f"{now / before:.1%}") for name, (before, now) in self.widths.items()],
        )
        if self.settings["at_floor"]:
            text += (
                f"{counted(len(self.settings['at_floor']), 'block')} at the floor (min_width): "
                f"{', '.join(self.settings['at_floor'])}\n"
            )
        if refitted := self.settings.get("reconstruction", {}).get("refitted"):
            text += f"refitted beside the blocks: {counted(len(refitted), 'layer')} ({', '.join(refitted)})\n"
        if self.latency:
            found = self.latency
            text += (
                f"latency in {found['runtime']}, batch {found['batch']}: {found['measured']:.1%} of the dense network's (asked "
                f"{found['asked']:.1%}, predicted {found['predicted']:.1%})\n"
            )
        if self.verification:
            v = self.verification
            text += f"substitution oracle: error {v.error:.1e} (allowed {v.tolerance:.0e}, {v.dtype}), effect {v.effect:.1e}\n"
            if v.refits:
                text += f"fitted weights against the plan: {v.refits:.1e}\n"
        return text


def make_report(
    captured: Captured,
    small: fx.GraphModule,
    analysis: Analysis,
    plan: Plan,
    verification: Verification | None,
    latency: Mapping[str, Any] | None = None,
) -> Report:
    """Measure both networks: parameters and MACs are those of the graphs, not derived from the plan."""
    narrowed = dataclasses.replace(captured, graph_module=small)
    total = analysis.neurons
    return Report(
        params=(count_parameters(captured.graph_module), count_parameters(small)),
        macs=(sum(captured.macs.values()), sum(narrowed.macs.values())),
        neurons=(total, total - plan.removed),
        widths={block.name: (block.width, plan.widths.get(block.name, block.width)) for block in analysis.blocks},
        refused=len(analysis.refusals),
        settings=plan.settings,
        verification=verification,
        latency=latency,
    )


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())
