"""`import vbpfx` and `vbpfx --help` import only what they need, and no module hides a public name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vbpfx

PACKAGE = Path(vbpfx.__file__).parent
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "networkx", "timm", "jinja2")


def _child(script: str) -> str:
    """Run a script in a new process and return its output."""
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


def test_no_file_is_called_like_a_public_name() -> None:
    """Importing a file ``vbpfx/prepare.py`` would replace the function ``vbpfx.prepare`` by the module."""
    inside = {path.stem for path in PACKAGE.iterdir()}
    assert "pipeline" in inside
    assert not inside & set(vbpfx.__all__)


def test_what_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'vbpfx' has no attribute 'nothing'"):
        vbpfx.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The imports under TYPE_CHECKING, the table of lazy imports and __all__ agree."""
    (block,) = [node for node in ast.parse(Path(vbpfx.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {name.name: entry.module for entry in block.body for name in entry.names}  # type: ignore[attr-defined]
    assert seen == {name: f"vbpfx.{home}" for name, home in vbpfx._HOME.items()}
    assert sorted(seen) == vbpfx.__all__ == sorted(vbpfx.__all__)
    assert set(vbpfx.__all__) <= set(dir(vbpfx))
