"""Options for how much a command removes, by which method, and how much data and memory it uses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.choices import ALLOCATIONS, COMPENSATIONS, METHODS, choice
from vbpfx.cli.conventions import Tracing
from vbpfx.planning.criteria import NAMES as CRITERIA
from vbpfx.runtimes.adapters import DEFAULT
from vbpfx.runtimes.adapters import NAMES as RUNTIMES

BUDGET, BLOCKS, CALIBRATION = "Budget, exactly one", "How the budget is met", "Calibration"
BUDGETS = ("ratio", "macs", "params", "latency")


def fraction(value: float | None) -> float | None:
    """Return the value of an option. Raise a typer.BadParameter if it is given and not between 0 and 1."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value:g} is not between 0 and 1, exclusive")
    return value


def _budget(text: str) -> Any:
    return typer.Option(rich_help_panel=BUDGET, callback=fraction, help=text)


@dataclass(eq=False, repr=False)
class Planning:
    """Options for what is removed, and how. Every field has the name of an argument of :func:`vbpfx.prune_onnx`."""

    ratio: Annotated[float | None, _budget("Fraction of the hidden neurons to remove.")] = None
    macs: Annotated[float | None, _budget("Fraction of the multiply-accumulates (MACs) to keep.")] = None
    params: Annotated[float | None, _budget("Fraction of the parameters to keep.")] = None
    method: Annotated[
        str,
        choice(
            METHODS, rich_help_panel=BLOCKS, help="auto: the most accurate. vbp: Variance-Based Pruning as published."
        ),
    ] = "auto"
    criterion: Annotated[
        str | None,
        choice(CRITERIA, rich_help_panel=BLOCKS, help="How neurons are ranked; by default as --method does."),
    ] = None
    allocation: Annotated[
        str | None,
        choice(
            ALLOCATIONS,
            rich_help_panel=BLOCKS,
            help="How the budget is divided among blocks; by default as --method does.",
        ),
    ] = None
    compensation: Annotated[
        str | None,
        choice(
            COMPENSATIONS,
            rich_help_panel=BLOCKS,
            help="What stands in for removed neurons; by default as --method does.",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        choice(
            (*RUNTIMES, "none"),
            rich_help_panel=BLOCKS,
            help="Where the network will run: widths become multiples that are fast there. "
            "By default onnxruntime; none for exact widths, as with --method vbp.",
        ),
    ] = None
    round_to: Annotated[
        int | None,
        typer.Option(rich_help_panel=BLOCKS, min=1, help="Make widths multiples of this number; 1 for exact widths."),
    ] = None
    min_width: Annotated[int | None, typer.Option(rich_help_panel=BLOCKS, min=1, help="Smallest width of a block.")] = (
        None
    )
    include: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=BLOCKS, help="Prune only blocks that match, such as 'blocks.*'; repeatable."),
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option(rich_help_panel=BLOCKS, help="Do not prune blocks that match; repeatable.")
    ] = None
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=BLOCKS,
            help="Kinds of blocks to prune: mlp (hidden neurons, the default), value (attention's values), query (its queries and keys); repeatable.",
        ),
    ] = None
    uniform: Annotated[
        bool, typer.Option("--uniform", rich_help_panel=BLOCKS, help="One width for all blocks of one shape.")
    ] = False
    samples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=CALIBRATION,
            min=1,
            help="Samples that layers are fitted on; by default what --memory holds.",
        ),
    ] = None
    memory: Annotated[
        float,
        typer.Option(rich_help_panel=CALIBRATION, min=0.01, help="GiB that calibration may hold beside the model."),
    ] = 8.0
    mask: Annotated[
        str,
        typer.Option(
            rich_help_panel=CALIBRATION,
            metavar="NAME[:WHAT]",
            help="The input that marks padding, where it is not attention_mask. WHAT its nonzero entries are: tokens or padding.",
        ),
    ] = ""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of :func:`vbpfx.prune_onnx`, without those that were not given.

        Raises:
            typer.BadParameter: not exactly one budget is given, or the value of an option cannot be read.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        budgets = [name for name in BUDGETS if name in given]
        chosen = [f"--{name}" for name in budgets if given[name] is not None]
        if len(chosen) != 1:
            *first, last = (f"--{name}" for name in budgets)
            found = " and ".join(chosen) or "none"
            raise typer.BadParameter(f"exactly one budget is needed, found {found}: {', '.join(first)} or {last}")
        exact = self.runtime == "none" or (self.runtime is None and self.method == "vbp")
        given["runtime"] = None if exact and given.get("latency") is None else self.runtime or DEFAULT
        given["round_to"] = 1 if exact and self.round_to is None else self.round_to
        given["mask"] = mask_argument(self.mask)
        return {name: value for name, value in given.items() if value not in (None, False, [])}


@dataclass(eq=False, repr=False)
class ModelPlanning(Planning):
    """The same options and a few more for a model in PyTorch: the arguments of :func:`vbpfx.prune`."""

    latency: Annotated[float | None, _budget("Fraction of the latency in --runtime to keep.")] = None
    frontend: Tracing = "auto"
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=CALIBRATION, metavar="DIR", help="Folder from which an interrupted calibration continues."
        ),
    ] = None
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=CALIBRATION,
            help="Calibrate with torch.compile, which is worth it for much data. Only with --method vbp.",
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of :func:`vbpfx.prune`, without those that were not given.

        Raises:
            typer.BadParameter: options do not go together, or the value of one of them cannot be read.
        """
        if self.latency is not None and self.runtime == "none":
            raise typer.BadParameter("--latency is measured in a --runtime; none is not a runtime")
        if self.compile and self.method != "vbp":
            raise typer.BadParameter(
                "--compile works only with --method vbp. The method auto also computes gradients, and gradients are not compiled. Pass --method vbp, or leave out --compile"
            )
        return super().arguments()


def mask_argument(text: str) -> str | tuple[str, str] | None:
    """Return the ``mask`` of :func:`vbpfx.prune` for a ``--mask`` such as ``keep`` or ``pad:padding``, or None without one.

    Raises:
        typer.BadParameter: the part after the colon is neither ``tokens`` nor ``padding``.
    """
    name, colon, nonzero = text.partition(":")
    if colon and nonzero not in ("tokens", "padding"):
        raise typer.BadParameter(f"--mask {text}: expected NAME, NAME:tokens or NAME:padding")
    return (name, nonzero) if colon else name or None
