"""A pruned model of its own class can be rebuilt from the class, the plan and the ``state_dict``.

This does not depend on a table of model families, so many kinds of families are tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import timm
import torch
from exactness import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.plans.files import load_plan, plan_files
from vbpfx.rewrite.carry import CarriedNorm
from vbpfx.storage.files import write_atomically

_SMALL = {"img_size": 64, "depth": 2}

# family -> (timm model, arguments that make it small)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", {**_SMALL, "embed_dim": 48}),
    "DeiT": ("deit_tiny_distilled_patch16_224", _SMALL),
    "BEiT": ("beit_base_patch16_224", {**_SMALL, "embed_dim": 48, "num_heads": 3}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)},
    ),
    "ConvNeXt": ("test_convnext", {}),
    "Mixer": ("mixer_s32_224", {"img_size": 64}),
    "ResMLP": ("resmlp_12_224", {"img_size": 64}),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "EfficientNet": ("test_efficientnet", {}),
    "TNT": ("tnt_s_legacy_patch16_224", _SMALL),
    "PVTv2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "StarNet": ("starnet_s050", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
    "InceptionNeXt": ("inception_next_atto", {}),
    "RegNet": ("regnetx_002", {}),
    "XCiT": ("xcit_nano_12_p16_224", _SMALL),
    "CaiT": ("cait_xxs24_224", _SMALL),
    "ResNet": ("test_resnet", {}),
    "DaViT": ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)}),
    "ByoBNet": ("test_byobnet", {}),
}


def _make(family: str) -> nn.Module:
    name, arguments = MODELS[family]
    return timm.create_model(name, num_classes=7, **arguments)


@pytest.mark.parametrize("family", MODELS)
def test_class_plan_and_state_dict_are_the_pruned_model(family: str, tmp_path: Path) -> None:
    # Layer scales of 1e-6 would hide every block.
    model = randomize(_make(family)).eval()
    side = MODELS[family][1].get("img_size", 64)
    images = torch.randn(2, 3, side, side)
    plan = vbpfx.prune(model, [images], ratio=0.5, verify=False, progress=False).plan
    small = vbpfx.apply_plan(model, plan)
    write_atomically(plan_files(plan, tmp_path))
    fresh = _make(family).eval()
    again = vbpfx.apply_plan(fresh, load_plan(tmp_path))
    assert type(again) is type(model)
    with torch.no_grad():
        expected = small(images)
        # The constructor made other weights, so equal outputs below come from the state_dict.
        assert not torch.equal(fresh(images), model(images))
        assert not torch.equal(again(images), expected)
        again.load_state_dict(small.state_dict(), strict=True)
        # The same kernels run on the same numbers.
        assert torch.equal(again(images), expected)
        assert not torch.equal(model(images), expected)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_list_has_a_norm_that_carries_constants() -> None:
    """Those constants are only in the plan, so at least one family must need them."""
    model = _make("InceptionNeXt").eval()
    pruned = vbpfx.prune(model, [torch.randn(2, 3, 64, 64)], ratio=0.5, allocation="equal", progress=False)
    small = pruned.apply_to(model)
    assert any(isinstance(module, CarriedNorm) for module in small.modules())


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.RMSNorm(24)], ids=["layer norm", "rms norm"])
def test_a_norm_that_carries_constants_is_exported_and_narrowed_again(norm: nn.Module, tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), norm, nn.Linear(24, 4))).eval()
    data, other = torch.randn(64, 8), torch.randn(5, 8)
    own = vbpfx.prune(model, [data], ratio=0.3, progress=False).apply_to(model).eval()
    assert any(isinstance(module, CarriedNorm) for module in own.modules())
    samples = torch.export.Dim("samples")
    exported = torch.export.export(own, (data,), dynamic_shapes=({0: samples},)).module()
    with torch.no_grad():
        assert torch.equal(exported(other), own(other))
        program = torch.onnx.export(own, (data,), dynamic_shapes=({0: samples},), dynamo=True, verbose=False)
        assert program is not None
        program.save(tmp_path / "own.onnx")
        session = ort.InferenceSession(tmp_path / "own.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), own(other), rtol=1e-4, atol=1e-5)  # other kernels
    own = own.double()
    again = vbpfx.prune(own, [data.double()], ratio=0.3, progress=False)
    assert list(again.plan.widths.values()) == [17 - 5]
    verified = vbpfx.verify(again.captured, again.graph_module, again.plan, other.double(), tolerance=1e-9)
    assert verified.effect > 1e-3


class _Config:
    """A configuration in the style of Hugging Face, with one entry for all layers of a tower."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class _Configured(nn.Module):
    """Two consecutive towers of MLPs, one with a configured width and one with a ratio; the class counts its instances."""

    built = 0

    def __init__(self, config: Any) -> None:
        super().__init__()
        type(self).built += 1
        self.config = config
        assert config.dim % config.heads == 0
        widths = (config.first_dim, int(config.ratio * config.dim * 2))
        streams = (config.dim, 2 * config.dim)
        towers = [
            nn.ModuleList(_mlp(stream, width) for _ in range(config.depth))
            for stream, width in zip(streams, widths, strict=True)
        ]
        self.first, self.second = towers
        self.between = nn.Linear(*streams)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = x + layer(x)
        x = self.between(x)
        for layer in self.second:
            x = x + layer(x)
        return x

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


