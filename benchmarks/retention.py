"""Retention: how much of a real network's accuracy survives pruning, without any retraining.

``python benchmarks/retention.py`` calibrates once on the ImageNet ViT-Tiny that ``imagenet.py`` describes, prunes
it at every ratio, and compares each pruned network with the dense one on the same n validation images. Labels are used for measuring only: neither calibration nor the choice of neurons reads one.

- top-1 is the share of images whose highest logit stands at their label: D dense, P pruned.
- retention is R = P / D.
- Its standard error is that of a ratio of paired means (delta method). With d_i, p_i in {0, 1} whether the
  dense and the pruned network are right on image i,

      SE(R) = sqrt(sum_i (p_i - R d_i)^2 / (n (n - 1))) / D.

  It is the error over the draw of validation images; weights and calibration images are taken as given.
- agreement is the share of images on which both have their highest logit at the same class.
- KL is the mean over images of sum_c q_c ln(q_c / r_c), in nats, with q the dense and r the pruned
  network's softmax.
- One MAC is one multiply-accumulate; :class:`vbpfx.Report` says which are counted.

``method="vbp"`` is the paper to the letter: one global ranking and no floor. ``method="auto"`` uses the
same ranking, but every block keeps at least a sixteenth of its width; it is measured where that makes a
different network.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from imagenet import (
    CALIBRATION_IMAGES,
    NETWORK,
    ROOT,
    data_folder,
    is_present,
    load_calibration,
    load_network,
    load_validation,
)
from results_page import describe_machine, markdown_table, write_section
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import vbpfx
from vbpfx.importance import CRITERIA
from vbpfx.report import count_parameters, make_report

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
METHODS = ("vbp", "auto")
HIGHEST_RATIO = 15 / 16  # what method="auto" can remove above its floors
EXAMPLES = 4  # samples to trace with and to run the substitution oracle on


@dataclass(frozen=True)
class Comparison:
    """A pruned network against the dense one on the same images; the module's docstring defines the figures."""

    top1: float
    retention: float
    standard_error: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class Result:
    """One pruned network.

    Attributes:
        neurons, params, macs: what is left.
        smallest_width: width of the narrowest block.
        widths: width of every block.
        oracle_error: what the substitution oracle measured (:class:`vbpfx.Verification`).
    """

    criterion: str
    method: str
    ratio: float
    comparison: Comparison
    neurons: int
    params: int
    macs: int
    smallest_width: int
    widths: dict[str, int]
    oracle_error: float


@dataclass(frozen=True)
class Dense:
    """The network before pruning, on the validation images."""

    top1: float
    neurons: int
    params: int
    macs: int


@dataclass(frozen=True)
class Planned:
    """A plan and the settings it was made with."""

    criterion: str
    method: str
    ratio: float
    plan: vbpfx.Plan


def compare(dense: Tensor, pruned: Tensor, labels: Tensor) -> Comparison:
    """Compare logits, both (n, classes), under the labels, (n,)."""
    d, p = ((logits.argmax(1) == labels).double() for logits in (dense, pruned))
    retention = p.mean() / d.mean()
    residual = p - retention * d  # of mean zero
    n = len(labels)
    q, r = (F.log_softmax(logits.double(), dim=1) for logits in (dense, pruned))
    return Comparison(
        top1=p.mean().item(),
        retention=retention.item(),
        standard_error=((residual.square().sum() / (n * (n - 1))).sqrt() / d.mean()).item(),
        agreement=(dense.argmax(1) == pruned.argmax(1)).double().mean().item(),
        kl=(q.exp() * (q - r)).sum(1).mean().item(),
    )


def make_plans(
    analysis: vbpfx.Analysis, statistics: vbpfx.Statistics, criteria: Sequence[str], ratios: Sequence[float]
) -> list[Planned]:
    """A plan for every criterion, ratio and method, without those that keep the same neurons as the one before."""
    plans: list[Planned] = []
    for criterion in criteria:
        for ratio in ratios:
            kept: list[dict[str, tuple[int, ...]]] = []
            for method in METHODS:
                plan = vbpfx.make_plan(analysis, statistics, ratio=ratio, method=method, criterion=criterion)
                kept.append({entry.block.name: entry.kept for entry in plan.blocks})
                if kept[-1] not in kept[:-1]:
                    plans.append(Planned(criterion, method, ratio, plan))
    return plans


