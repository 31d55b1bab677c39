"""What `import vbpfx` and `vbpfx --help` import, and that no order of imports puts a module where a public name is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vbpfx

PACKAGE = Path(vbpfx.__file__).parent
# public names that are files, too
SHARED = sorted(name for name in vbpfx.__all__ if (PACKAGE / f"{name}.py").exists())
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "networkx", "timm")


def _child(script: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_vbpfx_imports_nothing_heavy() -> None:
    found = _child(f"import sys, vbpfx; dir(vbpfx); print([n for n in {HEAVY} if n in sys.modules])")
    assert found == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("demo", "inspect", "prune", "bench", "onnx", "eval", "finetune")),
    ],
    ids=str,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        f"import sys; sys.argv[1:] = {arguments}\n"
        "import vbpfx.cli\n"
        "try: vbpfx.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert _child(script).splitlines()[-1] == "[]"


ORDERS = {
    "the file first": "import_module(f'vbpfx.{name}')",
    "the name first": "getattr(vbpfx, name); import_module(f'vbpfx.{name}')",
    "out of the file": "exec(f'from vbpfx.{name} import {name}')",
    "the file again": "import_module(f'vbpfx.{name}'); del sys.modules[f'vbpfx.{name}']; import_module(f'vbpfx.{name}')",
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_public_name_is_never_the_file_of_that_name(order: str) -> None:
    """In one child for all names, forwards and backwards: importing one file imports others."""
    assert {"prepare", "capture", "verify", "calibrate", "bench", "finetune", "convert"} <= set(SHARED)
    for names in (SHARED, SHARED[::-1]):
        script = (
            "import sys, types, vbpfx\nfrom importlib import import_module\n"
            f"for name in {names}: {ORDERS[order]}\n"
            f"print([n for n in {names} if not isinstance(getattr(vbpfx, n), types.FunctionType)],"
            f" [n for n in {names} if not isinstance(sys.modules['vbpfx.' + n], types.ModuleType)])"
        )
        assert _child(script) == "[] []"


def test_files_are_attributes_and_what_is_not_there_is_none() -> None:
    script = "import vbpfx; print(vbpfx.budget.Budget.__name__); print(hasattr(vbpfx, 'nothing'))"
    assert _child(script) == "Budget\nFalse"
    with pytest.raises(AttributeError, match="module 'vbpfx' has no attribute 'nothing'"):
        vbpfx.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The imports under TYPE_CHECKING, the table of files, and __all__ say the same."""
    (block,) = [node for node in ast.parse(Path(vbpfx.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {name.name: entry.module for entry in block.body for name in entry.names}  # type: ignore[attr-defined]
    assert seen == {name: f"vbpfx.{home}" for name, home in vbpfx._HOME.items()}
    assert sorted(seen) == vbpfx.__all__ == sorted(vbpfx.__all__)
    assert set(vbpfx.__all__) <= set(dir(vbpfx))
