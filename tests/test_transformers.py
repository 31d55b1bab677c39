"""Hugging Face models: their MLPs are found, and uniformly pruned models can be saved and loaded by Hugging Face."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.errors import ArtifactError

pytest.importorskip("transformers")
from transformer_models import TRANSFORMERS
from transformers.integrations.executorch import register_dynamic_cache_export_support

# Hidden width of MLPs -> number of such MLPs, from the configurations in benchmarks/transformer_models.py.
MLPS: dict[str, dict[int, int]] = {
    **{
        name: {72: 2}
        for name in (
            "ViT", "DeiT", "BEiT", "DINOv3", "BERT", "RoBERTa", "DistilBERT", "ELECTRA", "DeBERTa-v2", "GPT-2", "OPT",
            "Falcon", "GPT-NeoX", "Llama", "Mistral", "Qwen3", "Gemma", "Phi-3", "Wav2Vec2",
        )
    },
    "DINOv2": {96: 2},  # three times 32
    "DINOv2 SwiGLU": {64: 2},  # two thirds of 96
    "Swin": {48: 1, 96: 2},
    "Swinv2": {48: 1, 96: 2},  # the MLPs for position biases read no data
    "ConvNeXt": {64: 1, 96: 2},
    "ConvNeXtV2": {64: 1, 96: 2},
    "SegFormer": {48: 1, 72: 2},
    "PVTv2": {48: 1, 72: 2},
    "Hiera": {48: 1, 96: 2},
    "MobileViT": {60: 4, 72: 3},  # three times the width of every transformer
    "CLIP": {72: 2, 80: 2},
    "SigLIP": {72: 2, 80: 3},  # the head of the vision tower has one, too
    "ALBERT": {72: 1},  # one layer, called twice
    "ModernBERT": {72: 3},
    "T5 gated": {72: 4},
    "BART": {72: 2, 80: 2},
    "BLOOM": {128: 2},
    "Mixtral": {360: 2},  # five experts
    "Qwen3-MoE": {200: 2},
    "Whisper": {72: 2, 80: 2},
}  # fmt: skip

# Other hidden axes between two layers: width -> number.
OTHERS: dict[str, dict[int, int]] = {
    "BERT": {32: 1}, "RoBERTa": {32: 1}, "DistilBERT": {32: 1}, "ELECTRA": {32: 1}, "ALBERT": {32: 1},
    "DeBERTa-v2": {32: 1},  # the pooler, read by the classifier
    "Wav2Vec2": {24: 2},  # the convolutions in front
    "Whisper": {32: 1},  # between the convolutions in front
    "SegFormer": {16: 1, 20: 3},  # the reduction of keys and values, and the decoder
}  # fmt: skip


def _assert_blocks(name: str, analysis: vbpfx.Analysis, model: nn.Module) -> None:
    found = Counter(block.width for block in analysis.usual)
    for width, count in MLPS[name].items():
        assert found[width] == count, f"{count} MLPs of width {width}"
    # Every layer of the model that reads an MLP's width is the second layer of an MLP.
    second = {c.weight.rpartition(".")[0] for b in analysis.usual if b.width in MLPS[name] for c in b.consumers}
    assert second == {n for n, module in model.named_modules() if _reads(module) in MLPS[name]}
    if name != "MobileViT":  # a convolutional network between its transformers
        assert found - Counter(MLPS[name]) == Counter(OTHERS.get(name, {}))


def _reads(module: nn.Module) -> int:
    """Return the number of input channels of a layer, or of the second layers of all experts."""
    if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):  # experts
        return module.down_proj.shape[0] * module.down_proj.shape[2]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(module, nn.Embedding):
        return 0
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]


# Pruning that the configuration can describe: compensation, and blocks to leave out.
ROUND_TRIPS: dict[str, dict[str, Any]] = {
    **{n: {} for n in ("ViT", "DeiT", "BEiT", "CLIP", "SigLIP", "GPT-2", "OPT", "Llama", "GPT-NeoX")},
    "BERT": {"exclude": "*pooler*"},
    "DistilBERT": {"exclude": "pre_classifier*"},
    "ModernBERT": {},
    "Whisper": {"exclude": "*conv*"},  # no entry for the width between them
    # no entry for biases
    **{n: {"compensation": "none"} for n in ("Mistral", "Qwen3", "Gemma", "T5 gated", "Phi-3")},
}


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**batch).to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", sorted(TRANSFORMERS.keys() - ROUND_TRIPS.keys()))
def test_the_mlps_are_found(name: str) -> None:
    model, batch = TRANSFORMERS[name]()
    _assert_blocks(name, vbpfx.find_blocks(vbpfx.capture(model, batch)), model)


CACHING = [
    "Llama",
    "Mistral",
    "Qwen3",
    "Gemma",
    "Phi-3",
    "GPT-2",
    "OPT",
    "GPT-NeoX",
    "BLOOM",
    "T5 gated",
    "BART",
    "Whisper",
]


@pytest.mark.parametrize("name", CACHING)
def test_caches_are_left_out_and_left_as_they_are(name: str) -> None:
    """Language models return keys and values by default, for generating the next token."""
    register_dynamic_cache_export_support()  # makes their tensors visible among the outputs
    model, batch = TRANSFORMERS[name]()
    _set_caches(model, True)
    assert len(model(**batch).to_tuple()) > len(_without_cache(model, batch))
    pruned = vbpfx.prune(model, [batch], ratio=0.5, method="vbp", progress=False)
    _assert_blocks(name, pruned.analysis, model)
    small = pruned.apply_to(model)
    assert all(config.use_cache for network in (model, small) for config in _cache_settings(network))
    assert len(small(**batch).to_tuple()) == len(model(**batch).to_tuple())
    evaluated = vbpfx.evaluate(model, pruned.graph_module, [batch], progress=False)
    assert evaluated.agreement is not None


def _cache_settings(model: Any) -> list[Any]:
    """Return the configurations with a cache setting; a decoder behind an encoder has its own."""
    return [model.config, *([model.get_decoder().config] if model.config.is_encoder_decoder else [])]


def _set_caches(model: nn.Module, on: bool) -> None:
    for config in _cache_settings(model):
        config.use_cache = on


def _without_cache(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    copied = copy.deepcopy(model)
    _set_caches(copied, False)
    return list(copied(**batch).to_tuple())


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_saved_and_loaded_by_hugging_face(name: str, tmp_path: Path) -> None:
    model, batch = TRANSFORMERS[name]()
    config, dense = copy.deepcopy(model.config.to_dict()), _outputs(model, batch)
    pruned = vbpfx.prune(model, [batch], ratio=0.5, uniform=True, progress=False, **ROUND_TRIPS[name])
    _assert_blocks(name, pruned.analysis, model)
    assert set(MLPS[name]) <= {entry.block.width for entry in pruned.plan.blocks}
    small = pruned.apply_to(model)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    expected, found = _outputs(small, batch), _outputs(loaded, batch)
    # The same kernels run on the same numbers.
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # The function differs from that of the dense model, which is unchanged.
    assert any(not torch.equal(a, b) for a, b in zip(expected, dense, strict=True))
    assert model.config.to_dict() == config
    assert small.config.to_dict() != config
    assert all(torch.equal(a, b) for a, b in zip(_outputs(model, batch), dense, strict=True))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("ConvNeXt", "convnext.encoder.stages.0.layers.0.pwconv1.bias"),
        ("BLOOM", "transformer.h.0.mlp.dense_4h_to_h.weight"),
    ],
)
def test_widths_that_no_configuration_describes_are_refused(name: str, parameter: str) -> None:
    """Both classes multiply the width by four in their code."""
    model, batch = TRANSFORMERS[name]()
    pruned = vbpfx.prune(model, [batch], ratio=0.5, uniform=True, progress=False)
    with pytest.raises(ArtifactError, match=f"the configuration of {type(model).__name__} cannot .*{parameter}"):
        pruned.apply_to(model)
    # The graph needs no configuration.
    assert pruned.verification is not None
    assert pruned.plan.removed > 0


def test_every_model_is_in_the_table() -> None:
    assert TRANSFORMERS.keys() == MLPS.keys()
