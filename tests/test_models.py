"""Real architectures: the oracle for every form of the result, and the sizes that the paper published."""

from __future__ import annotations

import pytest
import timm
import torch
from exactness import SUBJECTS, measure
from published import PUBLISHED, Published, prune_published

import vbpfx


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_oracle_holds_in_every_form(name: str) -> None:
    found = measure(SUBJECTS[name])
    assert found.frontend == ("export" if "export" in name else "symbolic")
    assert found.blocks >= 3
    assert max(found.graph64, found.own64) <= 1e-9
    assert max(found.graph32, found.own32, found.onnx32) <= 1e-4
    # A comparison is meaningful only if the substitution changes more than float32 rounding does.
    assert found.effect > 100 * max(found.graph32, 1e-9)


@pytest.mark.parametrize("entry", [pytest.param(e, id=f"{e.model}-{e.ratio}") for e in PUBLISHED])
def test_published_sizes(entry: Published) -> None:
    pruned = prune_published(entry)
    assert pruned.report.neurons == (entry.neurons, entry.neurons - round(entry.ratio * entry.neurons))
    if entry.params is not None and entry.macs is not None:
        assert round(pruned.report.params[1] / 1e6, 2) == entry.params
        assert abs(pruned.report.macs[1] / 1e9 / entry.macs - 1) < 0.005


def test_the_largest_models_are_analysed_without_their_weights() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_224")
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.empty(2, 3, 224, 224, device="meta")))
    assert {block.width for block in analysis.usual} == {6144}
    assert len(analysis.usual) == 40
    assert all(parameter.is_meta for parameter in analysis.captured.graph_module.parameters())
