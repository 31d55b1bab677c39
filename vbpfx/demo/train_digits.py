"""Train the demo's vision transformer and write the weights that the package ships.

``python -m vbpfx.demo.train_digits`` takes about five minutes on one CPU core. It trains only on the training split,
and uses the test split once, at the end. To choose hyperparameters, ``--holdout N`` sets N training images aside, and
evaluates on these instead.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from vbpfx.demo.digits import (
    PIXEL_MEAN,
    PIXEL_STD,
    WEIGHTS,
    accuracy,
    build_model,
    load_digits,
)

EPOCHS = 300
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.05
LABEL_SMOOTHING = 0.1
MAX_GRAD_NORM = 1.0

MAX_SHIFT = 0.5  # pixels
MAX_ROTATION = math.radians(15)
MAX_SCALING = 0.15

BACKGROUND = -PIXEL_MEAN / PIXEL_STD


def augment(images: Tensor) -> Tensor:
    """Shift, rotate and scale every image a little, each by its own random amount."""
    count, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, scale = uniform(MAX_ROTATION), 1 + uniform(MAX_SCALING)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # affine_grid's coordinates run from -1 to 1, so one pixel is 2 / size.
    shift_x, shift_y = uniform(MAX_SHIFT * 2 / width), uniform(MAX_SHIFT * 2 / height)
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # grid_sample fills positions outside the image with zeros, so the background is shifted to zero here.
    return F.grid_sample(images - BACKGROUND, grid, align_corners=False) + BACKGROUND


def seed_everything(seed: int) -> None:
    """Make runs exactly reproducible on the same machine with the same versions."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # The order of summation depends on the number of threads.
    torch.set_num_threads(1)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the model's logits, with smoothed labels."""
    return F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    console: Console,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = classification_loss,
) -> nn.Module:
    """Train ``model`` on ``images`` in place and return it in eval mode.

    Args:
        loss_of: function from the model, augmented images and their labels to the loss.
    """
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    undecayed = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": undecayed, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    warmup = max(1, round(steps * WARMUP_FRACTION))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    columns = (
        TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs, loss=math.nan)
        for _ in range(epochs):
            total = 0.0
            for index in torch.split(torch.randperm(len(images)), BATCH_SIZE):
                loss = loss_of(model, augment(images[index]), labels[index])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                scheduler.step()
                total += loss.item() * len(index)
            progress.update(task, advance=1, loss=total / len(images))
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state dict to ``path`` in one step, so that the file is never incomplete."""
    partial = path.with_name(path.name + ".partial")
    try:
        # safetensors' own save_file would make a file that only its owner can read.
        partial.write_bytes(safetensors.torch.save(model.state_dict()))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vbpfx.demo.train_digits", description="Train the demo's vision transformer."
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="default: the weights in the package")
    parser.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="score on N training images set aside, not on the test images; writes nothing",
    )
    args = parser.parse_args(argv)

    console = Console()
    split = load_digits()
    if not 0 <= args.holdout < len(split.train_images):
        parser.error(f"--holdout must be at least 0 and below {len(split.train_images)}")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not args.out.parent.is_dir():
        parser.error(f"--out: no such folder: {args.out.parent}")

    seed_everything(args.seed)
    kept = len(split.train_images) - args.holdout
    model = train(build_model(), split.train_images[:kept], split.train_labels[:kept], args.epochs, console)
    if args.holdout:
        score = accuracy(model, split.train_images[kept:], split.train_labels[kept:])
        console.print(f"holdout accuracy {score:.4f} ({args.holdout} images)")
        return
    console.print(f"test accuracy {accuracy(model, split.test_images, split.test_labels):.4f}")
    save_weights(model, args.out)
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
