"""Channels that are shuffled are refused by the name of the shuffle; cells of pixels are narrowed together.

What is expected is computed here from the weights, with the removed channels replaced by hand.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from oracle import double, randomize, stages
from random_convolutions import SHUFFLES
from torch import Tensor, nn
from zoo import Net

import vbpfx

SHUFFLED = {
    "view, transpose, reshape": "view, transpose and reshape shuffle its channels",
    "unflatten, permute, flatten": "unflatten, permute and flatten shuffle its channels",
    "chunk, stack, flatten": "flatten counts groups of channels along it",
    "F.channel_shuffle": "channel_shuffle shuffles its channels",
    "nn.ChannelShuffle": "shuffles its channels",
}


def pictures() -> Tensor:
    return torch.randn(3, 6, 5, 7, dtype=torch.float64)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", SHUFFLES)
def test_a_shuffle_between_grouped_convolutions_is_refused_by_its_name(name: str, frontend: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(m.b(m.shuffle(m.a(x).relu()).relu()))

    network = Net(
        forward,
        a=nn.Conv2d(6, 12, 1, groups=3),
        shuffle=SHUFFLES[name](3, 2),
        b=nn.Conv2d(12, 8, 3, padding=1, groups=4),
        c=nn.Conv2d(8, 4, 1),
    )
    captured = vbpfx.capture(double(network), pictures(), frontend=frontend)
    analysis = vbpfx.find_blocks(captured)
    assert [block.producers for block in analysis.blocks] == [("b.weight",)]
    (reason,) = (refusal.reason for refusal in analysis.refusals if "a.weight" in refusal.producers)
    assert SHUFFLED[name] in reason


@pytest.mark.parametrize("groups", [7, 1])
def test_channels_that_a_view_divides_by_their_number_or_by_one_are_narrowed(groups: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        samples, channels, height, width = h.shape
        h = h.view(samples, groups, channels // groups, height, width).transpose(1, 2)
        return m.b(h.reshape(samples, channels, height, width))

    s = stages(double(Net(forward, a=nn.Conv2d(6, 7, 1), b=nn.Conv2d(7, 4, 1))), pictures(), ratio=0.7)
    assert s.plan.widths == {"a->b": 2}
    assert vbpfx.verify(s.captured, s.small, s.plan).error < 1e-12


def test_heads_that_are_moved_to_the_samples_are_not_called_a_shuffle() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        heads = m.a(x).unflatten(-1, (3, 4)).transpose(1, 2).flatten(0, 1).softmax(-1)
        return m.b(heads.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2))

    network = Net(forward, a=nn.Linear(8, 12), b=nn.Linear(12, 8))
    analysis = vbpfx.find_blocks(vbpfx.capture(network, torch.randn(3, 5, 8)))
    assert [r.reason for r in analysis.refusals if "a.weight" in r.producers] == ["softmax mixes the channels along it"]


def _into_pixels(m: nn.Module, x: Tensor) -> Tensor:
    return m.second(F.pixel_shuffle(m.norm(m.first(x)).relu(), 2))


def _from_pixels(m: nn.Module, x: Tensor) -> Tensor:
    return m.second(F.pixel_unshuffle(m.norm(m.first(F.pad(x, (0, 1, 0, 1)))).relu(), 2))


def _of_modules(m: nn.Module, x: Tensor) -> Tensor:
    return m.second(m.down(m.up(m.norm(m.first(x)).relu()).tanh()))


NETWORKS = {
    "four channels make the cells of a pixel": (
        lambda: Net(
            _into_pixels, first=nn.Conv2d(6, 20, 3), norm=nn.BatchNorm2d(20), second=nn.Conv2d(5, 4, 3, padding=1)
        ),
        5,
    ),
    "the cells of a pixel are four channels": (
        lambda: Net(
            _from_pixels, first=nn.Conv2d(6, 6, 1), norm=nn.BatchNorm2d(6), second=nn.Conv2d(24, 4, 3, padding=1)
        ),
        6,
    ),
    "there and back": (
        lambda: Net(
            _of_modules,
            first=nn.Conv2d(6, 20, 3),
            norm=nn.BatchNorm2d(20),
            up=nn.PixelShuffle(2),
            down=nn.PixelUnshuffle(2),
            second=nn.Conv2d(20, 4, 3, padding=1),
        ),
        5,
    ),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("method", ["vbp", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_cells_are_narrowed_together(name: str, method: str, frontend: str) -> None:
    make, width = NETWORKS[name]
    model = double(randomize(make()))
    result = stages(model, pictures(), frontend=frontend, ratio=0.5, method=method, round_to=1)
    (block,) = result.analysis.blocks
    assert block.width == width
    other = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    for network in (result.small, vbpfx.apply_plan(model, result.plan)):
        assert vbpfx.verify(result.captured, network, result.plan, other, tolerance=1e-9).effect > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_cells_are_saved_and_exported(name: str, tmp_path: Path) -> None:
    model, x = randomize(NETWORKS[name][0]()).eval(), pictures().float()
    pruned = vbpfx.prune(model, [x], ratio=0.5, round_to=1, progress=False)
    pruned.save(tmp_path / "network", onnx=True)
    loaded = vbpfx.load(tmp_path / "network")
    with torch.no_grad():
        expected = pruned.graph_module(x)
        assert torch.equal(loaded(x), expected)
    (file,) = (tmp_path / "network").glob("*.onnx")
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_channel_of_cells_by_hand() -> None:
    model = double(randomize(NETWORKS["four channels make the cells of a pixel"][0]()))
    nn.init.constant_(model.norm.bias, 4.0)  # the neurons hardly vary beside their means
    nn.init.constant_(model.norm.weight, 0.1)
    result = stages(model, pictures(), frontend="symbolic", ratio=0.5, method="vbp")
    (entry,) = result.plan.blocks
    assert entry.constants_in
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        h = F.pixel_shuffle(model.norm(model.first(x)).relu(), 2)
        h[:, list(entry.pruned)] = entry.constants[0][:, None, None]
        torch.testing.assert_close(result.small(x), model.second(h), rtol=1e-9, atol=1e-9)
