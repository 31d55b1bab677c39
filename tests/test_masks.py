"""Padding does not enter the statistics, which are those of the tokens that the mask keeps.

The oracle does not use the graph: forward hooks on the second MLP layers collect their inputs, the mask selects rows, and
NumPy computes mean and variance. Everything is in float64, where moments agree to 1e-10 or better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exactness import randomize
from torch import Tensor, nn

import vbpfx
from vbpfx.errors import AnalysisError, CalibrationError

SAMPLES, TOKENS, WORDS = 3, 11, 29
LENGTHS = torch.tensor([11, 8, 5])
MASK = (torch.arange(TOKENS) < LENGTHS[:, None]).long()
RTOL = 1e-10


class Layer(nn.Module):
    """Attention over the tokens that the mask keeps, and an MLP."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)
        self.merged = merged

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # Two heads, because the values of a single head would be another hidden layer.
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(2, 3)).masked_fill(mask[:, None, None] == 0, -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = self.norm(x)
        if self.merged:  # samples and tokens in one axis, as in OPT
            h = h.flatten(0, 1)
        return x + self.fc2(torch.tanh(self.fc1(h))).view(x.shape)


class Encoder(nn.Module):
    """A text encoder with two layers."""

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 4)
        self.first, self.second = Layer(merged), Layer(merged)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.second(self.first(self.words(input_ids), attention_mask), attention_mask)
        return self.head(x[:, 0])


class OtherName(Encoder):
    """A mask with an unusual name, between two other inputs."""

    def forward(self, input_ids: Tensor, keep: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, keep) * scale


class TwoTowers(nn.Module):
    """Patches and tokens have the same number, so that lengths cannot tell which values the mask covers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text = nn.Embedding(WORDS, 8), Layer(False)
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(20, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, patches: Tensor) -> Tensor:
        text = self.text(self.words(input_ids), attention_mask)
        image = self.fc2(self.fc1(patches).relu())
        return text[:, 0] @ image.mean(1).t()


class Translator(nn.Module):
    """An encoder and a decoder, each with its own mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder, self.decoder = nn.Embedding(WORDS, 8), Layer(False), Layer(False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        text = self.encoder(self.words(input_ids), attention_mask)
        return self.decoder(self.words(decoder_input_ids) + text[:, :1], decoder_attention_mask)


def _texts() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, WORDS, (SAMPLES, TOKENS)) * MASK, "attention_mask": MASK.clone()}


def _gather(
    model: nn.Module, batches: list[dict[str, Any]], frontend: str = "auto", **options: Any
) -> tuple[vbpfx.Analysis, vbpfx.Statistics]:
    captured = vbpfx.capture(model, batches[0], frontend=frontend)
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis, **options)
    with torch.no_grad():
        for batch in batches:
            observed(**batch)
    return analysis, vbpfx.statistics(observed)


def _read_by_hand(model: nn.Module, layer: str, batch: dict[str, Any]) -> np.ndarray:
    """Return the input of a layer with one row per position."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    (read,) = seen
    read = read.movedim(1, -1) if isinstance(module, nn.Conv1d) else read
    return read.reshape(-1, read.shape[-1]).numpy()


def _assert_moments(moments: Any, rows: np.ndarray) -> None:
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=RTOL, atol=RTOL * np.abs(rows).max())
    np.testing.assert_allclose(moments.variance, rows.var(0, ddof=1), rtol=RTOL)


def _assert_by_hand(
    model: nn.Module,
    analysis: vbpfx.Analysis,
    statistics: vbpfx.Statistics,
    batch: dict[str, Any],
    masks: dict[str, Tensor],
) -> None:
    """Assert that every block has the statistics computed by hand; ``masks`` maps a part of a block's name to its mask."""
    checked = set()
    for block in analysis.usual:
        (consumer,) = block.consumers
        rows = _read_by_hand(model, consumer.weight.rpartition(".")[0], batch)
        for part, mask in masks.items():
            if block.name.startswith(part):
                rows = rows[mask.flatten().bool().numpy()]
                checked.add(part)
        _assert_moments(statistics.moments[block.name][0], rows)
    assert checked == masks.keys()


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("merged", [False, True])
def test_statistics_are_those_of_the_unpadded_tokens(frontend: str, merged: bool) -> None:
    model, batch = randomize(Encoder(merged)).double().eval(), _texts()
    analysis, statistics = _gather(model, [batch], frontend)
    assert {b.name: b.width for b in analysis.usual} == {"first": 20, "second": 20}
    _assert_by_hand(model, analysis, statistics, batch, {"first": MASK, "second": MASK})


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_tower_of_the_same_length_is_not_masked(frontend: str) -> None:
    model = randomize(TwoTowers()).double().eval()
    batch = _texts() | {"patches": torch.randn(SAMPLES, TOKENS, 6).double()}
    analysis, statistics = _gather(model, [batch], frontend)
    assert len(analysis.usual) == 2
    assert statistics.moments["fc1->fc2"][0].count == SAMPLES * TOKENS
    _assert_by_hand(model, analysis, statistics, batch, {"text": MASK})


