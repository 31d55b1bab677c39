"""Check real architectures with the substitution oracle: the pruned network against the dense one with substituted channels.

Weights are random but of natural size everywhere, because a layer scale of 1e-6 or a zero-initialised branch would hide
any error behind it. Half of the hidden neurons are removed. The table shows the largest difference of the outputs divided
by the largest output, for the GraphModule and the model's own class in float64 and float32, and for ONNX Runtime in
float32.

    python benchmarks/exactness.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torchvision
from results_page import PAGE, machine_line, markdown_table, write_section
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.export.onnx import export_onnx
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import relative_error
from vbpfx.plans.records import BlockPlan
from vbpfx.rewrite.substitute import reference_graph


@dataclass(frozen=True)
class Subject:
    """A model and its image size, which is small for models with depthwise convolutions: they are slow in float64."""

    make: Callable[[], nn.Module]
    size: int


SUBJECTS = {
    "deit_tiny": Subject(lambda: timm.create_model("deit_tiny_patch16_224"), 224),
    "swin_tiny": Subject(lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224),
    "convnext_atto": Subject(lambda: timm.create_model("convnext_atto"), 64),
    "mixer_s32": Subject(lambda: timm.create_model("mixer_s32_224"), 224),
    "torchvision ViT-B/16, 3 layers": Subject(
        lambda: torchvision.models.VisionTransformer(224, 16, 3, 12, 768, 3072), 224
    ),
    "test_vit (torch.export)": Subject(lambda: timm.create_model("test_vit"), 160),
}


@dataclass(frozen=True)
class Exactness:
    """Relative errors against the substitution reference, and how much the substitution changes the output."""

    frontend: str
    blocks: int
    graph64: float
    own64: float
    graph32: float
    own32: float
    onnx32: float
    effect: float


def randomize(model: nn.Module) -> nn.Module:
    """Fill every parameter and running statistic with random values of natural size, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn_like(parameter) / max(1, fan_in) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def shaken(plan: vbpfx.Plan) -> vbpfx.Plan:
    """Return the plan with noise on the constants for the removed neurons and on its corrections.

    The oracle holds for any such values. A fit can be so good that the substitution changes almost nothing, and then a
    comparison with it would prove nothing.
    """

    def shake(tensor: Tensor) -> Tensor:
        return tensor + torch.randn_like(tensor) * max(0.1, float(tensor.abs().mean()) if tensor.numel() else 0.0)

    blocks = tuple(replace(entry, constants=_shaken_constants(entry)) for entry in plan.blocks)
    corrections = tuple(replace(c, weight=shake(c.weight), bias=shake(c.bias)) for c in plan.corrections)
    return replace(plan, blocks=blocks, corrections=corrections)


def _shaken_constants(entry: BlockPlan) -> tuple[torch.Tensor, ...]:
    """Return a block's constants with noise, but 0 where a layer pads its input and no channel holds the constants."""
    padded = {c.source for c in entry.block.consumers if c.padded} if not entry.constants_in else set()
    sources = zip(entry.constants, entry.block.sources, strict=True)
    return tuple(a if source in padded else a + torch.randn_like(a) for a, source in sources)


def measure(subject: Subject) -> Exactness:
    """Prune half of the hidden neurons and compare every form of the result with the reference."""
    torch.manual_seed(0)
    model = randomize(subject.make()).eval()
    images = torch.randn(2, 3, subject.size, subject.size)
    found = vbpfx.prune(model, [images], ratio=0.5, progress=False, verify=False)
    plan = shaken(found.plan)
    small = vbpfx.convert(found.captured, plan)
    own32 = vbpfx.verify(found.captured, vbpfx.apply_plan(model, plan), plan, images)
    graph32 = vbpfx.verify(found.captured, small, plan, images)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(small, found.captured.inputs, Path(folder) / "pruned.onnx", plan=plan)
        session = open_session(file)
        with torch.no_grad():
            expected = reference_graph(found.captured, plan)(images)
        onnx32 = relative_error(run_session(session, Inputs((images,), {})), [expected])
    double = model.double()
    exact = vbpfx.capture(double, images.double())
    graph64 = vbpfx.verify(exact, vbpfx.convert(exact, plan), plan)
    own64 = vbpfx.verify(exact, vbpfx.apply_plan(double, plan), plan)
    return Exactness(
        exact.frontend,
        len(found.analysis.blocks),
        graph64.error,
        own64.error,
        graph32.error,
        own32.error,
        onnx32,
        graph64.effect,
    )


COLUMNS = ("model", "front end", "blocks", "graph f64", "class f64", "graph f32", "class f32", "ONNX f32", "effect")


def row(name: str) -> list[str]:
    """Return one line of the table."""
    found = measure(SUBJECTS[name])
    errors = (found.graph64, found.own64, found.graph32, found.own32, found.onnx32, found.effect)
    return [name, found.frontend, str(found.blocks), *(f"{error:.1e}" for error in errors)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(SUBJECTS)}; default all, into the page"
    )
    asked = parser.parse_args().models
    names = track(asked or list(SUBJECTS), "comparing", console=Console(stderr=True))
    table = markdown_table(COLUMNS, [row(name) for name in names])
    print(table)
    if not asked:
        write_section(
            PAGE,
            "exactness",
            "## Exactness: the substitution oracle\n\n`python benchmarks/exactness.py`\n\nLargest difference of the outputs over "
            "the largest output, between the pruned network and the dense one in which the\nremoved channels are substituted: "
            "as a GraphModule, in the model's own class, and in ONNX Runtime. Random weights of natural\nsize everywhere, half "
            "of the hidden neurons removed. *Effect* is what the substitution does to the dense output.\n\n"
            f"{table}\n\n{machine_line()}\n",
        )


if __name__ == "__main__":
    main()
