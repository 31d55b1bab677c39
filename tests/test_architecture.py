"""The structure of the project: imports go in one direction, public names are documented, the wheel works."""

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


def _lines() -> list[list[str]]:
    """Return the packages of each layer of the import contract in pyproject.toml, from the top."""
    block = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    return [line.split(" | ") for line in re.findall(r'"(.*)"', block[1])]


def _modules() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted(name for name in files if not name.endswith(("__init__", "__main__")))


def test_every_package_has_its_line_in_the_contract() -> None:
    assert sorted(package for line in _lines() for package in line) == sorted({n.split("/")[0] for n in _modules()})


def test_onnx_runtime_is_opened_in_one_place() -> None:
    opening = [name for name in _modules() if "InferenceSession(" in (PACKAGE / f"{name}.py").read_text()]
    assert opening == ["onnx_session/session"]


def test_nothing_but_errors_stands_beside_the_packages() -> None:
    assert [name for name in _modules() if "/" not in name] == ["errors"]


def test_the_map_shows_every_package_in_the_order_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    level = {package: number for number, line in enumerate(_lines()) for package in line}
    assert sorted(shown) == sorted(level)
    assert [level[package] for package in shown] == sorted(level[package] for package in shown)


@pytest.mark.parametrize("name", _modules())
def test_imports_go_down_alone(name: str) -> None:
    """Packages import only from layers below their own, and every file has a docstring."""
    level = {package: number for number, line in enumerate(_lines()) for package in line}
    package = name.split("/")[0]
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vbpfx."):
            imported = node.module.split(".")[1]
            assert imported == package or level[imported] > level[package], f"{name} imports {node.module} from above"


@pytest.mark.parametrize("name", vbpfx.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    documented = getattr(vbpfx, name)
    assert inspect.getdoc(documented)
    assert documented.__module__.startswith("vbpfx.")


def test_a_wheel_builds_and_works_outside_the_checkout(tmp_path: Path) -> None:
    """The wheel is installed without dependencies, which the environment already has; it must contain the weights."""
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
