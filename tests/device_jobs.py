"""Jobs of tests/test_other_device.py on a device that is not the CPU.

Each runs in a process of its own, because a registered device stays registered.

The device is tests/other_device.cpp, which has to be compiled first.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.calibration.moments import CoMoments
from vbpfx.outputs.differences import relative_error
from vbpfx.reconstruction.regression import Sums

NAME = "elsewhere"
CPU = torch.device("cpu")
CASES = {case.name: case for case in (*zoo.FOUND, *zoo.PACKED, *zoo.NORMS, *zoo.SHARED)}


def build(folder: Path) -> Path:
    """Compile the device, which takes about ten seconds."""
    torch_folder, library = Path(torch.__file__).parent, folder / "other_device.so"
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "no C++ compiler, which torch.compile needs, too"
    headers = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    command = [compiler, "-std=c++20", "-O0", "-w", "-fPIC", "-shared", *(f"-I{path}" for path in headers)]
    command += [str(Path(__file__).with_name("other_device.cpp")), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
    return library


class _Module:
    """The module that is registered as ``torch.elsewhere``."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = manual_seed_all = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def start(library: Path) -> None:
    """Register the device in this process."""
    torch.set_num_threads(1)
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    torch._register_device_module(NAME, _Module)


def moved(model: nn.Module, device: str = NAME) -> nn.Module:
    """Return a copy on the device; shared parameters stay shared, as they do on the way to a GPU."""
    memo = {id(p): nn.Parameter(p.detach().to(device), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo).to(device).eval()


def outputs(network: nn.Module, batch: Any, device: str) -> list[Tensor]:
    """Run the network on the device and return its output tensors on the CPU."""
    batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
    with torch.no_grad():
        made = (
            network(**batch) if isinstance(batch, dict) else network(*batch if isinstance(batch, tuple) else (batch,))
        )
    return [leaf.cpu() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def devices(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*network.parameters(), *network.buffers())}


def the_device() -> dict[str, Any]:
    """Check that the device behaves as the tests assume."""
    here, there = torch.randn(3, 3), torch.randn(3, 3, device=NAME)
    refused = {}
    for name, mix in {
        "operands": lambda: there + here,
        "factors": lambda: here @ there,
        "a list": lambda: torch.cat([there, here]),
        "values": lambda: there.index_put((torch.tensor([0]),), here[0]),
        "an output": lambda: torch.add(there, there, out=here),
        "no wait": lambda: there.to("cpu", non_blocking=True),
    }.items():
        try:
            mix()
            refused[name] = False
        except (RuntimeError, NotImplementedError):
            refused[name] = True
    taken = there + torch.tensor(1.0), there[torch.tensor([0, 2])], there.to("cpu") + here
    layer, x = nn.Conv2d(8, 8, 3), torch.randn(4, 8, 6, 6)
    exact = outputs(layer, x, "cpu")
    rounded = relative_error(outputs(moved(layer), x, NAME), exact)
    with torch.backends.cudnn.flags(allow_tf32=False):
        unrounded = relative_error(outputs(moved(layer), x, NAME), exact)
    return {
        "refused": refused,
        "taken": [t.device.type for t in taken],
        "rounded": rounded,
        "unrounded": unrounded,
    }


def like_the_cpu(name: str, frontend: Any, method: Any) -> dict[str, Any]:
    """Prune a case of the zoo on both devices, and run each pruned network on the other device, too."""
    torch.manual_seed(0)
    case = CASES[name]
    model = copy.deepcopy(case.make()).eval()
    batches = [case.batch() for _ in range(3)]
    prune = {"ratio": 0.4, "frontend": frontend, "method": method, "progress": False}
    here = vbpfx.prune(model, batches, **prune)
    with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 rounding would decide between nearly equal neurons
        there = vbpfx.prune(moved(model), batches, **prune)
        of_here = outputs(here.graph_module, batches[0], "cpu")
        of_there = outputs(there.graph_module, batches[0], NAME)
        sent = outputs(moved(here.graph_module), batches[0], NAME)
        brought = outputs(moved(there.graph_module, "cpu"), batches[0], "cpu")
    return {
        "kept": [[entry.kept for entry in pruned.plan.blocks] for pruned in (here, there)],
        "devices": devices(there.graph_module),
        "difference": [relative_error(found, of_here) for found in (of_there, sent, brought)],
    }


class Placed(nn.Module):
    """A network whose code reads the device of a buffer, which fx's tracer records as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.ones_like(input_ids, dtype=torch.float32, device=self.scale.device).to(self.scale.device)
        x = (x * input_ids)[..., None].expand(-1, -1, 8) * attention_mask[..., None]
        return self.down(torch.relu(self.up(x * self.scale)))


def text_model(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 40}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif kind == "own code":
        model = Placed()
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    ids = [{"input_ids": torch.randint(50, (4, 7)), "attention_mask": torch.ones(4, 7).long()} for _ in range(3)]
    return model.eval(), ids


def saved_elsewhere(kind: str, frontend: Any, start: str, end: str) -> dict[str, Any]:
    """Prune a network on one device, save it, load it without its class and run it on another device."""
    model, batches = text_model(kind)
    pruned = vbpfx.prune(
        moved(model, start), batches, ratio=0.4, method="vbp", mask="attention_mask", frontend=frontend, progress=False
    )
    expected = outputs(pruned.graph_module, batches[1], start)
    with tempfile.TemporaryDirectory() as folder:
        pruned.save(f"{folder}/small")
        loaded = vbpfx.load(f"{folder}/small")
        found = outputs(loaded.to(end), batches[1], end)
        in_onnx = pruned.to_onnx(f"{folder}/model.onnx").is_file()
    return {"difference": relative_error(found, expected), "in ONNX": in_onnx}


def half_precision(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Prune a model in half precision; the CPU does not support float16 for it."""
    model, batches = text_model("llama")
    options = {"ratio": 0.4, "mask": "attention_mask", "progress": False, **options}
    pruned = vbpfx.prune(moved(model).to(dtype), batches, **options)
    assert pruned.verification is not None
    return {"error": pruned.verification.error, "tolerance": pruned.verification.tolerance, "plan": pruned.plan.widths}


def convolutions() -> dict[str, Any]:
    """Check the oracle, the ONNX file and its parity on a device that rounds convolutions to TF32 by default."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 48, 1), nn.GELU(), nn.Conv2d(48, 8, 1)
    ).eval()  # fmt: skip
    batches = [torch.randn(8, 3, 9, 9) for _ in range(4)]
    pruned = vbpfx.prune(moved(model), batches, ratio=0.4, method="vbp", round_to=1, progress=False)
    assert pruned.verification is not None
    with tempfile.TemporaryDirectory() as folder:
        pruned.to_onnx(f"{folder}/model.onnx")
    allowed = torch.backends.cudnn.conv.fp32_precision
    return {"error": pruned.verification.error, "capture": pruned.verification.capture, "allowed": allowed}


def covariances() -> dict[str, Any]:
    """Compare covariances and a regression's sums on a device that rounds products with those of float64."""
    torch.manual_seed(0)
    x, t = torch.randn(500, 24), torch.randn(500, 8)
    weights, exact = torch.ones(500), torch.cov(torch.cat([x, t], 1).double().T, correction=0)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = x.T.to(NAME) @ x.to(NAME)
        covariance = CoMoments.of(x.to(NAME)).m2.cpu() / len(x)
        sums = Sums()
        sums.add(x.to(NAME), t.to(NAME), weights.to(NAME))
        normal = sums.all
    finally:
        torch.set_float32_matmul_precision("highest")
    return {
        "product": relative_error([rounded.cpu()], [x.T @ x]),
        "covariance": relative_error([covariance], [exact[:24, :24]]),
        "regression": relative_error([normal.xx.cpu(), normal.xt.cpu()], [exact[:24, :24], exact[:24, 24:]]),
    }


def other_functions() -> dict[str, Any]:
    """Run all other functions that take a network and data, with the two on different devices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 5)).eval()
    batches = [torch.randn(32, 8) for _ in range(4)]
    labelled = [(x, torch.randint(5, (32,))) for x in batches]
    prune: dict[str, Any] = {"ratio": 0.4, "method": "vbp", "progress": False}
    here = vbpfx.prune(model, batches, **prune)
    from_there = vbpfx.prune(model, [x.to(NAME) for x in batches], **prune)
    teacher = moved(model)
    pruned = vbpfx.prune(teacher, batches, **prune)
    own = pruned.apply_to(teacher)
    tuned = vbpfx.finetune(own, teacher, batches, epochs=1, progress=False)
    with_labels = vbpfx.finetune(pruned.apply_to(teacher), teacher, labelled, epochs=1, labels=True, progress=False)
    bench = vbpfx.bench(teacher, pruned.graph_module, batches[0].to(NAME), batches=[1], rounds=1, memory=False)
    latencies = vbpfx.measure_latencies(pruned.analysis, 0.9)
    evaluations = [vbpfx.evaluate(dense, pruned.graph_module, labelled, progress=False) for dense in (teacher, model)]
    return {
        "kept": [p.plan.blocks[0].kept for p in (here, from_there, pruned)],
        "devices": {
            "teacher": devices(teacher), "pruned": devices(pruned.graph_module), "own": devices(own),
            "for the CPU": devices(pruned.apply_to(model)), "tuned": devices(tuned.model), "with labels": devices(with_labels.model),
        },
        "bench": [side.failure or side.parity for row in bench.rows for side in (row.dense, row.pruned)],
        "latency": latencies.dense > 0,
        "evaluations": [(e.agreement, e.kl) for e in evaluations],
    }  # fmt: skip
