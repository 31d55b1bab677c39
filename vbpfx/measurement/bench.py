"""Bench: measure the dense and the pruned network in the same run, in one or more runtimes.

Both networks are compiled for the same inputs, and run in turn. *Speed-up* is the median over rounds of dense seconds
divided by pruned seconds. *Efficiency* is the speed-up divided by the ratio of MACs. It is 1 if the runtime turns every
saved product into saved time. *Parity* is the largest difference between a runtime's outputs and PyTorch's, divided by
the largest output.

*Memory* is measured in a separate process that loads the shipped file and runs one batch
(:mod:`vbpfx.runtimes.memory`). It is not measured for a runtime that ships no file, because in this process the memory
of networks and compilers cannot be told apart.
"""

from __future__ import annotations

import functools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.errors import CaptureError, ExportError, first_line
from vbpfx.export.onnx import export_onnx
from vbpfx.graph.batch_axis import find_batch_axes
from vbpfx.graph.capture import capture, on_cpu, share_parameters
from vbpfx.measurement.bench_result import BenchResult, Row, Side
from vbpfx.measurement.timing import Clock, Spread, alternating
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import relative_error
from vbpfx.runtimes.interface import Compiled, Runtime
from vbpfx.runtimes.memory import peak_memory
from vbpfx.runtimes.table import runtime


