"""Measure the accuracy of networks that are pruned and then quantised to int8 by the compilers' own tools.

``python benchmarks/quantized.py`` prunes a trained network as an exported program. It takes the dense and the pruned program
through each compiler in float32 and in int8, exactly as the examples in ``docs/examples`` do, and measures all of them on
unseen images, as ``retention_measures.py`` describes. Results go to ``benchmarks/results/quantized.json`` and to a section
of ``docs/compilers.md``; ``--page`` only writes the page. Compilers that are not installed are skipped with a message.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_page import describe_machine, markdown_table, write_section
from retention_measures import pack
from retention_networks import NETWORKS
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.export.onnx import export_onnx
from vbpfx.storage.files import json_writer, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "quantized.json"
PAGE = ROOT / "docs" / "compilers.md"
EXAMPLES = ROOT / "docs" / "examples"
VARIANTS = ("dense", "pruned", "int8", "pruned + int8")

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """A network in the forms that the compilers accept."""

    module: nn.Module
    program: ExportedProgram
    inputs: Inputs


# Each function takes a network, calibration batches for quantisation (None for float32) and a folder. It returns a forward
# function and the size of the deployed file in bytes.
def _pt2e(example: Any, source: Source, batches: Sequence[Tensor] | None, folder: Path) -> tuple[Forward, int | None]:
    return source.program.module() if batches is None else example.int8(source.program, batches), None


def _aotinductor(example: Any, source: Source, batches: Sequence[Tensor] | None, folder: Path) -> tuple[Forward, int]:
    program = source.program if batches is None else example.quantized(source.program, batches, MOST)
    path = example.compile_package(program, folder / "model.pt2")
    return example.runner(path), path.stat().st_size


def _executorch(example: Any, source: Source, batches: Sequence[Tensor] | None, folder: Path) -> tuple[Forward, int]:
    program = source.program if batches is None else example.int8(source.program)
    path = example.write(program, folder / "model.pte")
    return example.runner(path), path.stat().st_size


def _onnxruntime(example: Any, source: Source, batches: Sequence[Tensor] | None, folder: Path) -> tuple[Forward, int]:
    path = export_onnx(source.module, source.inputs, folder / "model.onnx")
    path = path if batches is None else example.int8(path, batches)
    return example.runner(path), path.stat().st_size


def _openvino(example: Any, source: Source, batches: Sequence[Tensor] | None, folder: Path) -> tuple[Forward, int]:
    model = example.convert(source.program)
    model = model if batches is None else example.int8(model, batches)
    return example.runner(model), example.size(model, folder)


@dataclass(frozen=True)
class Way:
    """A way to int8: its name on the page, the file name of its example, and the function that compiles a network."""

    title: str
    example: str
    make: Callable[..., tuple[Forward, int | None]]


WAYS = {
    "pt2e": Way("PT2E (torchao), in PyTorch", "pt2e_int8", _pt2e),
    "executorch": Way("ExecuTorch, XNNPACK", "executorch_xnnpack", _executorch),
    "onnxruntime": Way("ONNX Runtime, QDQ", "onnxruntime_int8", _onnxruntime),
    "openvino": Way("OpenVINO, NNCF", "openvino_int8", _openvino),
    "aotinductor": Way("AOTInductor, PT2E", "aotinductor", _aotinductor),
}
# The largest batch size, which ahead-of-time compilers need to know.
MOST = 100


def measure(name: str, ways: Sequence[str], ratio: float, images: int, console: Console) -> Iterator[dict[str, Any]]:
    """Yield the figures after each way that has been measured; if the data is missing, print a message."""
    subject = NETWORKS[name]
    reason = subject.missing()
    if reason is not None:
        print(f"{name}: not measured: {reason}")
        return
    network = subject.load(subject.calibration, None, console)
    example = Inputs((network.example.clone(),), {})
    sizes = ({0: Dim("batch", min=2, max=MOST)},)
    program = torch.export.export(network.model, example.args, dynamic_shapes=sizes)
    graph = program.module(check_guards=False)
    assert isinstance(graph, nn.Module)
    pruned = vbpfx.prune(graph, network.calibration(subject.calibration), ratio=ratio, progress=console.is_terminal)
    dense = Source(network.model, program, example)
    small = Source(pruned.graph_module, pruned.to_exported_program(like=program), example)
    reference = network.output(network.model)
    batches = list(torch.cat(network.calibration(images)).split(20))
    found: dict[str, Any] = {
        "ways": {},
        "ratio": ratio,
        "calibration": subject.calibration,
        "images": images,
        "test_samples": network.test_samples,
        "dense": network.judge(reference, reference).figures["top1"],
        "machine": describe_machine(),
        "torch": torch.__version__,
    }
    for way in ways:
        try:
            sys.path.insert(0, str(EXAMPLES))
            module = importlib.import_module(WAYS[way].example)
        except ImportError as error:
            print(f"{way}: not measured: {error}")
            continue
        finally:
            sys.path.remove(str(EXAMPLES))
        for variant in VARIANTS:
            source = small if "pruned" in variant else dense
            with tempfile.TemporaryDirectory() as folder:
                forward, size = WAYS[way].make(module, source, batches if "int8" in variant else None, Path(folder))
                measured = network.judge(reference, network.output(forward))  # type: ignore[arg-type]
            found["ways"].setdefault(way, {})[variant] = {
                "figures": measured.figures,
                "values": pack(measured.values),
                "bytes": size,
            }
            print(f"{name}, {way}, {variant}: kept {measured.figures['kept']:.1%}", flush=True)
        yield found


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that results must share to appear in one table."""
    return {key: value for key, value in found.items() if key != "ways"}


