"""What a runtime holds of a network: the peak memory of a process that loads what is shipped, and runs one batch.

The process is a new one. Its peak is read once the runtime and the inputs are there, and again behind the batch: the difference is
what the file, whatever the runtime lays out anew while it loads, and the activations take. The runtime itself is not in it, but for
parts that it loads with its first network.

On Linux the peak is that of the process's own memory (``VmHWM``), counted from zero when the first is read: ``ru_maxrss`` begins
with what the parent had, since a new program inherits it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from vbpfx.errors import ExportError, first_line
from vbpfx.inputs import Inputs
from vbpfx.runtimes.table import runtime

# Seconds for importing a runtime, loading a file and one batch.
_PATIENCE = 600.0


def peak_memory(name: str, file: Path, inputs: Inputs, threads: int | None, *, patience: float = _PATIENCE) -> int:
    """Bytes by which a process's peak memory grows when the runtime of that name loads the file and runs the inputs.

    Raises:
        ExportError: the process fails, takes longer than ``patience`` seconds, or the platform does not tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "inputs.pt", Path(folder) / "answer.json"
        torch.save((inputs.args, inputs.kwargs), given)
        words = [
            sys.executable,
            "-m",
            "vbpfx.runtimes.memory",
            name,
            str(file),
            str(given),
            str(threads or 0),
            str(answer),
        ]
        paths = os.pathsep.join(path for path in (str(Path(__file__).parents[2]), *sys.path) if path)
        try:
            done = subprocess.run(
                words,
                env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=patience,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"its memory was not measured: loading and one batch took over {patience:g} s") from error
        except OSError as error:
            raise ExportError(
                f"its memory was not measured: no process could be started ({first_line(error)})"
            ) from error
        try:
            found = json.loads(answer.read_text())
        except (OSError, ValueError) as error:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            said = lines[-1] if lines else "it said nothing"
            raise ExportError(
                f"its memory was not measured: the process ended with status {done.returncode}: {said}"
            ) from error
    return int(found["after"]) - int(found["before"])


def _peak() -> int:
    """Bytes of this process's memory at its highest so far."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _measure(name: str, file: str, given: str, threads: str, answer: str) -> None:
    load = runtime(name).load
    assert load is not None
    inputs = Inputs(*torch.load(given, weights_only=True))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is what is there now
    before = _peak()
    load(Path(file), inputs, int(threads) or None).run(inputs)
    Path(answer).write_text(json.dumps({"before": before, "after": _peak()}))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
