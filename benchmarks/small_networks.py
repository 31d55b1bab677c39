"""Small networks of seven kinds for comparing methods, trained from scratch on scikit-learn's bundled 8x8 digits.

``NAMES`` lists them, and ``load`` returns one with its stored weights. The data is that of ``vbpfx.demo.digits``.
Nothing is downloaded. The networks are as narrow as the task allows, so that removing hidden neurons costs accuracy. The
demo's vision transformer is too wide for that: on digits, plain variance pruning loses nothing until a high ratio.
``CONVOLUTIONAL`` names those with padded 3x3 convolutions (``small_convolutional.py``). One of them, ``unet``, removes
noise; its score is the share of the noise's squared error that it removes. The score of all others is their accuracy.

``python benchmarks/small_networks.py`` prints the score of each under plain Variance-Based Pruning.
``--train [NAME ...]`` trains them anew, about a minute each on a CPU core, and stores the weights in
``benchmarks/weights``. Augmentation, schedule and hyperparameters are those of the demo's network, which
``vbpfx/demo/train_digits.py`` describes. Widths, depths and the number of epochs were chosen with ``--holdout 300``,
which scores on training images set aside; neither training nor that choice used the test images. Needs the extra
``vbpfx[demo]``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import small_convolutional
from rich.console import Console
from rich.table import Table
from timm.layers import SwiGLU
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits
from vbpfx.demo.train_digits import classification_loss, save_weights, seed_everything, train
from vbpfx.report.make import count_parameters

WEIGHTS = Path(__file__).resolve().parent / "weights"
EPOCHS = 150
RATIOS = (0.3, 0.5, 0.7)
CALIBRATION_BATCH = 100
_CALIBRATION_SEED = 1


def _convnext() -> nn.Module:
    return ConvNeXt(
        in_chans=1,
        num_classes=10,
        depths=(2, 2, 2, 1),
        dims=(8, 12, 16, 24),
        kernel_sizes=3,
        patch_size=1,
        ls_init_value=0.1,
    )


def _mixer() -> nn.Module:
    return MlpMixer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, num_blocks=6, embed_dim=40, mlp_ratio=(1.0, 2.0)
    )


def _swin() -> nn.Module:
    return SwinTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(1, 1),
        window_size=2,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
    )


def _swiglu() -> nn.Module:
    # With four tokens of 16 pixels and a single head, the gated layers do most of the work.
    return VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=16,
        depth=4,
        num_heads=1,
        mlp_ratio=1.5,
        mlp_layer=SwiGLU,
        act_layer=nn.SiLU,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnext": _convnext,
    "mixer": _mixer,
    "swin": _swin,
    "swiglu": _swiglu,
    "resnet": small_convolutional.resnet,
    "resnext": small_convolutional.resnext,
    "unet": small_convolutional.unet,
}
NAMES = tuple(NETWORKS)
CONVOLUTIONAL = ("resnet", "resnext", "unet")


@dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
        loss_of: function from the model, images and labels to the loss of training.
        score: function from the model, images and labels to its score; 1 is perfect.
        inputs: function from images and a seed to what the network sees of them.
    """

    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]
    score: Callable[[nn.Module, Tensor, Tensor], float]
    inputs: Callable[[Tensor, int], Tensor]


_CLASSIFICATION = Task(classification_loss, accuracy, lambda images, seed: images)
_DENOISING = Task(small_convolutional.denoising_loss, small_convolutional.noise_removed, small_convolutional.noisy)


def task(name: str) -> Task:
    """Return what the network of that name is trained for."""
    return _DENOISING if name == "unet" else _CLASSIFICATION


def load(name: str) -> nn.Module:
    """Return the network of that name with the stored weights, on the CPU and in eval mode."""
    model = NETWORKS[name]()
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS / f"{name}.safetensors"), strict=True)
    return model.eval()


def measure(name: str, model: nn.Module, calibration: Tensor, images: Tensor, labels: Tensor) -> list[str]:
    """Return one row of the table; :func:`vbpfx.prune` raises if a pruned network differs from its plan."""
    score = task(name).score
    batches = task(name).inputs(calibration, _CALIBRATION_SEED).split(CALIBRATION_BATCH)
    pruned = [vbpfx.prune(model, batches, ratio=ratio, method="vbp", progress=False) for ratio in RATIOS]
    return [
        name,
        f"{count_parameters(model):,}",
        f"{len(pruned[0].report.widths)}",
        f"{pruned[0].report.neurons[0]}",
        *(f"{score(m, images, labels):.2%}" for m in (model, *(p.graph_module for p in pruned))),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/small_networks.py", description="Small networks trained on digits, to prune."
    )
    parser.add_argument(
        "--train", nargs="*", choices=NAMES, metavar="NAME", help=f"train these, all by default: {', '.join(NAMES)}"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="with --train: score on N training images set aside, not on the test images; writes nothing",
    )
    args = parser.parse_args(argv)

    console = Console()
    split = load_digits()
    if not 0 <= args.holdout < len(split.train_images):
        parser.error(f"--holdout must be at least 0 and below {len(split.train_images)}")
    if args.holdout and args.train is None:
        parser.error("--holdout only goes with --train")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    kept = len(split.train_images) - args.holdout
    images, labels = split.train_images[:kept], split.train_labels[:kept]
    scored = (split.train_images[kept:], split.train_labels[kept:]) if args.holdout else split[2:]

    what = "held-out training" if args.holdout else "test"
    table = Table(title=f"Score on {len(scored[1])} {what} images, dense and by share removed", title_justify="left")
    columns = ("network", "params", "blocks", "hidden", "dense", *(f"{ratio:.0%}" for ratio in RATIOS))
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in args.train or NAMES:
        if args.train is None:
            model = load(name)
        else:
            seed_everything(args.seed)
            start = time.perf_counter()
            model = train(NETWORKS[name](), images, labels, args.epochs, console, task(name).loss_of)
            console.print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
            if not args.holdout:
                WEIGHTS.mkdir(exist_ok=True)
                save_weights(model, WEIGHTS / f"{name}.safetensors")
        table.add_row(*measure(name, model, images, *scored))
    console.print(table)


if __name__ == "__main__":
    main()
