"""Tiny Hugging Face transformers with random weights, built offline from their configurations.

``TRANSFORMERS`` maps a name to a function that makes a model in eval mode and a batch of keyword arguments for it. Texts
are padded at their ends. Batch, tokens, heads, widths and vocabulary all have different sizes, so that no axis can be
mistaken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

Batch = dict[str, Tensor]

SAMPLES, TOKENS, VOCABULARY = 3, 11, 97
_LENGTHS = (11, 8, 5)


def texts() -> Batch:
    """Return token ids, padded at the end, and their attention mask."""
    mask = (torch.arange(TOKENS) < torch.tensor(_LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(3, VOCABULARY - 1, (SAMPLES, TOKENS)) * mask, "attention_mask": mask}


def translations() -> Batch:
    """Return padded texts for an encoder and seven tokens for its decoder."""
    return texts() | {"decoder_input_ids": torch.randint(3, VOCABULARY - 1, (SAMPLES, 7))}


def images(size: int = 32) -> Batch:
    """Return images with three channels."""
    return {"pixel_values": torch.randn(SAMPLES, 3, size, size)}


def speech() -> Batch:
    """Return a spectrogram for Whisper's encoder and seven tokens for its decoder."""
    return {
        "input_features": torch.randn(SAMPLES, 20, 44),
        "decoder_input_ids": torch.randint(3, VOCABULARY - 1, (SAMPLES, 7)),
    }


def waves() -> Batch:
    """Return raw audio."""
    return {"input_values": torch.randn(SAMPLES, 1200)}


# Sizes under the names that most configurations share.
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 72}
_TEXT = {**_LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "use_cache": False}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE = {**_LAYERS, "image_size": 32, "patch_size": 8, "num_labels": 5}
_PYRAMID = {"depths": [1, 2], "num_labels": 5}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_TOWER_TEXT = {**_TEXT, **_ENDS, "eos_token_id": VOCABULARY - 1}
_TOWER_IMAGE = {**_IMAGE, "intermediate_size": 80}


def _both_towers() -> Batch:
    batch = texts()
    batch["input_ids"][range(SAMPLES), torch.tensor(_LENGTHS) - 1] = VOCABULARY - 1  # CLIP pools at this token
    return batch | images()


