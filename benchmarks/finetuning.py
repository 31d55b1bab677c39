"""Measure fine-tuning: how much accuracy pruned networks recover from the dense one, without labels.

``python benchmarks/finetuning.py`` prunes half of the hidden neurons and then trains with :func:`vbpfx.finetune` on the same
samples that the pruning was calibrated on:

- the ViT-Tiny, pruned by ``auto``, with the recipe ``few`` on crops and reflections of its 1000 images, for at most 15 minutes;
- the small networks on digits, pruned by the paper's method and by ``auto``, with ten epochs of the default recipe. The paper
  claims that this restores at least 99 % of the dense accuracy.

Accuracy is measured on other images, as ``retention_measures.py`` describes. Results go to
``benchmarks/results/finetuning.json`` and to a section of ``docs/results.md``; ``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results_page import PAGE, describe_machine, markdown_table, write_section
from retention_measures import Measured, difference, pack, unpack
from retention_networks import NETWORKS
from rich.console import Console
from torchvision.transforms import v2

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.planning.options import PlanArguments
from vbpfx.storage.files import json_writer, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "finetuning.json"
RATIO = 0.5
MINUTES = 15


def crops(inputs: Inputs) -> Inputs:
    """Crop every image at random to at least a fifth of its area, and reflect half of the images."""
    change = v2.Compose(
        [v2.RandomResizedCrop(224, scale=(0.2, 1.0), ratio=(1.0, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    )
    (images,) = inputs.args
    return Inputs((torch.stack([change(image) for image in images]),), {})


@dataclass(frozen=True)
class Tuning:
    """How a network is pruned and fine-tuned.

    Attributes:
        pruning: options of :func:`vbpfx.prune` besides the ratio.
        options: options of :func:`vbpfx.finetune`.
        at_once: samples per step.
        about: the options in words, for the page.
    """

    about: str
    at_once: int
    pruning: PlanArguments = field(default_factory=lambda: PlanArguments())
    options: dict[str, Any] = field(default_factory=dict)


def _ten_epochs(method: str) -> Tuning:
    # The learning rate was chosen on held-out training images, for the Mixer and the Swin.
    options = {"epochs": 10, "learning_rate": 2e-3}
    return Tuning(f"{method}; default, 10 epochs at 2e-3", 25, {"method": method}, options)


# Keys are network/method.
TUNINGS: dict[str, Tuning] = {
    "vit_tiny/auto": Tuning(
        "auto; few, crops", 25, {"method": "auto"}, {"recipe": "few", "held_out": 0, "augment": crops}
    ),
    **{
        f"{network}/{method}": _ten_epochs(method)
        for network in ("digits_vit", "convnext", "mixer", "swin", "swiglu")
        for method in ("vbp", "auto")
    },
}


def _network(name: str) -> str:
    return name.partition("/")[0]


def measure(name: str, console: Console) -> dict[str, Any] | None:
    """Return the figures of one entry; if its data is missing, print a message and return None."""
    subject, tuning = NETWORKS[_network(name)], TUNINGS[name]
    reason = subject.missing()
    if reason is not None:
        print(f"{name}: not measured: {reason}")
        return None
    network = subject.load(subject.calibration, None, console)
    batches = network.calibration(subject.calibration)
    pruned = vbpfx.prune(
        network.model, batches, example_inputs=network.example, ratio=RATIO, progress=False, **tuning.pruning
    )
    student = pruned.apply_to(network.model)
    data = list(torch.cat(batches).split(tuning.at_once))
    start = time.monotonic()
    done = vbpfx.finetune(
        student, network.model, data, max_seconds=60.0 * MINUTES, progress=console.is_terminal, **tuning.options
    )
    minutes = (time.monotonic() - start) / 60
    dense = network.output(network.model)
    before, after = (network.judge(dense, network.output(model)) for model in (student, done.model))
    whole = network.judge(dense, dense)
    return {
        "dense": whole.figures["top1"],
        "dense_values": pack(whole.values),
        "test_samples": network.test_samples,
        "before": _told(before),
        "after": _told(after),
        "epochs": done.history[-1].epoch,
        "stopped": done.stopped,
        "minutes": minutes,
        "machine": describe_machine(),
        "torch": torch.__version__,
    }


def _told(measured: Measured) -> dict[str, Any]:
    return {"figures": measured.figures, "values": pack(measured.values)}


def write_page(results: dict[str, Any], page: Path) -> None:
    """Write the section on fine-tuning into the page."""
    rows = []
    for name, tuning in TUNINGS.items():
        if (found := results.get(name)) is not None:
            before, after = (found[key]["figures"] for key in ("before", "after"))
            gain, error = difference(
                *(unpack(found[key]["values"]) for key in ("after", "before")), unpack(found["dense_values"])
            )
            rows.append(
                [NETWORKS[_network(name)].title, tuning.about, f"{found['dense']:.1%}",
                 *(f"{f['kept']:.1%} ± {f['kept_se']:.1%}" for f in (before, after)),
                 f"{100 * gain:+.1f} ± {100 * error:.1f}", f"{before['kl']:.3f}", f"{after['kl']:.3f}",
                 str(found["epochs"]), f"{found['minutes']:.1f}"]
            )  # fmt: skip
    machines = dict.fromkeys(
        f"torch {r['torch']}; {r['machine']['processor']}, {r['machine']['cores']} cores, {r['machine']['threads']} of them used."
        for r in results.values()
    )
    columns = ("network", "how", "dense top-1", "kept, pruned", "kept, tuned", "difference, points", "KL, pruned", "KL, tuned",
               "epochs", "minutes")  # fmt: skip
    text = f"""## Fine-tuning without labels

`python benchmarks/finetuning.py`

Half of the hidden neurons removed, then `vbpfx.finetune` on the same samples that pruning was calibrated on, for at most {MINUTES}
minutes; all figures on other images. *Kept* is top-1 over the dense network's on the same images, with its paired standard error.

{markdown_table(columns, rows)}

{chr(10).join(machines)}
"""
    write_section(page, "finetuning", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/finetuning.py", description="What pruned networks win back from the dense one."
    )
    networks = dict.fromkeys(map(_network, TUNINGS))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(networks)}; default all")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/finetuning.json"
    )
    parser.add_argument("--docs", type=Path, default=PAGE.parent, help="folder of results.md; default docs")
    options = parser.parse_args(argv)
    unknown = set(options.networks) - set(networks)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: unknown; choose from {', '.join(networks)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True, highlight=False)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    wanted = [
        name for name in TUNINGS if not options.page and (not options.networks or _network(name) in options.networks)
    ]
    for name in wanted:
        found = measure(name, console)
        if found is not None:
            results[name] = found
            write_atomically({options.out: json_writer(results)})
            before, after = (found[key]["figures"]["kept"] for key in ("before", "after"))
            print(
                f"{name}: kept {before:.1%}, tuned {after:.1%}, {found['minutes']:.1f} minutes, {found['epochs']} epochs"
            )
    if not results:
        print(f"nothing measured: there is no {options.out.name}")
        return 0
    write_page(results, options.docs / PAGE.name)
    print(f"written: the section on fine-tuning in {options.docs / PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
