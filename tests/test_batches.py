"""Batches whose entries may be labels, options or a single object, and the messages about them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import double
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Labelled, as_inputs
from vbpfx.errors import CalibrationError, CaptureError


class Conditioned(nn.Module):
    def __init__(self, outputs: int = 8) -> None:
        super().__init__()
        self.classes = nn.Embedding(10, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, outputs))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None:
            x = x + (y if y.is_floating_point() else 3 * self.classes(y))
        return self.mlp(x)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def prune(model: nn.Module, data: Any, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(model, data, ratio=0.5, method="vbp", progress=False, **options)


def mean_of_hidden(pruned: vbpfx.Pruned) -> Tensor:
    return pruned.statistics.moments["mlp"][0].mean


def test_integers_that_may_be_labels_are_left_out_and_said() -> None:
    torch.manual_seed(0)
    model = double(Conditioned())
    x, y = randn(16, 8), torch.randint(0, 10, (16,))
    with pytest.warns(
        UserWarning,
        match=r"one integer per sample, is taken for labels and not passed to the model, although forward has an argument y",
    ):
        pruned = prune(model, [(x, y)])
    torch.testing.assert_close(mean_of_hidden(pruned), model.mlp[:2](x).mean(0).detach())
    with pytest.raises(
        AssertionError, match=r"argument y was None when the network was captured.*with the other value"
    ):
        nn.Module.__call__(pruned.graph_module, x, y)


def test_they_are_an_input_where_that_is_said() -> None:
    torch.manual_seed(0)
    model = double(Conditioned())
    x, y = randn(16, 8), torch.randint(0, 10, (16,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_name = prune(model, [{"x": x, "y": y}])
        by_function = prune(model, [(x, y)], inputs=lambda batch: (tuple(batch), {}))
    expected = model.mlp[:2](x + 3 * model.classes(y)).mean(0).detach()
    for pruned in (by_name, by_function):
        torch.testing.assert_close(mean_of_hidden(pruned), expected)


def test_numbers_that_may_be_targets_are_passed_on_and_said() -> None:
    torch.manual_seed(0)
    model = double(Conditioned(1))
    x, target = randn(16, 8), 50 + randn(16, 1)
    with pytest.warns(
        UserWarning, match=r"passed to forward as its optional argument y; if it is a target.*batch\[0\],"
    ):
        found = as_inputs((x, target), model)
    assert len(found.args) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(model, [(x, target)], inputs=lambda batch: ((batch[0],), {}))
        assert len(as_inputs((x, randn(8)), model).args) == 2  # the second entry does not have one value per sample
        assert len(as_inputs((x, target), nn.Linear(8, 1)).args) == 1  # forward takes one argument
    torch.testing.assert_close(mean_of_hidden(pruned), model.mlp[:2](x).mean(0).detach())


def test_labels_of_our_own_data_are_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_inputs(Labelled(randn(4, 8), torch.zeros(4, dtype=torch.long)), Conditioned())
    assert len(found.args) == 1


def test_an_option_that_only_later_batches_pass_is_an_error() -> None:
    torch.manual_seed(0)
    model = double(Conditioned())
    later = {"x": randn(6, 8), "y": torch.randint(0, 10, (6,))}
    with pytest.raises(CalibrationError, match=r"batch 2 .*argument y was None when the network was captured"):
        prune(model, [{"x": randn(6, 8)}, later])


def test_keys_that_are_no_arguments_are_named() -> None:
    batch = {"image": torch.randn(16, 8), "label": torch.zeros(16)}
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(CaptureError) as error:
        prune(model, [batch])
    for part in ("keys image, label", "forward takes input", "inputs=lambda batch: ((batch['image'],), {})"):
        assert part in str(error.value)
    assert "symbolic:" not in str(error.value)


def test_a_dictionary_that_is_one_argument_is_taken() -> None:
    class Takes(Conditioned):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return self.mlp(batch["image"])

    assert prune(double(Takes()), [{"image": randn(6, 8), "label": torch.zeros(6)}]).plan.widths == {"mlp": 24}


def test_attributes_of_an_object_are_named() -> None:
    @dataclass
    class Data:
        x: Tensor
        edge_index: Tensor

    class Graphs(Conditioned):
        def forward(self, data: Data) -> Tensor:  # type: ignore[override]
            return self.mlp(data.x)

    batch = Data(torch.randn(9, 8), torch.randint(0, 9, (2, 20)))
    with pytest.raises(
        CaptureError, match=r"a Data, an object.*attributes x, edge_index.*takes data.*\(\(batch.x, batch.edge_index\),"
    ):
        prune(Graphs(), [batch])
