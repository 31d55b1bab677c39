"""What all commands share: option types, one-line errors, exit statuses.

This file and the files of the commands import heavy packages only inside functions. So ``--help`` does not wait for torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vbpfx.cli.choices import FRONTENDS, choice
from vbpfx.errors import VbpfxError, first_line

INTERRUPTED = 130  # the exit status in shells of a process that Ctrl-C ended


def _without_color(asked: bool) -> None:
    if asked:
        os.environ["NO_COLOR"] = "1"  # rich and typer read it


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="timm:NAME, torchvision:NAME, hf:NAME-or-folder, or module:callable of your own."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="State dict of the model: safetensors, or as torch.save wrote it.")]
Shape = Annotated[str, typer.Option(help="Shape of one sample, such as 3x224x224, if the model does not state it.")]
Samples = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="In place of --shape, for inputs of any kind: samples, read as vbpfx prune reads them with --data.",
    ),
]
DenseWeights = Annotated[
    Path | None, typer.Option(help="State dict of the dense model: safetensors, or as torch.save wrote it.")
]
Tracing = Annotated[str, choice(FRONTENDS, "--frontend", help="What traces the model: auto tries both.")]
Color = Annotated[
    bool,
    typer.Option("--no-color", callback=_without_color, is_eager=True, help="No colours; NO_COLOR=1 does it, too."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
OutFolder = Annotated[
    Path, typer.Option(metavar="DIR", help="Output folder: new, empty, or with an earlier result, which is replaced.")
]
NoOnnx = Annotated[bool, typer.Option("--no-onnx", help="Write no model.onnx.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def sizes(shape: str) -> tuple[int, ...] | None:
    """Return the sizes in a ``--shape`` such as 3x224x224, or None if the text is empty.

    Raises:
        typer.BadParameter: the text is not a shape.
    """
    try:
        found = tuple(int(size) for size in shape.split("x")) if shape else None
    except ValueError as error:
        raise typer.BadParameter(f"--shape {shape}: expected numbers such as 3x224x224") from error
    if found is not None and min(found) < 1:
        raise typer.BadParameter(f"--shape {shape}: expected sizes of 1 and more, such as 3x224x224")
    return found


def one_of_shape_and_data(shape: str, data: Path | None) -> tuple[int, ...] | None:
    """Return the sizes in ``--shape``, or None without one. For commands that take either ``--shape`` or ``--data``.

    Raises:
        typer.BadParameter: the text is not a shape, or both options are given.
    """
    if shape and data is not None:
        raise typer.BadParameter("--shape and --data both say what the input looks like; pass one of them")
    return sizes(shape)


def require_apart(checkpoint: Path | None, out: Path) -> None:
    """Raise a typer.BadParameter if the folder of the checkpoint is the output folder or inside it."""
    if checkpoint is not None and out.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise typer.BadParameter("--checkpoint is inside --out, which the result replaces; pass another folder")


def save_with_onnx(save: Callable[[bool], Any], out: Path, *, onnx: bool, first: bool) -> None:
    """Write an artifact. If ``model.onnx`` cannot be made, still write the rest, so that no work is lost.

    Args:
        save: writes the artifact. Its argument says whether to write ``model.onnx``.
        out: the folder of the artifact.
        onnx: whether ``model.onnx`` is wanted.
        first: whether this process is the one that writes.

    Raises:
        ExportError: ``model.onnx`` cannot be made. The other files are written.
    """
    from vbpfx.errors import ExportError

    refused: ExportError | None = None
    try:
        save(onnx)
    except ExportError as error:
        refused = error
        if first:
            save(False)
    if first and (refused or not onnx):
        (out / "model.onnx").unlink(missing_ok=True)  # it belongs to an earlier result
    if refused:
        raise ExportError(f"{out} holds everything but model.onnx: {refused}") from refused


def command_line() -> str:
    """Return the command as it was typed, for the report."""
    return shlex.join(["vbpfx", *sys.argv[1:]])


def device_named(name: str) -> Any:
    """Return the ``torch.device`` of that name.

    Raises:
        ModelError: the machine has no such device.
    """
    import torch

    from vbpfx.errors import ModelError, first_line

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} is not there ({first_line(error)}); use cpu") from error


@contextmanager
def failing_in_one_line(debug: bool) -> Iterator[None]:
    """Turn an error within this context into one line on standard error and exit status 1, or 130 for Ctrl-C.

    Args:
        debug: raise errors with their traceback instead.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if debug:
            raise
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except (typer.Exit, typer.Abort, typer.BadParameter):  # typer reports these itself
        raise
    except Exception as error:
        if debug:
            raise
        say(reason(error))
        raise typer.Exit(1) from error


def reason(error: BaseException) -> str:
    """Return an error as one line of text."""
    if isinstance(error, (VbpfxError, ImportError)):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {first_line(error)} (--debug shows where)"


def say(message: str) -> None:
    """Print an error or another message of the program in one line on standard error."""
    _print(f"vbpfx: {message}", "red")


def note(text: str) -> None:
    """Print a note on standard error."""
    _print(text, "dim")


def _print(text: str, style: str) -> None:
    """Print the text without rich's markup, because paths and names may look like markup."""
    Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False).print(text, style=style)


def note_random_weights(model: str, weights: Path | None) -> None:
    """Print a note if the model of that name has random weights and no file of weights is given."""
    from vbpfx.models.names import has_random_weights

    if weights is None and has_random_weights(model):
        note(f"{model} has random weights: for trained ones pass --weights FILE")


@contextmanager
def busy(text: str, shown: bool = True) -> Iterator[None]:
    """Show a status with the text on standard error within this context, if standard error is a terminal."""
    if not (shown and shows_progress()):
        yield
        return
    with Console(stderr=True).status(Text(text)):
        yield


def shows_progress() -> bool:
    """Return whether standard error is a terminal, so that progress bars can be seen."""
    return sys.stderr.isatty()
