"""Checkpoints of a calibration: the file from which an interrupted run continues."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from vbpfx.calibration.gathered import put_back, to_tensors
from vbpfx.calibration.observer import Observer
from vbpfx.data.inputs import Inputs
from vbpfx.distributed.ranks import Ranks
from vbpfx.errors import ArtifactError, CalibrationError
from vbpfx.storage.checkpoint import CALIBRATION, digest, load_checkpoint, save_checkpoint
from vbpfx.storage.files import make_folder

# To recognise a batch, at most about this many values of each of its tensors are compared.
_VALUES = 4096


class Work(Protocol):
    """What a calibration does with every batch. Implementations must not change the batches."""

    def run(self, batch: Inputs, start: int) -> None:
        """Run a batch, which is on the model's device; ``start`` is the number of its first sample in all data."""

    def run_before(self, batch: Inputs, start: int) -> None:
        """Handle a batch that was run before the checkpoint was written."""

    def state(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint must hold."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned."""


class CalibrationFile:
    """One rank's checkpoint: what the observers have gathered, from how many batches, and from which ones.

    Attributes:
        every: the number of the rank's batches after which the file is written.
    """

    def __init__(self, path: Path, every: int, run: Mapping[str, Any]) -> None:
        self.path, self.every, self._run = path, every, run
        self._known = hashlib.sha256()
        self._batches, self._theirs = 0, ""

    @classmethod
    def of(
        cls, folder: str | Path | None, every: int, observed: fx.GraphModule, ranks: Ranks, settings: Mapping[str, Any]
    ) -> CalibrationFile | None:
        """Return this rank's file in a folder; None without a folder.

        Raises:
            CalibrationError: ``every`` is smaller than 1.
            ArtifactError: the folder cannot be made, or files in it cannot be written.
        """
        if every < 1:
            raise CalibrationError(f"checkpoint_every must be at least 1, found {every}")
        if folder is None:
            return None
        name = f"calibration.{ranks.rank}.safetensors" if ranks.rank else "calibration.safetensors"
        gathering = [
            f"{o.name} {o.axis} {o.start} {o.step} {o.size} {o.stride} {o.counting} {o.divisor} {o.width} {o.masked} {o.every} {o.rows_a_sample}"
            for o in observed.children()
            if isinstance(o, Observer)
        ]
        run = {
            "network": digest(observed),
            "observers": hashlib.sha256("\n".join(gathering).encode()).hexdigest(),
            "number of ranks": ranks.count,
            "data of their own": ranks.own,
            **settings,
        }
        return cls(make_folder(Path(folder)) / name, every, run)

    def load(self, watching: Sequence[Observer], work: Work, device: torch.device) -> int:
        """Restore the observers and the work from the file. Return how many batches it covers, 0 without a file.

        Raises:
            ArtifactError: the file is damaged or belongs to another run.
        """
        if not self.path.exists():
            return 0
        tensors, data = load_checkpoint(CALIBRATION, self.path, self._run)
        put_back(watching, tensors, data["counts"], device)
        prefix = "work/"
        work.restore({n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)})
        self._batches, self._theirs = data["batches"], data["known by"]
        return self._batches

    def note(self, batch: Inputs, number: int) -> None:
        """Record which batch comes next, before it is run; ``number`` counts from 1.

        Raises:
            ArtifactError: it is the last batch that the file covers, and the file was written with other batches.
        """
        for tensor in batch.tensors:
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // _VALUES)].cpu().contiguous()
            self._known.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            self._known.update(some.view(torch.uint8).numpy().data)
        if number == self._batches and self._known.hexdigest() != self._theirs:
            raise ArtifactError(
                f"{self.path} was written with other data: the first {number} batches passed now differ from the batches that it was written with. Pass the same batches in the same order (no shuffling), or {CALIBRATION.instead}"
            )

    def save(self, watching: Sequence[Observer], work: Work, batches: int) -> None:
        """Write what was gathered from the first ``batches`` batches."""
        tensors, counts = to_tensors(watching)
        tensors |= {f"work/{name}": tensor for name, tensor in work.state().items()}
        data = {"batches": batches, "counts": counts, "known by": self._known.hexdigest()}
        save_checkpoint(CALIBRATION, self.path, self._run, tensors, data)
        self._batches = batches

    def finish(self, watching: Sequence[Observer], work: Work, batches: int) -> None:
        """Write what was gathered from all batches, unless the file holds it already.

        Raises:
            ArtifactError: the file covers more batches than the data has.
        """
        if batches < self._batches:
            raise ArtifactError(
                f"{self.path} covers {self._batches} batches, but the data has only {batches}; pass the same data, or {CALIBRATION.instead}"
            )
        if batches > self._batches:
            self.save(watching, work, batches)
