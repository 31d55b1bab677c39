"""Models by name, weights from files, and inputs that fit."""

from __future__ import annotations

import argparse
import builtins
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from vbpfx.errors import ModelError
from vbpfx.models.names import load_model, typical_inputs
from vbpfx.models.weightless import architecture
from vbpfx.onnx_session.file_inputs import file_inputs


def test_timm_and_torchvision() -> None:
    model = load_model("timm:test_vit")
    assert type(model) is type(timm.create_model("test_vit"))
    assert not model.training
    assert typical_inputs(model).args[0].shape == (2, 3, 160, 160)
    assert typical_inputs(model, (3, 32, 48), batch=5).args[0].shape == (5, 3, 32, 48)
    other = load_model("torchvision:squeezenet1_1")
    assert type(other).__name__ == "SqueezeNet"
    assert typical_inputs(other).args[0].shape == (2, 3, 224, 224)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=40,
    )  # fmt: skip
    saved = BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert isinstance(model, BertForSequenceClassification)
    own = saved.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    inputs = typical_inputs(model)
    assert {name: tuple(t.shape) for name, t in inputs.kwargs.items()} == {
        "input_ids": (2, 40), "attention_mask": (2, 40)
    }  # fmt: skip
    assert model(**inputs.kwargs).logits.shape == (2, 2)
    pairs = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    assert pairs(**typical_inputs(pairs).kwargs).logits.shape == (2, 128, 50)
    images = ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=32)
    )
    assert typical_inputs(images).kwargs["pixel_values"].shape == (2, 3, 32, 32)


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    capfd.readouterr()
    load_model(f"hf:{tmp_path}")
    with torch.device("meta"):
        load_model("torchvision:inception_v3")
    assert capfd.readouterr() == ("", "")


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def small():\n    return nn.Linear(3, 2)\n"
        "ready = nn.Linear(4, 2)\n"
        "def broken():\n    raise ValueError('no luck')\n"
        "def number():\n    return 3\n"
    )
    (tmp_path / "own_mistake.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("own_networks:small"), nn.Linear)
    assert load_model("own_networks:ready").in_features == 4
    for name, message in {
        "own_networks:broken": "calling it raised ValueError: no luck",
        "own_networks:number": "gives a int, expected a torch.nn.Module",
        "own_networks:nothing": "has no attribute 'nothing'; expected timm:NAME",
        "own_networks.py:small": "go to the folder of own_networks.py and write own_networks:small",
        "own_mistake:build": r"importing own_mistake raised SyntaxError: .*own_mistake.py, line 1",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_model(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit", "model 'deit': expected timm:NAME"),
        ("timm:", "expected timm:NAME"),
        ("timm:vit_nothing", "timm knows no model 'vit_nothing'; it has "),
        ("torchvision:resnet51", "torchvision knows no model 'resnet51'"),
        ("hf:/no/such/folder", "transformers cannot load '/no/such/folder'"),
        ("no_such_module:make", "No module named 'no_such_module'"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(ModelError, match=r"needs timm .*pip install timm torchvision"):
        load_model("timm:test_vit")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)


def make() -> nn.Module:
    return _Net()


@pytest.mark.parametrize("kind", ["model.safetensors", "model.pt", "wrapped.pth", "timms_own.pth.tar", "ddp.pth"])
def test_weights_from_files(kind: str, tmp_path: Path) -> None:
    weights = {name: torch.full_like(tensor, 3) for name, tensor in _Net().state_dict().items()}
    if kind.endswith("safetensors"):
        save_file(weights, tmp_path / kind)
    else:
        prefix = "module." if kind == "ddp.pth" else ""
        named: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
        more = {"args": argparse.Namespace(lr=0.1)} if "timm" in kind else {}  # timm's train.py writes this
        torch.save({"state_dict": named, "epoch": 3, **more} if "wrapped" in kind or more else named, tmp_path / kind)
    model = load_model("test_model_names:make", tmp_path / kind)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_do_not_fit_or_are_none(tmp_path: Path) -> None:
    own = _Net().state_dict()
    torch.save({**own, "more": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({name: t for name, t in own.items() if name != "fc.bias"}, tmp_path / "less.pt")
    torch.save({**own, "fc.weight": torch.zeros(2, 4)}, tmp_path / "shape.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name, message in {
        "more.pt": "does not fit _Net: it holds more, which the model does not have",
        "less.pt": "does not fit _Net: it lacks fc.bias",
        "shape.pt": r"fc.weight has shape \(2, 4\), in the model \(2, 3\)",
        "list.pt": "holds no state dict",
        "code.pt": "cannot be read as a file of weights",
        "junk.safetensors": "cannot read weights",
        "missing.pt": "cannot read weights",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_model("test_model_names:make", tmp_path / name)


def test_weights_of_other_classes_than_timms_own(tmp_path: Path) -> None:
    """A fine-tuned timm model usually has other classes; the message says how to name such a model."""
    model = pytest.importorskip("timm").create_model("test_vit", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "two.pth")
    with pytest.raises(ModelError, match=r"does not fit .*head.*pass it as module:callable"):
        load_model("timm:test_vit", tmp_path / "two.pth")


@pytest.mark.parametrize("damaged", [b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02G\x00."])
def test_whatever_torch_trips_over_is_a_model_error(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(damaged)
    with pytest.raises(ModelError, match=r"weights\.pt cannot be read as a file of weights"):
        load_model("test_model_names:make", tmp_path / "weights.pt")


def test_a_model_that_does_not_say_what_it_takes() -> None:
    with pytest.raises(ModelError, match=r"_Net does not say what its input looks like; pass --shape.*or --data"):
        typical_inputs(_Net())
    with pytest.raises(ModelError, match=r"CLIPModel does not say"):
        typical_inputs(CLIPModel(CLIPConfig(
            text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20},
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 32},
        )))  # fmt: skip


def test_inputs_of_an_onnx_file(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4])
    outputs = [
        helper.make_tensor_value_info("a", TensorProto.INT64, None),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
    ]
    nodes = [helper.make_node("Identity", ["ids"], ["a"]), helper.make_node("Relu", ["x"], ["b"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [ids, x], outputs), ir_version=8,
                              opset_imports=[helper.make_opsetid("", 17)])  # fmt: skip
    onnx.save(model, tmp_path / "model.onnx")
    found = file_inputs(tmp_path / "model.onnx", length=9, batch=5)
    assert [(tuple(t.shape), t.dtype) for t in found.tensors] == [((5, 9), torch.int64), ((5, 3, 4), torch.float32)]
    with pytest.raises(ModelError, match="cannot read"):
        file_inputs(tmp_path / "missing.onnx")


def test_what_a_callable_imports_late_may_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is on the import path only while the callable runs."""
    (tmp_path / "own_late.py").write_text(
        "def build():\n    from own_sibling import layer\n    return layer()\n"
        "def failing():\n    from own_sibling import nothing\n    return nothing\n"
    )
    (tmp_path / "own_sibling.py").write_text("from torch import nn\ndef layer():\n    return nn.Linear(5, 2)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_model("own_late:build").in_features == 5
    assert sys.path == before
    with pytest.raises(ModelError, match="calling it raised ImportError: cannot import name 'nothing'"):
        load_model("own_late:failing")
    assert sys.path == before


def test_a_configuration_names_models_and_nothing_else() -> None:
    """``architectures`` in a config.json may name anything in transformers; only model classes are called."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(architectures=["pipeline", "AutoModel", "nothing", "BertModel"])
    assert architecture(transformers, config) is transformers.BertModel
    assert architecture(transformers, transformers.BertConfig(architectures=["pipeline"])) is None
    assert architecture(transformers, transformers.BertConfig()) is None


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
    )
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(f"hf:{tmp_path}")
    assert not ran.exists()
