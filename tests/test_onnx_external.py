"""External data: it stays external, and a network is never held in memory twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx_files import Net, run

import vbpfx


def wide(folder: Path) -> tuple[Path, onnx.ModelProto]:
    net = Net()
    net.add("MatMul", ["x", net.weight("up", 16, 512)], "m")
    net.add("Add", ["m", net.weight("up_bias", 512)], "a")
    net.add("Relu", ["a"], "h")
    net.add("MatMul", ["h", net.weight("down", 512, 16)], "d")
    net.add("Add", ["d", net.weight("down_bias", 16)], "y")
    model = net.model(["n", 16], ["n", 16])
    path = folder / "in.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path, onnx.load(path)


def test_external_data_stays_external(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, model = wide(tmp_path / "a")
    data = [np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)]
    out = tmp_path / "b" / "out.onnx"
    pruned = vbpfx.prune_onnx(path, data, out, ratio=0.5, method="vbp", progress=False)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    stored = {t.name: t for t in onnx.load(out, load_external_data=False).graph.initializer}
    outside = {n for n, t in stored.items() if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == {"up", "down"}
    assert (out.parent / "out.onnx.data").stat().st_size == 2 * 4 * 16 * 256
    # the same as from one file
    onnx.save(model, tmp_path / "one.onnx")
    alone = vbpfx.prune_onnx(
        tmp_path / "one.onnx", data, tmp_path / "b" / "one.onnx", ratio=0.5, method="vbp", progress=False
    )
    assert pruned.plan.blocks[0].kept == alone.plan.blocks[0].kept
    assert np.array_equal(*(run(p, {"x": data[0]})[0] for p in (out, alone.path)))


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """The dense graph's parameters lie in the file's own pages."""
    path, _ = wide(tmp_path)
    data = [np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)]
    pruned = vbpfx.prune_onnx(path, data, tmp_path / "out.onnx", ratio=0.5, method="vbp", progress=False)
    pages = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "weights.bin" in line]
    spans = [tuple(int(end, 16) for end in entry[0].split("-")) for entry in pages]
    for name, parameter in pruned.captured.graph_module.named_parameters():
        mapped = any(start <= parameter.data_ptr() < stop for start, stop in spans)
        assert mapped == (name != "down_bias"), name
