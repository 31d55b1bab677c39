"""The results of bench, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vbpfx.display.tables import counted, table
from vbpfx.measurement.timing import Spread
from vbpfx.outputs.differences import PARITY

_WIDTH = 160  # characters of the printed table


@dataclass(frozen=True)
class Side:
    """The results of one network in one runtime.

    Attributes:
        seconds: the time per call; None if the runtime failed.
        parity: the largest relative difference from the reference outputs.
        size: the bytes of the file that would be shipped; None if the runtime writes none.
        failure: the error message if the runtime failed.
        memory: the bytes that loading the shipped file and running one batch take (:mod:`vbpfx.runtimes.memory`); None
            if they were not measured.
        unmeasured: why the memory could not be measured, if it was tried.
    """

    seconds: Spread | None = None
    parity: float | None = None
    size: int | None = None
    failure: str | None = None
    memory: int | None = None
    unmeasured: str | None = None


@dataclass(frozen=True)
class Row:
    """The dense and the pruned network in one runtime, at one batch size and number of threads.

    :mod:`vbpfx.measurement.bench` defines speed-up and efficiency.
    """

    runtime: str
    batch: int
    threads: int
    dense: Side
    pruned: Side
    speedup: Spread | None
    efficiency: float | None

    @property
    def samples_per_second(self) -> tuple[float, float] | None:
        """The samples per second of dense and pruned, by median seconds; None if either failed."""
        if self.dense.seconds is None or self.pruned.seconds is None:
            return None
        return self.batch / self.dense.seconds.median, self.batch / self.pruned.seconds.median


@dataclass(frozen=True)
class BenchResult:
    """The result of :func:`bench`. Printing it shows a table.

    Attributes:
        rows: one row for each runtime, number of threads and batch size.
        macs: MACs per sample ``(dense, pruned)``; None if they cannot be counted (ONNX files, and networks that cannot
            be traced).
        rounds: how often each network was timed.
        versions: package -> version, for the packages of the runtimes.
    """

    rows: tuple[Row, ...]
    macs: tuple[int, int] | None
    rounds: int
    versions: dict[str, str]

    @property
    def problems(self) -> list[str]:
        """Messages about failed runtimes, outputs that differ by more than 1e-4, and memory that was not measured."""
        found = []
        several = len({row.threads for row in self.rows}) > 1
        for row in self.rows:
            for name, side in (("dense", row.dense), ("pruned", row.pruned)):
                where = f"{row.runtime}, {name}, batch {row.batch}"
                where += f", {counted(row.threads, 'thread')}" if several else ""
                if side.failure:
                    found.append(f"{where}: {side.failure}")
                elif side.parity is not None and not side.parity <= PARITY:
                    found.append(f"{where}: differs by {side.parity:.1e} of the output's size, allowed {PARITY:.0e}")
                if side.unmeasured:
                    found.append(f"{where}: {side.unmeasured}")
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BenchResult:
        """Restore a result from the dictionaries of :meth:`to_json`, after they were written as JSON and read again.

        Args:
            data: the dictionaries.
        """
        return cls(
            tuple(_row(row) for row in data["rows"]),
            tuple(data["macs"]) if data["macs"] else None,
            data["rounds"],
            dict(data["versions"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-ready dictionaries."""
        return {
            "macs": self.macs,
            "rounds": self.rounds,
            "versions": self.versions,
            "rows": [_dictionaries(row) for row in self.rows],
        }

    def __str__(self) -> str:
        title = f"dense against pruned, medians of {self.rounds} interleaved rounds"
        if self.macs:
            title += f"; MACs {self.macs[0]:,} -> {self.macs[1]:,} ({self.macs[0] / self.macs[1]:.2f}x less)"
        columns = ("runtime", "threads", "batch", "ms", "samples/s", "speed-up", "efficiency", "parity", "MB",
                   "memory MiB")  # fmt: skip
        text = table(title, columns, [_cells(row) for row in self.rows], width=_WIDTH)
        return text + "".join(f"{problem}\n" for problem in self.problems)


def _dictionaries(row: Row) -> dict[str, Any]:
    """Return a row for JSON. A parity that is infinite or NaN becomes text, because JSON has no such numbers."""
    found = asdict(row) | {"samples_per_second": row.samples_per_second}
    for name in ("dense", "pruned"):
        if found[name]["parity"] is not None and not math.isfinite(found[name]["parity"]):
            found[name]["parity"] = str(found[name]["parity"])
    return found


def _row(data: Mapping[str, Any]) -> Row:
    def spread(measured: Mapping[str, float] | None) -> Spread | None:
        return Spread(**measured) if measured else None

    def side(measured: Mapping[str, Any]) -> Side:
        parity = measured["parity"]
        seconds, parity = spread(measured["seconds"]), None if parity is None else float(parity)
        return Side(**{**measured, "seconds": seconds, "parity": parity})

    dense, pruned = side(data["dense"]), side(data["pruned"])
    place = data["runtime"], data["batch"], data["threads"]
    return Row(*place, dense, pruned, spread(data["speedup"]), data["efficiency"])


def _cells(row: Row) -> list[Any]:
    cells: list[Any] = [row.runtime, row.threads, row.batch]
    if row.speedup is None or row.dense.seconds is None or row.pruned.seconds is None or row.samples_per_second is None:
        return [*cells, *["failed"] * 3, "-", "-", "-", "-"]
    dense, pruned = row.dense.seconds, row.pruned.seconds
    rate, now = row.samples_per_second
    return [
        *cells,
        f"{_ms(dense)} -> {_ms(pruned)}",
        f"{rate:.1f} -> {now:.1f}",
        f"{row.speedup.median:.2f} ({row.speedup.lower:.2f}-{row.speedup.upper:.2f})",
        "-" if row.efficiency is None else f"{row.efficiency:.2f}",
        f"{row.dense.parity:.0e}, {row.pruned.parity:.0e}",
        "-" if row.dense.size is None or row.pruned.size is None
        else f"{row.dense.size / 1e6:.1f} -> {row.pruned.size / 1e6:.1f}",
        "-" if row.dense.memory is None or row.pruned.memory is None
        else f"{row.dense.memory / 2**20:.1f} -> {row.pruned.memory / 2**20:.1f}",
    ]  # fmt: skip


def _ms(seconds: Spread) -> str:
    return f"{seconds.median * 1e3:.{1 if seconds.median > 0.01 else 3}f}"
