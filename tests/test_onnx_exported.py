"""Files from either exporter of torch: the same neurons and outputs as from the PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_direct
import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import vbpfx
from vbpfx.outputs.differences import relative_error

# Rounding between two float32 computations.
ROUNDING = 1e-5


class Encoder(nn.Module):
    """BERT, and the mean over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        self.bert = BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)


def convnext() -> nn.Module:
    """Return a ConvNeXt whose blocks have linear layers behind a permutation, with visible layer scales."""
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), num_classes=5, ls_init_value=1.0)


def mixer() -> nn.Module:
    return MlpMixer(img_size=16, patch_size=4, num_blocks=2, embed_dim=24, num_classes=5)


def images(size: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4, 3, size, size)} for _ in range(3)]


def texts() -> list[dict[str, Tensor]]:
    """Return padded batches of different lengths."""
    made = []
    for length in (9, 12, 7):
        mask = (torch.arange(length) < torch.randint(3, length + 1, (4, 1))).long()
        made.append({"input_ids": torch.randint(0, 50, (4, length)), "attention_mask": mask})
    return made


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Tensor]]], int]] = {
    "vit": (vit, lambda: images(16), 2),
    "convnext": (convnext, lambda: images(32), 4),
    "mixer": (mixer, lambda: images(16), 4),
    "bert": (Encoder, texts, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_as_through_the_model(name: str, tmp_path: Path) -> None:
    make, batches, blocks = NETWORKS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no equal tensors, no head of zeros
    network = onnx_direct.Network(model, batches(), batches()[0])
    through = through_the_model(network)
    for dynamo in (True, False):
        onnx_direct.export(network, tmp_path / "dense.onnx", dynamo=dynamo)
        direct = prune_file(network, tmp_path)
        assert len(direct.analysis.usual) == blocks
        assert direct.observed_by == "ONNX Runtime"
        assert [e.kept for e in direct.plan.blocks] == [e.kept for e in through.plan.blocks]
        assert difference(network, through, direct) < ROUNDING


def through_the_model(network: onnx_direct.Network) -> vbpfx.Pruned:
    batches = [tuple(batch.values()) for batch in network.data]
    return vbpfx.prune(
        network.model, batches, ratio=0.5, method="vbp", progress=False, inputs=lambda batch: (batch, {})
    )


def prune_file(network: onnx_direct.Network, folder: Path) -> vbpfx.PrunedOnnx:
    return vbpfx.prune_onnx(
        folder / "dense.onnx", network.data, folder / "direct.onnx", ratio=0.5, method="vbp", progress=False
    )


def difference(network: onnx_direct.Network, through: vbpfx.Pruned, direct: vbpfx.PrunedOnnx) -> float:
    """Return the difference between the two narrowed networks on unseen data."""
    expected = through.graph_module(*network.test.values()).detach()
    return relative_error(onnx_direct.outputs(direct.path, network.test), [expected])


def test_equal_vectors_that_the_exporter_stored_once(tmp_path: Path) -> None:
    """The exporter stores equal initial zeros and ones once for many layers, which are narrowed separately."""
    network = onnx_direct.Network(vit().eval(), images(16), images(16)[0])
    onnx_direct.export(network, tmp_path / "dense.onnx", dynamo=False)
    stored = [tuple(t.dims) for t in onnx.load(tmp_path / "dense.onnx").graph.initializer]
    assert stored.count((96,)) == 1  # one tensor for the biases of the first layers of both blocks
    direct, through = prune_file(network, tmp_path), through_the_model(network)
    assert list(direct.plan.widths) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert len(set(direct.plan.widths.values())) == 2
    assert [e.kept for e in direct.plan.blocks] == [e.kept for e in through.plan.blocks]
    assert difference(network, through, direct) < ROUNDING


def test_a_classifier_of_scikit_learn(tmp_path: Path) -> None:
    """A trained and converted classifier, with another producer and other operators behind, keeps its accuracy."""
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    classifier = MLPClassifier((128,), random_state=0, max_iter=40, tol=0, n_iter_no_change=100, solver="adam")
    with pytest.warns(Warning, match="Maximum iterations"):
        classifier.fit(images[:1200], labels[:1200])
    source = tmp_path / "digits.onnx"
    onnx.save(skl2onnx.to_onnx(classifier, images[:1], options={"zipmap": False}), source)
    data = [{"X": images[start : start + 100]} for start in range(0, 1200, 100)]
    accuracy = {}
    for method, out in (("dense", source), ("vbp", tmp_path / "vbp.onnx"), ("auto", tmp_path / "auto.onnx")):
        if method != "dense":
            pruned = vbpfx.prune_onnx(source, data, out, ratio=0.5, method=method, progress=False)
            assert pruned.report.neurons == (128, 64)
        found = onnx_direct.outputs(out, {"X": torch.from_numpy(images[1200:])})
        accuracy[method] = float((found[0].numpy() == labels[1200:]).mean())
    assert accuracy["dense"] > 0.9
    # 597 images: one standard error is about 0.011
    assert accuracy["auto"] > accuracy["dense"] - 0.011
    assert accuracy["vbp"] > 0.8 * accuracy["dense"]
