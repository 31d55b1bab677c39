"""The scripts in docs/examples run and print plausible figures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "compilers.md"

# The dense network gets all but 3 of 597 images right. Two percentage points are 12 images. Correct pruning and 8 bits, which
# keep the logits to a few per cent, change fewer images. A wrong scale or a wrong fold loses tens of points.
WITHIN = 2.0
# Rounding in float32 with another order of summation over six blocks.
PARITY = 1e-4

NEEDS = {
    "pass_manager": (),
    "pt2e_int8": ("torchao",),
    "executorch_xnnpack": ("executorch", "torchao"),
    "aotinductor": ("torchao",),
    "onnxruntime_int8": (),
    "openvino_int8": ("openvino", "nncf"),
}
WRITES_FILES = ("executorch_xnnpack", "aotinductor", "onnxruntime_int8", "openvino_int8")
SAYS_PARITY = ("executorch_xnnpack", "aotinductor", "openvino_int8")


def run(name: str) -> str:
    """Run the script and return its output; warnings of other packages go to standard error."""
    for package in NEEDS[name]:
        pytest.importorskip(package)
    if name == "aotinductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("AOTInductor needs a C++ compiler, and there is none")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run() -> None:
    assert sorted(NEEDS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "pass_manager"])
def test_int8(name: str) -> None:
    printed = run(name)
    accuracy = {k: float(v) for k, v in re.findall(r"^(.+): accuracy ([\d.]+)%", printed, re.MULTILINE)}
    assert set(accuracy) == {"dense", "pruned", "int8", "pruned + int8"}
    assert accuracy["dense"] == pytest.approx(99.50, abs=0.005)  # 594 of 597
    assert all(abs(value - accuracy["dense"]) <= WITHIN for value in accuracy.values())
    if name in WRITES_FILES:
        size = {k: int(v.replace(",", "")) for k, v in re.findall(r"^(.+): accuracy .*, ([\d,]+) KiB", printed, re.M)}
        assert size["pruned"] < size["dense"]
        assert size["pruned + int8"] < size["int8"] < size["dense"]
    if name in SAYS_PARITY:
        parity = {k: float(v) for k, v in re.findall(r"^(\w+): differs from PyTorch by (\S+)", printed, re.MULTILINE)}
        assert 0 <= parity["dense"] < PARITY
        assert 0 <= parity["pruned"] < PARITY


def test_pass_manager() -> None:
    printed = run("pass_manager")
    before, after = (int(n.replace(",", "")) for n in re.findall(r"^parameters: ([\d,]+)", printed, re.MULTILINE))
    # 1075 of 1536 hidden neurons, each with 64 weights in, 64 out and one bias
    assert before - after == round(0.7 * 6 * 256) * (64 + 64 + 1)
    assert "modified: True" in printed
    dense, pruned = (float(v) for v in re.findall(r"accuracy ([\d.]+)%", printed))
    assert abs(dense - pruned) <= WITHIN


def test_the_page_shows_code_of_the_examples() -> None:
    sources = "\n".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    shown = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(shown) >= 5
    for code in shown:
        assert code in sources, code