_MASKED = {
    "BERT": ("bert.encoder",),
    "GPT-2": ("transformer",),
    "OPT": ("model.decoder",),
    "T5 gated": ("encoder",),
    "CLIP": ("text_model",),
}


@pytest.mark.parametrize("name", _MASKED)
def test_hugging_face_models_are_masked_where_the_text_is(name: str) -> None:
    pytest.importorskip("transformers")
    from transformer_models import TRANSFORMERS

    model, batch = TRANSFORMERS[name]()
    model = model.double()
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    if "decoder_input_ids" in batch:  # as long as the encoder's text, whose mask must not apply here
        batch["decoder_input_ids"] = batch["input_ids"].flip(1).clamp(min=3)
    analysis, statistics = _gather(model, [batch])
    mask = batch["attention_mask"]
    _assert_by_hand(model, analysis, statistics, batch, dict.fromkeys(_MASKED[name], mask))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_decoder_has_a_mask_of_its_own(frontend: str) -> None:
    model, mask = randomize(Translator()).double().eval(), MASK.flip(0, 1)
    batch = _texts() | {"decoder_input_ids": torch.randint(1, WORDS, MASK.shape), "decoder_attention_mask": mask}
    analysis, statistics = _gather(model, [batch], frontend)
    _assert_by_hand(model, analysis, statistics, batch, {"encoder": MASK, "decoder": mask})


@pytest.mark.parametrize("name", ["T5 gated", "BART", "Whisper"])
def test_the_decoders_of_hugging_face_have_masks(name: str) -> None:
    pytest.importorskip("transformers")
    from transformer_models import TRANSFORMERS

    model, batch = TRANSFORMERS[name]()
    model = model.double()
    if "input_features" in batch:
        batch["input_features"] = batch["input_features"].double()
    mask = batch["decoder_attention_mask"] = (torch.arange(7) < torch.tensor([4, 7, 2])[:, None]).long()
    masks = {"model.decoder" if name != "T5 gated" else "decoder": mask}
    if "attention_mask" in batch:
        masks["model.encoder" if name != "T5 gated" else "encoder"] = batch["attention_mask"]
    analysis, statistics = _gather(model, [batch])
    _assert_by_hand(model, analysis, statistics, batch, masks)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = randomize(Encoder()).double().eval()
    batch = _texts()
    other = batch | {"input_ids": torch.where(MASK.bool(), batch["input_ids"], torch.randint(1, WORDS, MASK.shape))}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    plans = []
    for padded in (batch, other):
        analysis, statistics = _gather(model, [padded])
        plans.append(vbpfx.make_plan(analysis, statistics, ratio=0.5))
    for one, two in zip(plans[0].blocks, plans[1].blocks, strict=True):
        assert one.kept == two.kept
        torch.testing.assert_close(one.constants, two.constants, rtol=RTOL, atol=1e-14)
    assert plans[0].removed == 20


