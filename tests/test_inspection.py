"""inspect: kinds of blocks by structure, shares and steps against independent counts, and the drawing as XML."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import vbpfx
from vbpfx.analysis.blocks import Analysis, find_blocks
from vbpfx.cli import app
from vbpfx.graph.capture import capture
from vbpfx.inspection.channel_graph import channel_graph
from vbpfx.inspection.kinds import calls, kinds
from vbpfx.inspection.summary import RATIOS, inspect_model
from vbpfx.models.names import load_model, typical_inputs

MLP = "cli_networks:mlp"
SHAPE = (3, 8, 8)


def _found(model: nn.Module, *shape: int) -> Analysis:
    return find_blocks(capture(model, torch.randn(2, *shape)))


class Glu(nn.Module):
    """x + W3 (W1 x * act(W2 x)), with separate layers or with a packed one."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.first, self.second, self.third = nn.Linear(8, 32 if packed else 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.first(x).chunk(2, -1) if self.packed else (self.first(x), self.second(x))
        return x + self.third(h * F.silu(gate))


class Swish(nn.Module):
    """x sigmoid(x) written out, which is a product but not a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h * torch.sigmoid(h))


class Mixer(nn.Module):
    """A patch embedding, then one block over tokens and one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.tokens = nn.Sequential(nn.Linear(4, 20), nn.GELU(), nn.Linear(20, 4))
        self.channels = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


class Inverted(nn.Module):
    """1x1 convolution, depthwise 3x3, squeeze-and-excite, 1x1."""

    def __init__(self, excited: bool) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.down, self.excited = nn.Conv2d(16, 8, 1), excited

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.depthwise(F.relu(self.up(x)))
        if self.excited:
            h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return x + self.down(h)


