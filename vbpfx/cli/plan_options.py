"""Options that say how much a command removes, by which method, and how much data it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer

BUDGET, BLOCKS, CALIBRATION = "Budget, exactly one", "How the budget is met", "Calibration"


class Method(str, Enum):
    """The names of :data:`vbpfx.planning.options.METHODS`."""

    auto = "auto"
    vbp = "vbp"


class Place(str, Enum):
    """The names of :data:`vbpfx.runtimes.adapters.NAMES`, and none of them."""

    aotinductor = "aotinductor"
    executorch = "executorch"
    onnxruntime = "onnxruntime"
    openvino = "openvino"
    pytorch = "pytorch"
    torch_compile = "torch_compile"
    tvm = "tvm"
    none = "none"


class CriterionName(str, Enum):
    """The names of :data:`vbpfx.planning.criteria.NAMES`."""

    denoised_variance = "denoised_variance"
    greedy_obs = "greedy_obs"
    magnitude = "magnitude"
    obs = "obs"
    output_variance = "output_variance"
    random = "random"
    variance = "variance"


class AllocationName(str, Enum):
    """The names of :data:`vbpfx.planning.allocation.ALLOCATIONS`."""

    all_blocks_ranked = "global"
    normalised = "normalised"
    equal = "equal"
    sensitivity = "sensitivity"


class CompensationName(str, Enum):
    """The names of :data:`vbpfx.planning.compensate.COMPENSATIONS`."""

    none = "none"
    mean = "mean"
    ridge = "ridge"


def fraction(value: float | None) -> float | None:
    """The value, where it is a fraction between 0 and 1; an option's callback."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value:g} is not between 0 and 1, exclusive")
    return value


def _budget(text: str) -> Any:
    return typer.Option(rich_help_panel=BUDGET, callback=fraction, help=text)


Ratio = Annotated[float | None, _budget("Fraction of the hidden neurons to remove.")]
Macs = Annotated[float | None, _budget("Fraction of the multiply-accumulates (MACs) to keep.")]
Params = Annotated[float | None, _budget("Fraction of the parameters to keep.")]
Latency = Annotated[float | None, _budget("Fraction of the latency in --runtime to keep.")]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method", rich_help_panel=BLOCKS, help="auto: the most accurate. vbp: Variance-Based Pruning as published."
    ),
]
Criterion = Annotated[
    CriterionName | None,
    typer.Option(
        rich_help_panel=BLOCKS, help="How neurons are ranked; by default as --method does.", show_default=False
    ),
]
Allocation = Annotated[
    AllocationName | None,
    typer.Option(
        rich_help_panel=BLOCKS,
        help="How the budget is divided among blocks; by default as --method does.",
        show_default=False,
    ),
]
Compensation = Annotated[
    CompensationName | None,
    typer.Option(
        rich_help_panel=BLOCKS,
        help="What stands in for removed neurons; by default as --method does.",
        show_default=False,
    ),
]
Runtime = Annotated[
    Place | None,
    typer.Option(
        rich_help_panel=BLOCKS,
        help="Where the network will run: widths become multiples that are fast there. "
        "By default onnxruntime; none for exact widths, as with --method vbp.",
        show_default=False,
    ),
]
RoundTo = Annotated[
    int | None, typer.Option(rich_help_panel=BLOCKS, min=1, help="Widths are multiples of it; 1 for exact ones.")
]
MinWidth = Annotated[int | None, typer.Option(rich_help_panel=BLOCKS, min=1, help="No block becomes narrower.")]
Include = Annotated[
    list[str] | None, typer.Option(rich_help_panel=BLOCKS, help="Blocks that match, such as 'blocks.*'; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(rich_help_panel=BLOCKS, help="All blocks but those that match; repeatable.")
]
Uniform = Annotated[
    bool, typer.Option("--uniform", rich_help_panel=BLOCKS, help="One width for all blocks of one shape.")
]
FittedOn = Annotated[
    int | None,
    typer.Option(
        "--samples", rich_help_panel=CALIBRATION, min=1,
        help="Samples that layers are fitted on; by default what --memory holds.",
    ),
]  # fmt: skip
Memory = Annotated[
    float, typer.Option(rich_help_panel=CALIBRATION, min=0.01, help="GiB that calibration may hold beside the model.")
]
Mask = Annotated[
    str,
    typer.Option(
        rich_help_panel=CALIBRATION,
        metavar="NAME[:WHAT]",
        help="The input that marks padding, where it is not attention_mask. WHAT its nonzero entries are: tokens or padding.",
    ),
]


def planning(
    budgets: Mapping[str, float | None],
    *,
    method: Method,
    criterion: CriterionName | None,
    allocation: AllocationName | None,
    compensation: CompensationName | None,
    runtime: Place | None,
    round_to: int | None,
    mask: str,
    **others: Any,
) -> dict[str, Any]:
    """The options of a command, as :func:`vbpfx.prune` and :func:`vbpfx.prune_onnx` take them.

    Args:
        budgets: name -> share; one of them is given.
        others: options that are handed on as they are; those that were not given are left out.

    Raises:
        typer.BadParameter: not exactly one budget is given, or an option is not of its form.
    """
    given = [f"--{name}" for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        *first, last = (f"--{name}" for name in budgets)
        found = " and ".join(given) or "none"
        raise typer.BadParameter(f"exactly one budget is needed, found {found}: {', '.join(first)} or {last}")
    exact = runtime == Place.none or (runtime is None and method == Method.vbp)
    place = None if exact and budgets.get("latency") is None else runtime or Place.onnxruntime
    options: dict[str, Any] = {
        **budgets, "method": method, "criterion": criterion, "allocation": allocation, "compensation": compensation,
        "runtime": place, "round_to": 1 if exact and round_to is None else round_to, "mask": mask_argument(mask), **others,
    }  # fmt: skip
    named = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    return {name: value for name, value in named.items() if value not in (None, [])}


def mask_argument(text: str) -> str | tuple[str, str] | None:
    """What a ``--mask`` such as ``keep`` or ``pad:padding`` says, as :func:`vbpfx.prune` takes it; None for none.

    Raises:
        typer.BadParameter: what its entries stand for is neither of the two.
    """
    name, colon, nonzero = text.partition(":")
    if colon and nonzero not in ("tokens", "padding"):
        raise typer.BadParameter(f"--mask {text}: expected NAME, NAME:tokens or NAME:padding")
    return (name, nonzero) if colon else name or None
