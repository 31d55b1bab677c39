"""The shape of the project: imports in one direction, one public door, a wheel that works."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vbpfx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vbpfx"


def _layers() -> list[str]:
    """Module names in the order that docs/architecture.md lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"<!-- layers -->(.*?)<!-- /layers -->", text, re.DOTALL)
    assert block is not None
    return re.findall(r"^\| `([\w/]+)\.py`", block.group(1), re.MULTILINE)


def _modules() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted(name for name in files if not name.endswith(("__init__", "__main__")))


def test_every_file_has_its_place_in_the_architecture() -> None:
    assert sorted(_layers()) == _modules()


def test_the_files_of_a_package_stand_together() -> None:
    """So that packages, too, import in one direction alone."""
    packages = [name.partition("/")[0] for name in _layers() if "/" in name]
    begun = [package for package, before in zip(packages, ["", *packages], strict=False) if package != before]
    assert len(begun) == len(set(begun))
    named = re.findall(r"^\*\*`(\w+)/`\*\*", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert [name for name in named if name != "vbpfx"] == begun


@pytest.mark.parametrize("name", _modules())
def test_imports_go_up_alone(name: str) -> None:
    order = _layers()
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vbpfx."):
            imported = node.module.removeprefix("vbpfx.").replace(".", "/")
            assert order.index(imported) < order.index(name), f"{name} imports {imported} from below"


@pytest.mark.parametrize("name", vbpfx.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    documented = getattr(vbpfx, name)
    assert inspect.getdoc(documented)
    assert documented.__module__.startswith("vbpfx.")


def test_a_wheel_builds_and_works_outside_the_checkout(tmp_path: Path) -> None:
    """Installed without its dependencies beside the environment that has them; the shipped weights must be in it."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    script = (
        "import torch, vbpfx; from vbpfx.demo.digits import load_trained; model = load_trained();"
        "pruned = vbpfx.prune(model, [torch.randn(4, 1, 8, 8)], ratio=0.5, progress=False);pruned.save('small');"
        "print(vbpfx.__file__, pruned.plan.removed)"
    )
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.stdout.split() == [str(target / "vbpfx" / "__init__.py"), "768"]