def run(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure everything; returns the figures, ready for JSON."""
    network = load_network(folder)
    calibration = load_calibration(folder, options.calibration, console)
    images, labels = load_validation(folder, console)

    captured = vbpfx.capture(network, calibration[:EXAMPLES])
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis)
    batches = torch.split(calibration, options.batch_size)
    vbpfx.calibrate(observed, batches, progress=True)
    plans = make_plans(analysis, vbpfx.statistics(observed), options.criteria, options.ratios)

    def logits(model: nn.Module, title: str) -> Tensor:
        parts = torch.split(images, options.batch_size)
        with torch.inference_mode():
            return torch.cat([model(part) for part in track(parts, title, console=console, transient=True)])

    expected = logits(network, "dense")
    results: list[Result] = []
    for number, planned in enumerate(plans, start=1):
        small = vbpfx.convert(captured, planned.plan)
        verification = vbpfx.verify(captured, small, planned.plan)
        report = make_report(captured, small, analysis, planned.plan, verification)
        title = f"{number}/{len(plans)} {planned.criterion}, {planned.method}, p = {planned.ratio:g}"
        comparison = compare(expected, logits(small, title), labels)
        widths = {name: after for name, (_, after) in report.widths.items()}
        results.append(
            Result(
                criterion=planned.criterion,
                method=planned.method,
                ratio=planned.ratio,
                comparison=comparison,
                neurons=report.neurons[1],
                params=report.params[1],
                macs=report.macs[1],
                smallest_width=min(widths.values()),
                widths=widths,
                oracle_error=verification.error,
            )
        )
        console.print(f"{title}: kept {comparison.retention:.1%}", highlight=False)
    dense = Dense(
        top1=compare(expected, expected, labels).top1,
        neurons=analysis.neurons,
        params=count_parameters(captured.graph_module),
        macs=sum(captured.macs.values()),
    )
    return {
        "network": NETWORK,
        "calibration_images": len(calibration),
        "validation_images": len(labels),
        "dense": asdict(dense),
        "results": [asdict(result) for result in results],
    }


def markdown(figures: dict[str, Any]) -> str:
    """What stands between the markers: how it was measured, and the table."""
    dense, versions, machine = figures["dense"], figures["versions"], figures["machine"]
    criteria = dict.fromkeys(result["criterion"] for result in figures["results"])
    columns = ["p", "criterion", "method", "kept ± SE", "top-1", "agreement", "KL", "parameters", "MACs",
               "narrowest block"]  # fmt: skip
    rows = [
        [
            f"{100 * result['ratio']:g}%",
            result["criterion"],
            result["method"],
            f"{c['retention']:.1%} ± {c['standard_error']:.1%}",
            f"{c['top1']:.1%}",
            f"{c['agreement']:.1%}",
            f"{c['kl']:.2f}",
            f"{result['params'] / 1e6:.2f} M ({result['params'] / dense['params']:.1%})",
            f"{result['macs'] / 1e9:.3f} G ({result['macs'] / dense['macs']:.1%})",
            str(result["smallest_width"]),
        ]
        for result in figures["results"]
        for c in (result["comparison"],)
    ]
    if len(criteria) == 1:  # then the text says it
        rows = [row[:1] + row[2:] for row in rows]
        columns.remove("criterion")
    table = markdown_table(columns, rows)
    floored = [result for result in figures["results"] if result["method"] == "auto"]
    auto = (
        "it has a row where that makes a different network"
        if floored
        else "at none of these p does that change anything"
    )
    return f"""## Retention without retraining: ViT-Tiny on ImageNet

`{figures["command"]}`

timm's `{figures["network"]}`, trained on ImageNet-1k, with a share p of its {dense["neurons"]:,} hidden neurons removed:
ranked by {" / ".join(criteria)}, their means folded into the next bias. The statistics come from one forward pass
over {figures["calibration_images"]:,} calibration images. **Labels are used for measuring only**: calibration and selection read none,
and nothing is retrained.

The dense network has {dense["params"] / 1e6:.2f} M parameters, {dense["macs"] / 1e9:.3f} G MACs and a top-1 of **{dense["top1"]:.1%}** on the
{figures["validation_images"]} validation images. *Kept* is the pruned top-1 divided by that, on the same images. {figures["validation_images"]} images are noisy:
read every figure with its standard error (SE, paired, over images), and take no top-1 here for "ImageNet top-1".
*Agreement* is the share of images on which both networks choose the same class, *KL* the mean KL(dense ‖ pruned) of
their outputs in nats; these two tell recipes apart sooner than accuracy does.

{table}

*vbp* is Variance-Based Pruning to the letter: one global ranking over all blocks, and no floor. *auto*, the default,
takes the same ranking, but every block keeps at least a sixteenth of its width; {auto}.

**This network is harder to prune than the paper's DeiT**: DeiT-T is published to keep 69.1% at p = 45%, before
fine-tuning.

torch {versions["torch"]}, timm {versions["timm"]}, vbpfx {versions["vbpfx"]}; {machine["processor"]}, {machine["cores"]} cores.
All figures, with the width of every block: `benchmarks/results/retention.json`.
"""


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= HIGHEST_RATIO:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {HIGHEST_RATIO}")
    return value


def _criterion(text: str) -> str:
    if text not in CRITERIA:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose from {', '.join(CRITERIA)}")
    return text


def _separated(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def comma_separated(text: str) -> list[Any]:
        return [read(part.strip()) for part in text.split(",")]

    return comma_separated


def _at_least(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    def integer(text: str) -> int:
        number = int(text)
        if not lowest <= number <= highest:
            limit = f"at least {lowest}" + (f" and at most {highest}" if highest < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return number

    return integer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python benchmarks/retention.py",
        description="What the ImageNet ViT-Tiny keeps of its accuracy when it is pruned without retraining.",
    )
    add = parser.add_argument
    add("--ratios", type=_separated(_ratio), default=list(RATIOS), help="comma-separated; default 0.1 to 0.7")
    add(
        "--criteria",
        type=_separated(_criterion),
        default=["variance"],
        help=f"comma-separated, of {', '.join(CRITERIA)}; default variance",
    )
    add(
        "--calibration",
        type=_at_least(EXAMPLES, CALIBRATION_IMAGES),
        default=CALIBRATION_IMAGES,
        help="number of calibration images; default %(default)s",
    )
    add("--batch-size", type=_at_least(1), default=50, help="default %(default)s")
    add("--threads", type=_at_least(1), help="default: torch's choice")
    add(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of retention.json; default benchmarks/results",
    )
    add("--page", type=Path, default=ROOT / "docs" / "results.md", help="page of the table; default docs/results.md")
    options = parser.parse_args(arguments)

    folder = data_folder()
    if not is_present(folder):
        print(f"nothing measured: no ImageNet data in {folder}; set VBPFX_DATA to the folder that holds imagenet/")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    figures = {
        "command": shlex.join(["python", "benchmarks/retention.py", *arguments]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "vbpfx": vbpfx.__version__,
        },
        "machine": describe_machine(),
        **run(folder, options, Console(stderr=True)),
    }
    text = markdown(figures)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "retention.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_section(options.page, "retention", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