def _mlp(stream: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(stream, width), nn.GELU(), nn.Linear(width, stream))


def _configured(depth: int) -> _Configured:
    entries = {"dim": 8, "first_dim": 48, "ratio": 3.0, "depth": depth, "heads": 4, "dropout": 0.1, "name": "x"}
    model = randomize(_Configured(_Config(**entries))).eval()
    with torch.no_grad():
        for layer in model.first:
            layer[0].weight.mul_(0.5)  # makes the two towers differ
    return model


def test_entries_of_two_towers_of_one_width_are_told_apart() -> None:
    model = _configured(3)
    plan = vbpfx.prune(
        model, [torch.randn(64, 8)], ratio=0.5, uniform=True, method="vbp", exclude="between", progress=False
    ).plan
    widths = {name.split(".")[0]: width for name, width in plan.widths.items()}
    assert len(plan.widths) == 6
    assert widths["first"] != widths["second"]
    small = vbpfx.apply_plan(model, plan)
    assert small.config.first_dim == widths["first"]
    again = _Configured(small.config)
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in small.state_dict().items()}
    assert again.second[0][0].out_features == widths["second"]
    assert model.config.to_dict() == _configured(3).config.to_dict()


@pytest.mark.parametrize("depth", [3, 12])
def test_how_often_the_class_is_built_does_not_depend_on_the_number_of_layers(depth: int) -> None:
    """No entry describes layers of different widths, which is found without trying every width."""
    model = _configured(depth)
    plan = vbpfx.prune(model, [torch.randn(64, 8)], ratio=0.5, method="vbp", exclude="between", progress=False).plan
    assert len(set(plan.widths.values())) >= depth
    _Configured.built = 0
    small = vbpfx.apply_plan(model, plan)
    numbers = 5  # number of entries above one
    assert 0 < _Configured.built <= 1 + 3 * numbers
    assert small.config.to_dict() == model.config.to_dict()
    first = next(entry for entry in plan.blocks if "first.0.0.weight" in {p.name for p in entry.block.parameters})
    assert small.first[0][0].out_features == len(first.kept) < 48


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.InstanceNorm1d])
def test_a_norm_without_parameters_has_the_narrowed_number_of_channels(norm: type[nn.Module], frontend: str) -> None:
    """With the number of the dense network, PyTorch warns at every call."""
    convolution, size = (nn.Conv2d, (6, 5)) if norm is nn.InstanceNorm2d else (nn.Conv1d, (9,))
    model = nn.Sequential(convolution(3, 12, 1), norm(12), nn.ReLU(), convolution(12, 4, 1)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pruned = vbpfx.prune(model, [x], ratio=0.5, round_to=1, frontend=frontend, progress=False)
    (entry,) = pruned.plan.blocks
    own = pruned.apply_to(model)
    norms = [layer for network in (own, pruned.graph_module) for layer in network.modules() if type(layer) is norm]
    assert [layer.num_features for layer in norms] == [entry.width] * (2 if frontend == "symbolic" else 1)
    assert model[1].num_features == 12
    torch.testing.assert_close(own(x), pruned.graph_module(x), rtol=1e-12, atol=1e-12)
