"""Options for how a command reads its data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vbpfx.cli.choices import BAD_IMAGES, choice
from vbpfx.cli.conventions import sizes

PANEL = "Data"
DATA = "A folder of images, .npy, .npz, or .txt or .jsonl for language models."


@dataclass(eq=False, repr=False)
class Reading:
    """Options for reading samples. Every field has the name of an argument of :func:`vbpfx.open_data`."""

    batch: Annotated[int, typer.Option(min=1, rich_help_panel=PANEL, help="Samples in a batch.")] = 32
    limit: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=PANEL, help="Use only this many samples, chosen at random with --seed."),
    ] = None
    bad_images: Annotated[
        str,
        choice(BAD_IMAGES, "--bad-images", rich_help_panel=PANEL, help="What to do about images that cannot be read."),
    ] = "refuse"
    workers: Annotated[int, typer.Option(min=0, rich_help_panel=PANEL, help="Processes that read images ahead.")] = 0
    shape: Annotated[
        str,
        typer.Option(rich_help_panel=PANEL, help="Shape of one image, such as 3x224x224. Default: the model's."),
    ] = ""
    mean: Annotated[
        str,
        typer.Option(
            rich_help_panel=PANEL,
            help="Mean of each channel, such as 0.5 or 0.48,0.46,0.41. Default: the model's, or ImageNet's if the model names none.",
        ),
    ] = ""
    std: Annotated[
        str, typer.Option(rich_help_panel=PANEL, help="Standard deviation of each channel, in the same form.")
    ] = ""
    crop: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            rich_help_panel=PANEL,
            help="Side of the central crop over that of the resized image; 1 for images that are cropped already.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of everything random, such as what --limit chooses.")] = 0

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of :func:`vbpfx.open_data`.

        Raises:
            typer.BadParameter: the value of an option cannot be read.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        read = {"shape": sizes(self.shape), "mean": _numbers("--mean", self.mean), "std": _numbers("--std", self.std)}
        return given | read


@dataclass(eq=False, repr=False)
class ModelReading(Reading):
    """Options for reading samples for a model in PyTorch."""

    max_length: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=PANEL, help="Tokens after which a text is cut.")
    ] = None


@dataclass(eq=False, repr=False)
class LabelledReading(ModelReading):
    """Options for reading samples with their labels."""

    labels: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=PANEL, help="CSV with the columns file and label (a number), where folders are not classes."
        ),
    ] = None


def _numbers(option: str, text: str) -> tuple[float, ...] | None:
    """Return the numbers of an option such as ``--mean 0.48,0.46,0.41``, or None if the text is empty.

    Raises:
        typer.BadParameter: they are not numbers.
    """
    try:
        return tuple(float(number) for number in text.split(",")) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text}: expected numbers such as 0.48,0.46,0.41") from error
