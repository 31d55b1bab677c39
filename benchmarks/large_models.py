"""Measure large models: the analysis of seven billion parameters, and one billion pruned from files to files.

It also measures how much memory a model that fits in memory needs beyond its own weights. Each figure comes from a process of
its own, whose peak resident memory is ``ru_maxrss``. Weights are random: the benchmark measures memory, time, and whether
the pruned files equal the result of pruning in memory, which another process computes and compares.

    python benchmarks/large_models.py [--folder F] [--layers N] [--memory GIB] [--record]

The folder F needs eight gigabytes of free space for the dense and the pruned model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from results_page import PAGE, machine_line, markdown_table, write_section

import vbpfx
from vbpfx.graph.capture import named_tensors
from vbpfx.plans.files import load_plan
from vbpfx.storage.tensors import Stored, write_shards

PERFORMANCE = PAGE.parent / "performance.md"
RATIO, BATCHES, SAMPLES, TOKENS = 0.3, 4, 2, 64


def _configuration(layers: int, **sizes: int) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, num_attention_heads=32, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    return config


def _billion(layers: int) -> Any:
    return _configuration(layers, hidden_size=2048, intermediate_size=5632, num_key_value_heads=4)


def _calibration() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32000, (SAMPLES, TOKENS), generator=generator)} for _ in range(BATCHES)]


def analyse(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Capture and analyse a model with the shape of Llama 7B on the meta device."""
    from transformers import LlamaForCausalLM

    config = _configuration(32, hidden_size=4096, intermediate_size=11008)
    config.use_cache = False
    start, own = time.perf_counter(), time.process_time()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(2, 16, dtype=torch.long)
    captured = vbpfx.capture(model, {"input_ids": ids})
    analysis = vbpfx.find_blocks(captured)
    times = _times(start, own)
    parameters = sum(p.numel() for p in model.parameters())
    return {**times, "parameters": parameters, "blocks": len(analysis.blocks), "neurons": analysis.neurons}


def write(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the dense model with random weights, in shards as Hugging Face writes them."""
    from transformers import LlamaForCausalLM

    config, generator = _billion(options.layers), torch.Generator().manual_seed(0)
    with vbpfx.without_weights():
        shapes = LlamaForCausalLM(config).state_dict()

    def make(name: str) -> torch.Tensor:
        shape = shapes[name].shape
        return torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)

    (folder / "dense").mkdir()
    write_shards(shapes, make, folder / "dense", 10**9)
    config.save_pretrained(folder / "dense")
    count = sum(shape.numel() for shape in shapes.values())
    return {"parameters": count, "bytes": 4 * count}


def prune_files(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune from files to files."""
    start, own = time.perf_counter(), time.process_time()
    result = vbpfx.prune_files(
        folder / "dense", _calibration(), folder / "pruned", ratio=RATIO, uniform=True, memory=options.memory
    )
    times = _times(start, own)
    assert result.verification is not None
    parts = {"error": result.verification.error, "effect": result.verification.effect}
    return {**times, "parameters": result.report.params[1], **parts}


def prune_in_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune the same model in memory and compare the result with the files, also as Hugging Face loads them."""
    from transformers import AutoModelForCausalLM

    start, own = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    model.config.use_cache = False
    pruned = vbpfx.prune(model, _calibration(), ratio=RATIO, uniform=True, method="vbp")
    times, peak = _times(start, own), _peak()
    plan, stored = load_plan(folder / "pruned"), Stored.of(folder / "pruned")
    kept = [a.kept == b.kept for a, b in zip(plan.blocks, pruned.plan.blocks, strict=True)]
    narrow = {n: t for n, t in named_tensors(pruned.graph_module).items() if n in stored.files}
    worst = max(float((stored.read(name) - tensor.detach()).abs().max()) for name, tensor in narrow.items())
    batch = _calibration()[0]
    with torch.no_grad():
        expected = pruned.graph_module(**batch).logits
        parameters = sum(p.numel() for p in pruned.graph_module.parameters())
        del model, pruned, narrow
        loaded = AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype=torch.float32)
        logits = float((loaded(**batch).logits - expected).abs().max())
    found = {"peak": peak, "kept": all(kept), "worst": worst, "logits": logits, "parameters": parameters}
    return times | found


def share(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the extra memory of capture, analysis, plan and ``convert(share=True)`` for DeiT-B in memory."""
    for name in (
        "deit_tiny_patch16_224",
        "deit_base_patch16_224",
    ):  # the first model triggers everything that torch loads at its first use
        model, batch = timm.create_model(name), torch.randn(2, 3, 224, 224)
        before = _peak()
        captured = vbpfx.capture(model, batch)
        analysis = vbpfx.find_blocks(captured)
        observed = vbpfx.prepare(captured, analysis, covariance=False)
        with torch.inference_mode():
            observed(batch)
        plan = vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=RATIO, method="vbp")
        small = vbpfx.convert(captured, plan, share=True)
    own = {t.data_ptr() for t in model.parameters()}
    new = sum(t.numel() for t in small.parameters() if t.data_ptr() not in own)
    return {"extra": _peak() - before, "bytes": 4 * sum(t.numel() for t in model.parameters()), "narrowed": 4 * new}