def _with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (_plain(), (5, 8), {"MLP"}),
        (_with_norm(), (8,), {"MLP, a norm between"}),
        (Glu(packed=True), (8,), {"gated MLP"}),
        (Glu(packed=False), (8,), {"gated MLP"}),
        (Swish(), (8,), {"MLP"}),
        (Mixer(), (3, 8, 8), {"token-mixing MLP", "MLP"}),
        (_convolution(), (3, 8, 8), {"convolution"}),
        (Inverted(excited=False), (3, 8, 8), {"inverted bottleneck"}),
        (Inverted(excited=True), (3, 8, 8), {"inverted bottleneck, squeeze-and-excite", "MLP"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds_go_by_structure(model: nn.Module, shape: tuple[int, ...], expected: set[str]) -> None:
    assert set(kinds(_found(model, *shape)).values()) == expected


def test_the_token_mixing_block_is_the_one_over_tokens() -> None:
    assert kinds(_found(Mixer(), 3, 8, 8)) == {"tokens": "token-mixing MLP", "channels": "MLP"}


def test_shares_are_those_of_the_layers() -> None:
    found = inspect_model(MLP, shape=SHAPE)
    first, second = found.blocks
    # 192 -> 32 -> 16 -> 5
    assert (found.macs, found.params) == (192 * 32 + 32 * 16 + 16 * 5, 193 * 32 + 33 * 16 + 17 * 5)
    assert (first.macs, first.params) == (192 * 32 + 32 * 16, 193 * 32 + 32 * 16)
    assert (second.macs, second.params) == (32 * 16 + 16 * 5, 33 * 16 + 16 * 5)
    assert (first.calls, second.calls) == (1, 1)
    assert [refusal.reason for refusal in found.refusals] == ["it reaches the output of the model"]


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    analysis = _found(Twice(), 8)
    assert [calls(block, analysis) for block in analysis.blocks] == [2]


def test_the_sample_that_macs_are_of_is_said() -> None:
    """MACs of a convolution depend on the image size, which a name such as torchvision's inception does not tell."""
    found = inspect_model("timm:test_vit", shape=(3, 160, 160))
    assert str(found).splitlines()[0].endswith("MACs per sample (3x160x160)")
    assert found.to_json()["sample"] == found.sample == "3x160x160"


def test_data_say_what_no_shape_describes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", tokens=np.zeros((4, 6), np.int64), scale=np.ones((4, 1), np.float32))
    found = inspect_model("cli_networks:two", data=tmp_path / "data.npz")
    assert [(block.name, block.width) for block in found.blocks] == [("head", 16)]
    command = ["inspect", "cli_networks:two", "--data", str(tmp_path / "data.npz"), "--json"]
    assert json.loads(CliRunner().invoke(app, command).stdout) == json.loads(json.dumps(found.to_json()))


def test_modules_are_imported_with_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is made on the meta device, but tensors of its Python module must be real, as others may use them."""
    (tmp_path / "with_numbers.py").write_text(
        "import torch\nscale = torch.ones(3)\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    inspect_model("with_numbers:build", shape=(3,))
    assert not sys.modules["with_numbers"].scale.is_meta


def test_steps_are_what_pruning_gives() -> None:
    found = inspect_model(MLP, shape=SHAPE)
    assert [step.ratio for step in found.steps] == list(RATIOS)
    model = load_model(MLP)
    for step in found.steps[::4]:
        pruned = vbpfx.prune(
            model, [torch.randn(8, *SHAPE)], ratio=step.ratio, method="vbp", allocation="equal", progress=False
        )
        assert (pruned.report.neurons[1], pruned.report.params[1], pruned.report.macs[1]) == (
            step.neurons, step.params, step.macs,
        )  # fmt: skip


def test_ratios_that_the_floors_forbid_are_left_out_and_said() -> None:
    found = inspect_model(MLP, shape=SHAPE, min_width=12)
    assert [step.ratio for step in found.steps] == [0.1, 0.2, 0.3, 0.4, 0.5]  # at least 24 of 48 neurons are kept
    assert "ratio=0.6 and more: the floors (min_width) forbid it" in str(found)


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:test_convnext", "timm:test_efficientnet", "torchvision:mobilenet_v3_small"]
)
def test_a_model_without_numbers_says_the_same(name: str) -> None:
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        if not timm.is_model(name.removeprefix("timm:")):
            pytest.skip(f"this timm has no {name}")
    real = load_model(name)
    analysis = find_blocks(capture(real, typical_inputs(real)))
    found = inspect_model(name)
    assert all(parameter.is_meta for parameter in found.analysis.captured.reference.parameters())
    assert found.analysis.blocks == analysis.blocks
    assert found.analysis.refusals == analysis.refusals
    assert found.macs == sum(analysis.captured.macs.values())
    assert found.params == sum(parameter.numel() for parameter in real.parameters())


def test_a_hugging_face_folder_needs_no_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)  # only config.json; the third block is the pooler, which the classifier reads
    found = inspect_model(f"hf:{tmp_path}")
    of_attention = [("queries and keys, 2 heads", 16), ("values of attention, 2 heads", 16)]
    layer = [*of_attention, ("MLP", 24)]
    assert [(block.kind, block.width) for block in found.blocks] == [*layer, *layer, ("MLP", 16)]
    assert found.neurons == 24 + 24 + 16, "attention is not narrowed by default"
    assert found.params == sum(p.numel() for p in transformers.BertForSequenceClassification(config).parameters())


def test_the_drawing_holds_every_call_once_and_in_order() -> None:
    drawn = channel_graph(_found(Glu(packed=True), 8), _found(Glu(packed=True), 8).blocks[0].name)
    svg = ElementTree.fromstring(drawn)
    space = {"s": "http://www.w3.org/2000/svg"}
    boxes = {
        text.text: float(text.get("y")) for text in svg.findall("s:text", space) if text.get("font-weight") == "bold"
    }
    title, *names = boxes
    assert title == "first->third: 16 hidden channels"
    assert set(names) == {"first", "chunk", "getitem", "getitem_1", "silu", "mul", "third"}
    for above, below in [
        ("first", "chunk"),
        ("chunk", "getitem"),
        ("getitem_1", "silu"),
        ("silu", "mul"),
        ("mul", "third"),
    ]:
        assert boxes[above] < boxes[below]
    arrows = [path for path in svg.findall("s:path", space) if path.get("marker-end")]
    assert len(arrows) == 7  # first-chunk, chunk-getitem twice, getitem-mul, getitem_1-silu, silu-mul, mul-third


def test_the_command_prints_tables_or_json_and_draws(tmp_path: Path) -> None:
    line = ["inspect", MLP, "--shape", "3x8x8"]
    shown = CliRunner().invoke(app, [*line, "--block", "1->3", "--graph", str(tmp_path / "block.svg")])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == str(inspect_model(MLP, shape=SHAPE))
    assert ElementTree.parse(tmp_path / "block.svg").getroot().tag.endswith("svg")
    figures = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert [block["name"] for block in figures["blocks"]] == ["1->3", "3->5"]
    assert figures["refusals"][0]["reason"] == "it reaches the output of the model"
    assert figures["steps"][4]["ratio"] == 0.5
