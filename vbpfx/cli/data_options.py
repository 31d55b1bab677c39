"""Options that say what data a command reads, and how."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.conventions import sizes

PANEL = "Data"


class BadImages(str, Enum):
    """What becomes of images that cannot be read."""

    refuse = "refuse"
    skip = "skip"


DATA = "A folder of images, .npy, .npz, or .txt or .jsonl for language models."
Batch = Annotated[int, typer.Option(min=1, rich_help_panel=PANEL, help="Samples in a batch.")]
Limit = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=PANEL, help="Take so many samples, chosen at random by --seed.")
]
Bad = Annotated[
    BadImages, typer.Option("--bad-images", rich_help_panel=PANEL, help="What to do about images that cannot be read.")
]
Workers = Annotated[int, typer.Option(min=0, rich_help_panel=PANEL, help="Processes that read images ahead.")]
Shape = Annotated[
    str, typer.Option(rich_help_panel=PANEL, help="Of one image, such as 3x224x224, in place of what the model says.")
]
Mean = Annotated[
    str,
    typer.Option(
        rich_help_panel=PANEL,
        help="Of the channels, such as 0.5 or 0.48,0.46,0.41, in place of what the model says; ImageNet's where it says nothing.",
    ),
]
Std = Annotated[str, typer.Option(rich_help_panel=PANEL, help="Of the channels, in the same way.")]
Crop = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1.0, rich_help_panel=PANEL,
        help="Side of the central crop over that of the resized image; 1 for images that are cropped already.",
    ),
]  # fmt: skip
Labels = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=PANEL, help="CSV with the columns file and label (a number), where folders are not classes."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(rich_help_panel=PANEL, help="Text file with the name of a class on each line, class 0 first."),
]
MaxLength = Annotated[int | None, typer.Option(min=1, rich_help_panel=PANEL, help="Tokens after which a text is cut.")]


def reading(*, bad_images: BadImages, shape: str, mean: str, std: str, **others: Any) -> dict[str, Any]:
    """The options of a command, as :func:`vbpfx.open_data` takes them; ``others`` as they are.

    Raises:
        typer.BadParameter: one of them is not of its form.
    """
    return {
        "bad_images": bad_images.value, "shape": sizes(shape), "mean": _numbers("--mean", mean), "std": _numbers("--std", std),
    } | others  # fmt: skip


def _numbers(option: str, text: str) -> tuple[float, ...] | None:
    """The numbers of an option such as ``--mean 0.48,0.46,0.41``; None for none.

    Raises:
        typer.BadParameter: they are none.
    """
    try:
        return tuple(float(number) for number in text.split(",")) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text}: expected numbers such as 0.48,0.46,0.41") from error