def test_a_mask_of_another_name_is_named() -> None:
    model = randomize(OtherName()).double().eval()
    batch = {
        "input_ids": torch.randint(1, WORDS, MASK.shape),
        "keep": MASK,
        "scale": torch.rand(SAMPLES, 1, 1).double(),
    }
    analysis, statistics = _gather(model, [batch], mask="keep")
    _assert_by_hand(model, analysis, statistics, batch, {"first": MASK, "second": MASK})
    # The mask is not found automatically, so all positions count.
    analysis, statistics = _gather(model, [batch])
    _assert_by_hand(model, analysis, statistics, batch, {})
    for wrong in ("attention_mask", "scale", ""):
        with pytest.raises(AnalysisError, match=f"mask='{wrong}'.*input_ids, keep, scale"):
            _gather(model, [batch], mask=wrong)


def test_prune_takes_the_mask_by_name() -> None:
    model = randomize(OtherName()).double().eval()
    batch = {
        "input_ids": torch.randint(1, WORDS, MASK.shape),
        "keep": MASK,
        "scale": torch.rand(SAMPLES, 1, 1).double(),
    }
    pruned = vbpfx.prune(model, [batch], ratio=0.5, mask="keep", progress=False)
    assert pruned.plan.settings["samples"] == int(LENGTHS.sum())


def test_samples_and_batches_of_nothing_but_padding() -> None:
    model, batch = randomize(Encoder()).double().eval(), _texts()
    mask = batch["attention_mask"]
    empty = batch | {"attention_mask": torch.zeros_like(mask)}
    mask[1] = 0
    analysis, statistics = _gather(model, [batch, empty, batch])
    for block in analysis.usual:
        rows = _read_by_hand(model, f"{block.name}.fc2", batch)[mask.flatten().bool().numpy()]
        assert len(rows) == 11 + 5
        _assert_moments(statistics.moments[block.name][0], np.concatenate([rows, rows]))
    with pytest.raises(CalibrationError, match="saw no data"):
        _gather(model, [empty])


# ---- tokens or padding ----------------------------------------------------------------------------------------------


class Opposite(nn.Module):
    """The same encoder under a mask whose nonzero entries are padding."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, 1 - attention_mask)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with a mask that is True at padding; with ``causal``, attention is causal."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(WORDS, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2, self.causal = nn.Linear(8, 20), nn.Linear(20, 3), causal

    def forward(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        x = self.words(input_ids)
        ahead = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if self.causal else None
        x = x + self.attention(x, x, x, key_padding_mask=pad, attn_mask=ahead, need_weights=False)[0]
        return self.fc2(self.fc1(x).relu())


class Added(Encoder):
    """A mask that is added to the scores: 0 at tokens and very negative at padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, (attention_mask == 0).long())


class Unmasked(nn.Module):
    """A network that reads a mask but mixes all tokens anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc1, self.fc2 = nn.Embedding(WORDS, 8), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) * (1 + attention_mask.unsqueeze(-1))
        x = x + x.mean(1, True)
        return self.fc2(self.fc1(x).relu())


class Alone(Unmasked):
    """A network without any mixing of tokens, so that its outputs do not show what the mask's entries mean."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.words(input_ids) * attention_mask.unsqueeze(-1)).relu())


IDS = torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS) % (WORDS - 1) + 1


def _assert_rows_of_tokens(model: nn.Module, batch: dict[str, Any], **options: Any) -> None:
    """Assert that every block has the statistics of the tokens, computed by hand."""
    analysis, statistics = _gather(model, [batch], **options)
    assert len(analysis.usual) > 0
    for block in analysis.usual:
        (consumer,) = block.consumers
        rows = _read_by_hand(model, consumer.weight.rpartition(".")[0], batch)
        _assert_moments(statistics.moments[block.name][0], rows[MASK.flatten().bool().numpy()])


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("merged", [False, True])
def test_padding_may_be_what_is_nonzero(merged: bool, frontend: str) -> None:
    model = Opposite(randomize(Encoder(merged)).double()).eval()
    _assert_rows_of_tokens(model, {"input_ids": IDS, "attention_mask": 1 - MASK}, frontend=frontend)


