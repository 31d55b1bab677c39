"""Hugging Face folders, with shards and other precisions, are pruned without loading the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import ArtifactError
from vbpfx.storage.tensors import Stored

transformers = pytest.importorskip("transformers")

KIB = 2**-20  # one KiB in GiB, the unit of memory=
SIZES = {"vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def _llama(**further: Any) -> nn.Module:
    config = transformers.LlamaConfig(intermediate_size=72, num_key_value_heads=2, **SIZES, **further)
    return randomize(transformers.LlamaForCausalLM(config)).eval()


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=72, vocab_size=99, n_positions=16)
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


def _mistral() -> nn.Module:
    config = transformers.MistralConfig(intermediate_size=72, num_key_value_heads=2, **SIZES)
    return randomize(transformers.MistralForCausalLM(config)).eval()


def _batches() -> list[dict[str, Tensor]]:
    """Return batches of texts of unequal length: one is padded, and one is longer than the others."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((4, 7), (3, 7), (2, 12))
    ids = [torch.randint(0, 99, size, generator=generator) for size in sizes]
    masks = [torch.ones_like(batch) for batch in ids]
    masks[1][0, 4:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def _saved(model: nn.Module, folder: Path, size: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text('{"words": 3}')
    model.config.use_cache = False  # the cache is not part of a single forward pass in memory
    return folder


def _expected(model: nn.Module, **options: Any) -> vbpfx.Pruned:
    return vbpfx.prune(model, _batches(), ratio=0.3, method="vbp", progress=False, **options)


@pytest.mark.parametrize(
    ("make", "size"), [(_llama, "20KB"), (lambda: _llama(tie_word_embeddings=True), "20KB"), (_gpt2, "1GB")],
    ids=["Llama", "Llama tied", "GPT-2 tied, one file"],
)  # fmt: skip
def test_hugging_face_loads_what_was_pruned(make: Any, size: str, tmp_path: Path) -> None:
    model, batches = make(), _batches()
    folder, out = _saved(model, tmp_path / "dense", size), tmp_path / "pruned"
    expected = _expected(model, uniform=True)
    result = vbpfx.prune_files(folder, batches, out, ratio=0.3, uniform=True, memory=60 * KIB, progress=False)
    assert [e.kept for e in result.plan.blocks] == [e.kept for e in expected.plan.blocks]
    assert result.hugging_face
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    own = expected.apply_to(model)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in own.state_dict().items())
    with torch.no_grad():
        for batch in batches:
            logits = expected.graph_module(**batch).logits
            assert torch.equal(loaded(**batch).logits, logits)
            assert torch.equal(vbpfx.load(out)(**batch).logits, logits)
            assert not torch.equal(model(**batch).logits, logits)
    dense, narrow = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    changed = {key for key in dense | narrow if dense.get(key) != narrow.get(key)}
    assert changed <= {"intermediate_size", "n_inner", "mlp_bias"}
    assert (out / "tokenizer.json").read_text() == '{"words": 3}'
    assert len(list(out.glob("model*.safetensors"))) > 1
    assert {path.name for path in out.glob("model*.safetensors")} == {
        path.name for path in Stored.of(out).files.values()
    }


def test_bfloat16_is_computed_in_float32_and_written_in_bfloat16(tmp_path: Path) -> None:
    model = _llama().bfloat16()
    folder, out = _saved(model, tmp_path / "dense"), tmp_path / "pruned"
    expected = _expected(model.float(), uniform=True)
    result = vbpfx.prune_files(folder, _batches(), out, ratio=0.3, uniform=True, memory=60 * KIB, progress=False)
    assert [e.kept for e in result.plan.blocks] == [e.kept for e in expected.plan.blocks]
    stored = Stored.of(out)
    assert {shape.dtype for shape in stored.shapes.values()} == {torch.bfloat16}
    for name, tensor in expected.apply_to(model.float()).state_dict().items():
        # Weights without a fold keep their bits. A fold is rounded once here and twice in memory, so they can differ by one
        # unit of bfloat16.
        torch.testing.assert_close(stored.read(name).float(), tensor, rtol=2**-7 if "bias" in name else 0, atol=0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    batch = _batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(
            vbpfx.load(out)(**batch).logits, loaded.float()(**batch).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("ratio", "stays"), [(0.3, True), (0.5, False)])
def test_a_configuration_goes_where_other_widths_are_saved_over_it(ratio: float, stays: bool, tmp_path: Path) -> None:
    model, out = _llama(), tmp_path / "pruned"
    folder, options = _saved(model, tmp_path / "dense"), {"uniform": True, "progress": False}
    vbpfx.prune_files(folder, _batches(), out, ratio=0.3, **options)
    assert (out / "config.json").exists()
    other = vbpfx.prune(model, _batches(), ratio=ratio, method="vbp", **options)
    other.save(out)
    assert (out / "config.json").exists() == stays
    batch = _batches()[0]
    with torch.no_grad():
        expected = other.graph_module(**batch).logits
        assert torch.equal(vbpfx.load(out)(**batch).logits, expected)
        if stays:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_saved_over_a_model_of_hugging_face(tmp_path: Path) -> None:
    model = _llama()
    folder = _saved(model, tmp_path / "dense")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pruned = vbpfx.prune(model, _batches(), ratio=0.3, method="vbp", progress=False)
    with pytest.raises(ArtifactError, match=r"config.json and no plan.json.*choose another folder"):
        pruned.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_class_without_a_place_for_the_fold(tmp_path: Path) -> None:
    """Mistral's configuration has no biases, so the fold needs the graph or must be left out."""
    folder, batches = _saved(_mistral(), tmp_path / "dense"), _batches()
    common: dict[str, Any] = {"ratio": 0.3, "uniform": True, "progress": False}
    with pytest.raises(ArtifactError, match=r"cannot describe .*down_proj.bias.*compensation='none'"):
        vbpfx.prune_files(folder, batches, tmp_path / "out", **common)
    assert not (tmp_path / "out").exists()
    assert vbpfx.prune_files(folder, batches, tmp_path / "out", compensation="none", **common).hugging_face
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_widths_that_differ_are_for_the_graph_alone(tmp_path: Path) -> None:
    model = _llama()
    folder, out = _saved(model, tmp_path / "dense"), tmp_path / "out"
    result = vbpfx.prune_files(folder, _batches(), out, ratio=0.3, progress=False)
    assert len(set(result.plan.widths.values())) > 1
    assert not result.hugging_face
    assert not (out / "config.json").exists()
    batch = _batches()[0]
    with torch.no_grad():
        assert torch.equal(vbpfx.load(out)(**batch).logits, _expected(model).graph_module(**batch).logits)


def test_folders_that_no_model_can_be_built_from(tmp_path: Path) -> None:
    with pytest.raises(vbpfx.ModelError, match=r"is not a folder of Hugging Face: there is no .*config.json"):
        vbpfx.prune_files(tmp_path, _batches(), tmp_path / "out", ratio=0.3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(vbpfx.ModelError, match=r"transformers cannot build a model from .*config.json"):
        vbpfx.prune_files(tmp_path, _batches(), tmp_path / "out", ratio=0.3)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["Nothing"]}')
    with pytest.raises(vbpfx.ModelError, match="names no architecture"):
        vbpfx.prune_files(tmp_path, _batches(), tmp_path / "out", ratio=0.3)
