"""Measure the memory for pruning an ONNX file of more than 2 GB, whose weights are memory-mapped.

A residual MLP with random weights is written to a temporary folder with its weights in a second file. Half of its neurons are
pruned in a process of its own (``method="vbp"``), and the files are deleted. The benchmark prints the sizes of both files,
the largest resident memory of the process (``ru_maxrss``, which includes mapped pages of the files), and the largest
anonymous part of it, which is not backed by a file.

    python benchmarks/onnx_memory.py [--blocks 17]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from rich.console import Console

WIDTH, HIDDEN, SAMPLES = 2048, 8192, 256
_MIB, _SEED = 2**20, 0


def write_network(folder: Path, blocks: int) -> Path:
    """Write a file with ``blocks`` blocks x + W2 relu(W1 x + b1) + b2, weight by weight."""
    random = np.random.default_rng(_SEED)
    nodes, stored, offset = [], [], 0
    with (folder / "dense.onnx.data").open("wb") as data:

        def weight(name: str, *shape: int) -> str:
            nonlocal offset
            array = (random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))).astype(np.float32)
            data.write(array.tobytes())
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "dense.onnx.data"), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            stored.append(tensor)
            offset += array.nbytes
            return name

        x = "x"
        for i in range(blocks):
            for op, inputs, output in (
                ("MatMul", [x, weight(f"{i}.up.weight", WIDTH, HIDDEN)], f"{i}.up"),
                ("Add", [f"{i}.up", weight(f"{i}.up.bias", HIDDEN)], f"{i}.pre"),
                ("Relu", [f"{i}.pre"], f"{i}.hidden"),
                ("MatMul", [f"{i}.hidden", weight(f"{i}.down.weight", HIDDEN, WIDTH)], f"{i}.down"),
                ("Add", [f"{i}.down", weight(f"{i}.down.bias", WIDTH)], f"{i}.branch"),
                ("Add", [x, f"{i}.branch"], "y" if i == blocks - 1 else f"{i}.out"),
            ):
                nodes.append(helper.make_node(op, inputs, [output], name=f"/{i}/{op}_{len(nodes)}"))
            x = f"{i}.out"
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        stored,
    )
    path = folder / "dense.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def prune(path: Path, found: Path) -> None:
    """Prune the file and write the memory used to a JSON file. Run this in a process of its own."""
    import torch

    import vbpfx

    torch.set_num_threads(1)
    peak, begun, done = [0], _status("VmRSS"), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    data = [np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float32) for _ in range(SAMPLES // 64)]
    pruned = vbpfx.prune_onnx(path, data, path.with_name("small.onnx"), ratio=0.5, method="vbp", progress=False)
    done.set()
    watching.join()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report = {
        "imports": begun,
        "ru_maxrss": largest,
        "anonymous": peak[0],
        "parity": pruned.parity,
        "by": pruned.observed_by,
    }
    found.write_text(json.dumps(report))


def _status(name: str) -> int:
    """Return an entry of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) // 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=17, help="residual blocks of 128 MiB each")
    blocks = parser.parse_args(arguments).blocks
    with tempfile.TemporaryDirectory() as folder:
        path, found = write_network(Path(folder), blocks), Path(folder) / "found.json"
        child = multiprocessing.get_context("spawn").Process(target=prune, args=(path, found))
        child.start()
        child.join()
        if child.exitcode:
            return child.exitcode
        report = json.loads(found.read_text())
        sizes = [(Path(folder) / f"{name}.onnx.data").stat().st_size // _MIB for name in ("dense", "small")]
    console = Console(highlight=False)
    console.print(f"weights: dense {sizes[0]:,} MiB, narrowed {sizes[1]:,} MiB; statistics by {report['by']}")
    console.print(
        f"resident after the imports {report['imports']:,} MiB, at most {report['ru_maxrss']:,} MiB (ru_maxrss)"
    )
    console.print(f"at most {report['anonymous']:,} MiB that no file stands behind; parity {report['parity']:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