@pytest.mark.parametrize("mask", ["pad", ("pad", "padding")])
@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention_calls_padding_true(causal: bool, mask: Any) -> None:
    """Causal attention never sees later positions, padding or not, so only the first position shows the meaning."""
    model = randomize(Attention(causal)).double().eval()
    _assert_rows_of_tokens(model, {"input_ids": IDS, "pad": MASK == 0}, mask=mask)


def test_a_mask_that_is_added_is_zero_at_tokens() -> None:
    model = randomize(Added()).double().eval()
    added = torch.zeros(MASK.shape, dtype=torch.float64).masked_fill(MASK == 0, -1e9)
    _assert_rows_of_tokens(model, {"input_ids": IDS, "attention_mask": added})


def test_a_batch_without_padding_tells_as_well() -> None:
    """The meaning of the entries is found on generated masks, so the first batch need not contain padding."""
    model = Opposite(randomize(Encoder()).double()).eval()
    full = {"input_ids": IDS, "attention_mask": torch.zeros_like(MASK)}
    padded = {"input_ids": IDS, "attention_mask": 1 - MASK}
    _, statistics = _gather(model, [full, padded])
    assert {moments.count for (moments,) in statistics.moments.values()} == {SAMPLES * TOKENS + int(LENGTHS.sum())}


@pytest.mark.parametrize("said", ["tokens", "padding"])
def test_what_is_said_of_a_mask_is_checked(said: Any) -> None:
    plain = randomize(Encoder()).double().eval()
    model, true, mask = (plain, "tokens", MASK) if said == "padding" else (Opposite(plain).eval(), "padding", 1 - MASK)
    batch = {"input_ids": IDS, "attention_mask": mask}
    with pytest.raises(AnalysisError, match=rf"entries are {said}, and they are {true}.*'attention_mask', '{true}'"):
        _gather(model, [batch], mask=("attention_mask", said))
    _assert_rows_of_tokens(model, batch, mask=("attention_mask", true))


def test_padding_that_influences_the_output_is_warned_of() -> None:
    model, batch = randomize(Unmasked()).double().eval(), _texts()
    with pytest.warns(
        UserWarning,
        match="does not separate padding from tokens: .* Its zero entries are left out .* name another mask=",
    ):
        analysis, statistics = _gather(model, [batch])
    _assert_by_hand(model, analysis, statistics, batch, {"fc1": MASK})


@pytest.mark.parametrize(("mask", "kept"), [(None, 1), (("attention_mask", "padding"), 0)])
def test_where_nothing_shows_what_is_said_or_usual_holds(mask: Any, kept: int) -> None:
    model, batch = randomize(Alone()).double().eval(), _texts()
    _, statistics = _gather(model, [batch], mask=mask)
    assert [moments.count for (moments,) in statistics.moments.values()] == [int((kept == MASK).sum())]


@pytest.mark.parametrize("mask", [("attention_mask", "words"), ("attention_mask",), 3])
def test_a_mask_is_a_name_or_a_name_and_what_it_says(mask: Any) -> None:
    with pytest.raises(AnalysisError, match="is not a mask: pass the name of the model's argument"):
        _gather(randomize(Encoder()).double().eval(), [_texts()], mask=mask)


def test_layers_are_fitted_on_the_tokens_of_either_kind_of_mask() -> None:
    """The two networks are equivalent, so neurons, constants and fits are equal."""
    plain = randomize(Encoder()).double().eval()
    ids = torch.randint(1, WORDS, (24, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (24, 1))).long()
    plans = [
        vbpfx.prune(model, [{"input_ids": ids, "attention_mask": given}], ratio=0.5, progress=False).plan
        for model, given in ((plain, mask), (Opposite(plain).eval(), 1 - mask))
    ]
    for one, two in zip(plans[0].blocks, plans[1].blocks, strict=True):
        assert one.kept == two.kept
        torch.testing.assert_close(one.constants, two.constants, rtol=RTOL, atol=1e-12)
    assert len(plans[0].corrections) == len(plans[1].corrections) > 0
    for one, two in zip(plans[0].corrections, plans[1].corrections, strict=True):
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-7, atol=1e-9)