JOBS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "analyse": analyse,
    "write": write,
    "files": prune_files,
    "memory": prune_in_memory,
    "share": share,
}


def _peak() -> float:
    """Return the peak resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _times(wall: float, own: float) -> dict[str, float]:
    """Return wall-clock and processor seconds since the two clocks were read."""
    return {"seconds": time.perf_counter() - wall, "processor": time.process_time() - own}


def _in_own_process(job: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", job, "--folder", str(folder), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _both(found: dict[str, Any]) -> str:
    return f"{found['processor']:.0f} s ({found['seconds']:.0f} s)"


def _section(found: dict[str, dict[str, Any]], memory: float) -> str:
    analysed, dense, files, whole, shared = (found[job] for job in JOBS)
    size = dense["bytes"] / 2**30
    rows = [
        ["analysis", f"{analysed['parameters'] / 1e9:.2f} G", "", _both(analysed), f"{analysed['peak']:.2f} GiB", ""],
        *(
            [name, f"{dense['parameters'] / 1e9:.2f} G", f"{part['parameters'] / 1e9:.2f} G", _both(part),
             f"{part['peak']:.2f} GiB", f"{part['peak'] / size:.2f}"]
            for name, part in (("files to files", files), ("in memory", whole))
        ),
    ]  # fmt: skip
    table = markdown_table(("", "parameters", "pruned", "time", "peak memory", "of the weights"), rows)
    return (
        f"## Models that do not fit in memory\n\n`python benchmarks/large_models.py --record`\n\nCapture and analysis of a configuration "
        f"of the shape of Llama 7B ({analysed['blocks']} blocks, {analysed['neurons']:,} hidden neurons) on the meta device; and one "
        f"billion parameters in float32 ({size:.2f} GiB of random weights in shards), pruned at p = {RATIO} by the variance with "
        f"`uniform=True`, {BATCHES * SAMPLES} samples of {TOKENS} tokens: from files to files with `memory={memory:g}`, and in memory. "
        f"Peaks are `ru_maxrss` of a process, its imports included; times are the processor's and wall-clock, the oracle included.\n\n{table}\n\n"
        f"Substitution oracle on the files: error {files['error']:.1e}, effect {files['effect']:.1e}. Neurons that stay are "
        f"{'the same' if whole['kept'] else 'NOT the same'} in files and in memory, their tensors differ by {whole['worst']:.1e} at most, "
        f"and the logits of what `from_pretrained` loads by {whole['logits']:.1e} from those of the network that was pruned in "
        f"memory.\n\nA model that is in memory is not copied: capture, analysis, one batch of two images for the statistics, plan and "
        f"`convert(share=True)` of DeiT-B at p = {RATIO} add {shared['extra'] * 2**10:.0f} MiB at their peak, "
        f"{shared['extra'] * 2**30 / shared['bytes']:.2f} of its weights; {shared['narrowed'] / 2**20:.0f} MiB of it are the tensors that "
        f"were narrowed.\n\n{machine_line()}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="where the models are written for the time of the run; a temporary one by default")
    add("--layers", type=int, default=22, help="of the model that is pruned; 22 make a billion parameters")
    add("--memory", type=float, default=1.0, help="GiB, as vbpfx.prune_files takes it")
    add("--record", action="store_true", help="write the section of docs/performance.md")
    add("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(1)
        found = JOBS[options.job](options.folder, options)
        print(json.dumps({"peak": _peak()} | found))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = ["--layers", str(options.layers), "--memory", str(options.memory)]
        results = {job: _in_own_process(job, Path(folder), arguments) for job in JOBS}
    text = _section(results, options.memory)
    print(text)
    if options.record:
        write_section(PERFORMANCE, "large", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