def _cell(entry: dict[str, Any]) -> str:
    figures = entry["figures"]
    return f"{figures['kept']:.1%} ± {figures['kept_se']:.1%}, {figures['agreement']:.1%}"


def _size(entry: dict[str, Any]) -> str:
    return "" if entry["bytes"] is None else f"{entry['bytes'] / 2**20:.1f}"


def write_page(results: dict[str, Any], page: Path) -> None:
    """Write the section on int8 into the page."""
    parts = []
    for name, found in results.items():
        rows = [
            [WAYS[way].title, *(_cell(found["ways"][way][v]) for v in VARIANTS),
             " / ".join(filter(None, (_size(found["ways"][way][v]) for v in VARIANTS)))]
            for way in WAYS
            if way in found["ways"]
        ]  # fmt: skip
        machine = found["machine"]
        parts.append(f"""### {NETWORKS[name].title}

`python benchmarks/quantized.py {name} --ratio {found["ratio"]:g} --images {found["images"]}`

{found["ratio"]:.0%} of the hidden neurons removed with `method="auto"`, calibrated on {found["calibration"]} images; int8 with the
first {found["images"]} of an even spread of them. Measured on {found["test_samples"]} other images, of which the dense network has
{found["dense"]:.1%} right. Each cell: top-1 over the dense network's in PyTorch (± its paired standard error), and on how many
images the two have their highest logit at the same class. Sizes in MiB, in the order of the columns.

{markdown_table(("way", *VARIANTS, "size"), rows)}

torch {found["torch"]}; {machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} used.
""")
    write_section(page, "quantized", "\n".join(parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quantized.py", description="What int8 leaves of pruned networks."
    )
    networks = [name for name, subject in NETWORKS.items() if subject.kind == "classifier"]
    add = parser.add_argument
    add(
        "networks",
        nargs="*",
        metavar="NETWORK",
        default=["vit_tiny"],
        help=f"of {', '.join(networks)}; default vit_tiny",
    )
    add("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}; default all")
    add("--ratio", type=float, default=0.3, help="default %(default)s")
    add("--images", type=int, default=200, help="to quantise with; default %(default)s")
    add("--threads", type=int, help="default: torch's choice")
    add("--page", action="store_true", help="measure nothing; write the page")
    add("--out", type=Path, default=RESULTS, help="the JSON file; default benchmarks/results/quantized.json")
    add("--docs", type=Path, default=PAGE.parent, help="folder of compilers.md; default docs")
    options = parser.parse_args(argv)
    ways = options.ways.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"--ways {options.ways}: choose from {', '.join(WAYS)}")
    if unknown := set(options.networks) - set(networks):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; choose from {', '.join(networks)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in () if options.page else options.networks:
        for found in measure(name, ways, options.ratio, options.images, Console(stderr=True, highlight=False)):
            before = results.get(name, {})
            kept = before.get("ways", {}) if _settings(before) == _settings(found) else {}
            results[name] = found | {"ways": kept | found["ways"]}
            write_atomically({options.out: json_writer(results)})
    if not results:
        print(f"nothing measured: there is no {options.out.name}")
        return 0
    write_page(results, options.docs / PAGE.name)
    print(f"written: the section on int8 in {options.docs / PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
