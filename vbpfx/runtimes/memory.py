"""What a runtime holds of a network: the peak memory of a process that loads what is shipped, and runs one batch.

The process is a new one. Its peak is read once the runtime and the inputs are there, and again behind the batch: the difference is
what the file, whatever the runtime lays out anew while it loads, and the activations take. The runtime itself is not in it, but for
parts that it loads with its first network.

On Linux the peak is that of the process's own memory (``VmHWM``), counted from zero when the first is read: ``ru_maxrss`` begins
with what the parent had, since a new program inherits it.
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

# Seconds for importing a runtime, loading a file and one batch.
_PATIENCE = 600.0


def peak_memory(name: str, file: Path, inputs: Inputs, threads: int | None, *, patience: float = _PATIENCE) -> int:
    """Bytes by which a process's peak memory grows when the runtime of that name loads the file and runs the inputs.

    Raises:
        ExportError: the process fails, takes longer than ``patience`` seconds, or the platform does not tell.
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
            last = lines[-1] if lines else "it said nothing"
            raise ExportError(f"its memory was not measured: the process ended with status {status}: {last}") from error
    return int(found["after"]) - int(found["before"])


def _run(words: list[str], environment: Mapping[str, str], said: Path, patience: float) -> int:
    """The exit status of a program. What it says goes to a file: a pipe would stay open with whatever it started in turn."""
    with said.open("wb") as errors:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(patience)
        except BaseException:  # too long, or the user's Ctrl-C
            if hasattr(os, "killpg"):  # not on Windows
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            raise


def _peak() -> int:
    """Bytes of this process's memory at its highest so far."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _measure(name: str, file: str, given: str, threads: str, answer: str, patience: str) -> None:
    faulthandler.dump_traceback_later(float(patience), exit=True)  # where nobody waits any more
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
