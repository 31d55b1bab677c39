"""Compare vbpfx with Torch-Pruning on the same networks, for docs/comparison.md.

In each network, the hidden channels reach the output in a different way. Half of the hidden neurons are to be removed.
Torch-Pruning is used as its documentation describes, without patches for single models. Weights are random, in double
precision.

    pip install torch-pruning==1.6.1
    python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning
from results_page import markdown_table, write_section
from timm.layers import GatedMlp
from timm.models import mlp_mixer
from torch import Tensor, nn
from torch.nn import functional as F

import vbpfx

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, HIDDEN = 16, 64


class Mlp(nn.Module):
    """Two linear layers with the function ``middle`` between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], read: int = HIDDEN) -> None:
        super().__init__()
        self.fc1, self.fc2, self.middle = nn.Linear(WIDTH, HIDDEN), nn.Linear(read, WIDTH), middle

    def forward(self, x: Tensor) -> Any:
        """Apply the first layer, ``middle`` and the second layer."""
        return self.fc2(self.middle(self.fc1(x)))


class WithoutGradients(Mlp):
    """The same network with a forward pass under ``torch.no_grad``."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """Apply the network without gradients."""
        return super().forward(x)


class Exposed(Mlp):
    """The same network, which also returns its hidden tensor."""

    def forward(self, x: Tensor) -> Any:
        """Return the output and the hidden tensor."""
        h = self.middle(self.fc1(x))
        return self.fc2(h), h


def _chunks(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _slices(h: Tensor) -> Tensor:
    return F.silu(h[..., : HIDDEN // 2]) * h[..., HIDDEN // 2 :]


def _view(h: Tensor) -> Tensor:
    gate, up = h.view(h.shape[0], 2, HIDDEN // 2).unbind(1)
    return F.silu(gate) * up


def _image_model(name: str, **options: int) -> nn.Module:
    return timm.create_model(name, depth=1, num_classes=5, **options)


def _of_natural_size(model: nn.Module) -> nn.Module:
    """Set random weights that let signals through, because some initialisations make whole branches nearly zero."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
    return model


def _gmlp() -> nn.Module:
    gated = {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 6}
    return mlp_mixer.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=1, embed_dim=64, **gated)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP with ReLU": lambda: Mlp(F.relu),
    "gate and value by `chunk`": lambda: Mlp(_chunks, HIDDEN // 2),
    "gate and value by slices": lambda: Mlp(_slices, HIDDEN // 2),
    "gate and value by `view`": lambda: Mlp(_view, HIDDEN // 2),
    "frozen parameters": lambda: Mlp(F.relu).requires_grad_(False),
    "forward under `no_grad`": lambda: WithoutGradients(F.relu),
    "hidden tensor also an output": lambda: Exposed(F.relu),
    "timm gMLP, one block": _gmlp,
    "timm EVA-02, one block": lambda: _image_model("eva02_tiny_patch14_224", img_size=28),
    "timm TNT, one block": lambda: _image_model("tnt_s_legacy_patch16_224"),
}


def _example(model: nn.Module) -> Tensor:
    if isinstance(model, Mlp):
        return torch.randn(8, WIDTH).double()
    size = {"MlpMixer": 32, "Eva": 28, "TNT": 224}[type(model).__name__]
    return torch.randn(2, 3, size, size).double()


def _shapes(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    found = model(example)
    return [tuple(value.shape) for value in (found if isinstance(found, tuple) else (found,))]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def by_torch_pruning(model: nn.Module, example: Tensor) -> str:
    """Prune the hidden layers as Torch-Pruning's documentation describes, and return the outcome as text.

    All other layers are passed as ``ignored_layers``.
    """
    before, shapes = _parameters(model), _shapes(model, example)
    ignored = [m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "fc1" not in name]
    importance = torch_pruning.importance.MagnitudeImportance()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model, example, importance=importance, pruning_ratio=0.5, ignored_layers=ignored
        )
        pruner.step()
    except Exception as error:
        changed = " with the model changed" if _parameters(model) != before else ""
        return f"{type(error).__name__} while pruning{changed}"
    if _parameters(model) == before:
        return "nothing pruned, no error"
    try:
        now = _shapes(model, example)
    except Exception as error:
        return f"pruned; then {type(error).__name__} when the model runs"
    return "pruned" if now == shapes else f"pruned; an output is now {now[-1]}, was {shapes[-1]}"


def by_vbpfx(model: nn.Module, example: Tensor) -> str:
    """Prune with ``vbpfx.prune`` and return the outcome as text, with that of the substitution oracle."""
    try:
        pruned = vbpfx.prune(model, [example], ratio=0.5, method="vbp", progress=False)
    except vbpfx.VbpfxError as error:
        return f"refused: {pruned_reason(model, example) or error}"
    assert pruned.verification is not None
    assert pruned.verification.error < 1e-9 < pruned.verification.effect
    return "pruned, proven"


def pruned_reason(model: nn.Module, example: Tensor) -> str:
    """Return why the hidden layer is refused."""
    refusals = vbpfx.find_blocks(vbpfx.capture(model, example)).refusals
    return refusals[0].reason if refusals else ""


def rows() -> list[list[str]]:
    """Return one row per network with the outcome of either tool; each tool gets a new model."""
    found = []
    for name, make in NETWORKS.items():
        outcomes = []
        for tool in (by_torch_pruning, by_vbpfx):
            torch.manual_seed(0)
            model = _of_natural_size(make()).double().eval()
            outcomes.append(tool(model, _example(model)))
        found.append([name, *outcomes])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write it into docs/comparison.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    where = parser.parse_args(arguments).docs
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = markdown_table(("network", f"Torch-Pruning {version('torch-pruning')}", "vbpfx"), rows()).replace(
        "---:", "---"
    )
    print(table)
    write_section(where / "comparison.md", "peers", f"{table}\n\ntorch {torch.__version__}, timm {timm.__version__}.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
