"""The networks of the deployment tables, each with one batch, built offline.

MiniLM's weights are trained. All other weights are random and of natural size, because an error would not show behind a
head of zeros or a layer scale of 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sentences
import timm
import torch
from exactness import randomize
from torch import nn

from vbpfx.data.inputs import Inputs

TOKENS = 128
_IMAGES = (
    "deit_small_patch16_224",
    "convnext_tiny",
    "mixer_b16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "deit_base_patch16_224",
)


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    model = randomize(timm.create_model(name)).eval()
    return model, Inputs((torch.randn(4, *model.pretrained_cfg["input_size"]),), {})


def _texts(vocabulary: int) -> Inputs:
    ids = torch.randint(vocabulary, (4, TOKENS))
    return Inputs((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _minilm() -> tuple[nn.Module, Inputs]:
    encoder, _ = sentences.load_encoder()
    return encoder, _texts(30522)


def _llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return randomize(LlamaForCausalLM(config)).eval(), _texts(2048)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    **{name: partial(_timm, name) for name in _IMAGES},
    "MiniLM": _minilm,
    "Llama, 4 layers": _llama,
}