_MODELS: dict[str, tuple[type, str, dict[str, Any], Callable[[], Batch]]] = {
    "ViT": (AutoModelForImageClassification, "vit", _IMAGE, images),
    "DeiT": (
        AutoModelForImageClassification, "deit", {**_IMAGE, "architectures": ["DeiTForImageClassification"]}, images,
    ),
    "BEiT": (AutoModelForImageClassification, "beit", _IMAGE, images),
    "DINOv2": (AutoModelForImageClassification, "dinov2", {**_IMAGE, "mlp_ratio": 3}, images),
    "DINOv2 SwiGLU": (AutoModel, "dinov2", {**_IMAGE, "mlp_ratio": 3, "use_swiglu_ffn": True}, images),
    "DINOv3": (AutoModel, "dinov3_vit", _IMAGE, images),
    "Swin": (
        AutoModelForImageClassification, "swin",
        {**_PYRAMID, "image_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4,
         "mlp_ratio": 3.0}, images,
    ),
    "Swinv2": (
        AutoModelForImageClassification, "swinv2",
        {**_PYRAMID, "image_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4,
         "mlp_ratio": 3.0}, images,
    ),
    "ConvNeXt": (
        AutoModelForImageClassification, "convnext", {**_PYRAMID, "num_stages": 2, "hidden_sizes": [16, 24]}, images,
    ),
    "ConvNeXtV2": (
        AutoModelForImageClassification, "convnextv2", {**_PYRAMID, "num_stages": 2, "hidden_sizes": [16, 24]}, images,
    ),
    "SegFormer": (
        AutoModelForSemanticSegmentation, "segformer",
        {**_PYRAMID, "num_encoder_blocks": 2, "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [7, 3],
         "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [3, 3], "decoder_hidden_size": 20}, images,
    ),
    "PVTv2": (
        AutoModelForImageClassification, "pvt_v2",
        {**_PYRAMID, "num_encoder_blocks": 2, "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [7, 3],
         "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [3, 3]}, images,
    ),
    "MobileViT": (
        AutoModelForImageClassification, "mobilevit",
        {"image_size": 64, "hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 40],
         "num_attention_heads": 4, "mlp_ratio": 3.0, "num_labels": 5}, lambda: images(64),
    ),
    "Hiera": (
        AutoModelForImageClassification, "hiera",
        {**_PYRAMID, "image_size": [64, 64], "embed_dim": 16, "num_heads": [2, 4], "query_stride": [2, 2],
         "num_query_pool": 1, "mlp_ratio": 3.0, "embed_dim_multiplier": 2.0, "masked_unit_size": [4, 4]},
        lambda: images(64),
    ),
    "CLIP": (
        AutoModel, "clip",
        {"text_config": _TOWER_TEXT, "vision_config": _TOWER_IMAGE, "projection_dim": 24}, _both_towers,
    ),
    "SigLIP": (AutoModel, "siglip", {"text_config": _TOWER_TEXT, "vision_config": _TOWER_IMAGE}, _both_towers),
    "BERT": (AutoModelForSequenceClassification, "bert", _TEXT, texts),
    "RoBERTa": (AutoModelForSequenceClassification, "roberta", _TEXT, texts),
    "DistilBERT": (
        AutoModelForSequenceClassification, "distilbert",
        {"dim": 32, "hidden_dim": 72, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY,
         "max_position_embeddings": 64}, texts,
    ),
    "ELECTRA": (AutoModelForSequenceClassification, "electra", {**_TEXT, "embedding_size": 24}, texts),
    "ALBERT": (AutoModelForSequenceClassification, "albert", {**_TEXT, "embedding_size": 24}, texts),
    "DeBERTa-v2": (
        AutoModelForSequenceClassification, "deberta-v2",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}, texts,
    ),
    "ModernBERT": (
        AutoModelForMaskedLM, "modernbert",
        {**_TEXT, **_ENDS, "num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 3,
         "cls_token_id": 1, "sep_token_id": 2}, texts,
    ),
    "T5 gated": (
        AutoModelForSeq2SeqLM, "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
         "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "use_cache": False}, translations,
    ),
    "BART": (
        AutoModelForSeq2SeqLM, "bart",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 72, "decoder_ffn_dim": 80,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0,
         "max_position_embeddings": 64, "use_cache": False, **_ENDS, "decoder_start_token_id": 2}, translations,
    ),
    "GPT-2": (
        AutoModelForCausalLM, "gpt2",
        {"n_embd": 32, "n_inner": 72, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
         "use_cache": False, **_ENDS}, texts,
    ),
    "OPT": (
        AutoModelForCausalLM, "opt", {**_TEXT, **_ENDS, "ffn_dim": 72, "word_embed_proj_dim": 32}, texts,
    ),
    "BLOOM": (
        AutoModelForCausalLM, "bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "use_cache": False, **_ENDS}, texts,
    ),
    "Falcon": (
        AutoModelForCausalLM, "falcon",
        {**_TEXT, **_ENDS, "ffn_hidden_size": 72, "new_decoder_architecture": False}, texts,
    ),
    "GPT-NeoX": (AutoModelForCausalLM, "gpt_neox", {**_TEXT, **_ENDS}, texts),
    "Llama": (AutoModelForCausalLM, "llama", {**_GROUPED, **_ENDS}, texts),
    "Mistral": (AutoModelForCausalLM, "mistral", {**_GROUPED, **_ENDS, "sliding_window": 8}, texts),
    "Qwen3": (AutoModelForCausalLM, "qwen3", {**_GROUPED, **_ENDS}, texts),
    "Gemma": (AutoModelForCausalLM, "gemma", {**_GROUPED, **_ENDS}, texts),
    "Phi-3": (AutoModelForCausalLM, "phi3", {**_GROUPED, **_ENDS}, texts),
    "Mixtral": (AutoModelForCausalLM, "mixtral", {**_GROUPED, **_ENDS, "num_local_experts": 5}, texts),
    "Qwen3-MoE": (
        AutoModelForCausalLM, "qwen3_moe",
        {**_GROUPED, **_ENDS, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}, texts,
    ),
    "Whisper": (
        AutoModelForSpeechSeq2Seq, "whisper",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 72, "decoder_ffn_dim": 80,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "num_mel_bins": 20,
         "max_source_positions": 22, "max_target_positions": 16, "pad_token_id": 0, **_ENDS,
         "decoder_start_token_id": 1, "use_cache": False}, speech,
    ),
    "Wav2Vec2": (
        AutoModelForCTC, "wav2vec2",
        {**_LAYERS, "vocab_size": VOCABULARY, "pad_token_id": 0, "conv_dim": [16, 24, 24], "conv_kernel": [10, 3, 3],
         "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
         "apply_spec_augment": False}, waves,
    ),
}  # fmt: skip


def _maker(name: str) -> Callable[[], tuple[nn.Module, Batch]]:
    auto, kind, options, batch = _MODELS[name]

    def make() -> tuple[nn.Module, Batch]:
        return auto.from_config(AutoConfig.for_model(kind, **options)).eval(), batch()

    return make


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {name: _maker(name) for name in _MODELS}
