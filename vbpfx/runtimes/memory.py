"""Measure the memory of a network in a runtime: the peak of a process that loads the shipped file and runs one batch.

A new process is started. Its peak memory is read after the runtime and the inputs are loaded, and again after the
batch. The difference is the memory of the weights, in the form to which the runtime converts them, and of the
activations. It does not include the runtime itself, except for parts that the runtime loads with its first network.

On Linux, the peak of the process's own memory (``VmHWM``) is used, and reset before the first reading. ``ru_maxrss``
cannot be used, because a new program inherits its parent's value.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from vbpfx.data.inputs import Inputs
from vbpfx.errors import ExportError, first_line
from vbpfx.runtimes.table import runtime

# The most seconds for importing a runtime, loading a file and running one batch.
_PATIENCE = 600.0


def peak_memory(name: str, file: Path, inputs: Inputs, threads: int | None, *, patience: float = _PATIENCE) -> int:
    """Return by how many bytes a process's peak memory grows when a runtime loads the file and runs the inputs.

    Args:
        name: the name of the runtime.

    Raises:
        ExportError: the process fails or takes longer than ``patience`` seconds, or the platform does not report
            memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer, said = (Path(folder) / name for name in ("inputs.pt", "answer.json", "said.txt"))
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
            str(patience),
        ]
        paths = os.pathsep.join(path for path in (str(Path(__file__).parents[2]), *sys.path) if path)
        try:
            status = _run(words, os.environ | {"PYTHONPATH": paths}, said, patience)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"its memory was not measured: loading and one batch took over {patience:g} s") from error
        except OSError as error:
            raise ExportError(
                f"its memory was not measured: no process could be started ({first_line(error)})"
            ) from error
        try:
            found = json.loads(answer.read_text())
        except (OSError, ValueError) as error:
            lines = said.read_text(errors="replace").strip().splitlines()
            last = f": {lines[-1]}" if lines else ", without a message"
            raise ExportError(f"its memory was not measured: the process ended with status {status}{last}") from error
    return int(found["after"]) - int(found["before"])


def _run(words: list[str], environment: Mapping[str, str], said: Path, patience: float) -> int:
    """Run a program, and return its exit status. Its error output goes to the file ``said``.

    A pipe would stay open as long as any process that the program itself has started.
    """
    with said.open("wb") as errors:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(patience)
        except BaseException:  # a timeout, or the user's Ctrl-C
            if hasattr(os, "killpg"):  # Windows does not have it
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            raise


def _peak() -> int:
    """Return this process's peak memory so far, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Windows does not have it

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _measure(name: str, file: str, given: str, threads: str, answer: str, patience: str) -> None:
    faulthandler.dump_traceback_later(float(patience), exit=True)  # ends the process if its parent no longer waits
    load = runtime(name).load
    assert load is not None
    inputs = Inputs(*torch.load(given, weights_only=True))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    before = _peak()
    load(Path(file), inputs, int(threads) or None).run(inputs)
    Path(answer).write_text(json.dumps({"before": before, "after": _peak()}))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