def bench(
    dense: nn.Module,
    pruned: nn.Module,
    inputs: Any,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    rounds: int = 15,
    memory: bool = True,
    clock: Clock = time.perf_counter,
) -> BenchResult:
    """Measure the latency of the dense and the pruned network in the same run, in alternation.

    Args:
        dense, pruned: networks with the same arguments and outputs. They are not changed. Both are measured on the CPU;
            a network on another device is copied there.
        inputs: one batch, which is repeated or cut to the batch sizes.
        runtimes: names from :data:`vbpfx.runtimes.adapters.NAMES`.
        batches: batch sizes.
        threads: numbers of threads.
        rounds: how often each network is timed.
        memory: measure memory, too. This starts two processes for each row, and each imports the runtime.
        clock: a function that returns seconds. ``time.process_time`` does not count the time in which this process
            waits. On a busy machine it is the better clock for a single thread.

    Returns:
        One row for each runtime, number of threads and batch size. If a runtime does not accept a network, its row
        holds the error message instead of figures.

    Raises:
        ExportError: a runtime is unknown or not installed, a number is not positive, or the two networks do not have
            the same output shapes.
    """
    example = find_batch_axes(on_cpu(share_parameters(dense)), as_inputs(inputs, dense).to(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        sides = (_Network(dense, example, Path(folder) / "dense.onnx"),
                 _Network(pruned, example, Path(folder) / "pruned.onnx"))  # fmt: skip
        how = _Conditions(runtimes, batches, threads, rounds, memory, clock)
        return _bench(sides, example, _macs(dense, pruned, example), how)


def bench_files(
    dense: str | Path,
    pruned: str | Path,
    inputs: Inputs,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    rounds: int = 15,
    memory: bool = True,
    clock: Clock = time.perf_counter,
) -> BenchResult:
    """Measure two ONNX files as :func:`bench` does. The reference for parity is ONNX Runtime without its optimisations.

    Raises:
        ExportError: as for :func:`bench`, or a runtime does not accept ONNX files.
    """
    how = _Conditions(runtimes, batches, threads, rounds, memory, clock)
    return _bench((_File(Path(dense)), _File(Path(pruned))), inputs, None, how)


@dataclass(frozen=True)
class _Conditions:
    """The conditions under which both networks are measured; see :func:`bench`."""

    runtimes: Sequence[str]
    batches: Sequence[int]
    threads: Sequence[int]
    rounds: int
    memory: bool
    clock: Clock


class _Subject(ABC):
    """A network to compile, and its reference outputs."""

    @abstractmethod
    def compile(self, target: Runtime, inputs: Inputs, threads: int) -> Compiled: ...

    @abstractmethod
    def outputs(self, inputs: Inputs) -> list[Tensor]: ...


class _Network(_Subject):
    """A module. Runtimes that take ONNX files share one exported file."""

    def __init__(self, network: nn.Module, inputs: Inputs, path: Path) -> None:
        self.network, self.inputs, self.path = share_parameters(on_cpu(network)), inputs, path

    @functools.cached_property
    def file(self) -> Path:
        return export_onnx(self.network, self.inputs, self.path)

    def compile(self, target: Runtime, inputs: Inputs, threads: int) -> Compiled:
        if target.open is not None:
            return target.open(self.file, inputs, threads)
        return target.compile(self.network, inputs, threads)

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        try:
            return runtime("pytorch").compile(self.network, inputs, None).run(inputs)
        except Exception as error:  # the model may raise any exception
            raise ExportError(
                f"{type(self.network).__name__} does not run on the inputs ({inputs.describe()}): {first_line(error)}; pass "
                f"inputs that the model accepts (--shape or --data)"
            ) from error


class _File(_Subject):
    """An ONNX file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def compile(self, target: Runtime, inputs: Inputs, threads: int) -> Compiled:
        if target.open is None:
            raise ExportError(
                f"runtime {target.name} does not accept ONNX files; pass the networks instead of the files"
            )
        return target.open(self.path, inputs, threads)

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        try:
            return run_session(open_session(self.path, optimized=False), inputs)
        except Exception as error:  # ONNX Runtime has exceptions of its own
            raise ExportError(f"{self.path} does not run in ONNX Runtime: {first_line(error)}") from error


def _macs(dense: nn.Module, pruned: nn.Module, inputs: Inputs) -> tuple[int, int] | None:
    try:
        before, after = (sum(capture(network, inputs).macs.values()) for network in (dense, pruned))
    except CaptureError:
        return None
    return (before, after) if after else None


def _bench(
    sides: tuple[_Subject, _Subject],
    example: Inputs,
    macs: tuple[int, int] | None,
    how: _Conditions,
) -> BenchResult:
    if min((*how.batches, *how.threads, how.rounds)) < 1:
        raise ExportError("batch sizes, threads and rounds must be positive")
    chosen = [runtime(name) for name in how.runtimes]  # an unknown runtime is refused before any is measured
    batch_inputs = {size: example.resized(size) for size in how.batches}
    expected = {size: tuple(side.outputs(inputs) for side in sides) for size, inputs in batch_inputs.items()}
    for dense, pruned in expected.values():
        if [t.shape for t in dense] != [t.shape for t in pruned]:
            raise ExportError(
                f"dense returns shapes {[tuple(t.shape) for t in dense]}, pruned {[tuple(t.shape) for t in pruned]}: they are "
                f"not dense and pruned of one model"
            )
    ratio = macs[0] / macs[1] if macs else None
    rows = [
        _measure(taken, sides, batch_inputs[size], expected[size], count, how, ratio)
        for taken in chosen for count in how.threads for size in how.batches
    ]  # fmt: skip
    return BenchResult(
        tuple(rows), macs, how.rounds, {taken.about.package: _version(taken.about.package) for taken in chosen}
    )


def _measure(
    taken: Runtime,
    sides: tuple[_Subject, _Subject],
    inputs: Inputs,
    expected: tuple[list[Tensor], ...],
    threads: int,
    how: _Conditions,
    ratio: float | None,
) -> Row:
    found: list[Side] = []
    compiled: list[Compiled] = []
    for side, reference in zip(sides, expected, strict=True):
        try:
            made = side.compile(taken, inputs, threads)
            found.append(Side(parity=relative_error(made.run(inputs), reference), size=made.size))
            compiled.append(made)
        except ExportError as error:
            found.append(Side(failure=str(error)))
        except Exception as error:  # a runtime that compiles may still fail to run
            found.append(Side(failure=f"{taken.name} does not run the network: {first_line(error)}"))
    batch = inputs.batch_size or 1
    if len(compiled) < len(sides):
        return Row(taken.name, batch, threads, found[0], found[1], None, None)
    runs = {name: functools.partial(made.run, inputs) for name, made in zip(("dense", "pruned"), compiled, strict=True)}
    seconds = alternating(runs, rounds=how.rounds, clock=how.clock)
    speedup = Spread.of([a / b for a, b in zip(seconds["dense"], seconds["pruned"], strict=True)])
    memory = [_memory(taken, made, inputs, threads) if how.memory else (None, None) for made in compiled]
    dense, pruned = (
        Side(Spread.of(seconds[name]), side.parity, side.size, None, *own)
        for name, side, own in zip(("dense", "pruned"), found, memory, strict=True)
    )
    return Row(taken.name, batch, threads, dense, pruned, speedup, speedup.median / ratio if ratio else None)


def _memory(taken: Runtime, made: Compiled, inputs: Inputs, threads: int) -> tuple[int | None, str | None]:
    """Return the bytes and None, or None and why they were not measured; None twice if there is no file to load."""
    if taken.load is None or made.file is None:
        return None, None
    try:
        return peak_memory(taken.name, made.file, inputs, threads), None
    except ExportError as error:
        return None, str(error)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
