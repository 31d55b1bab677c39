"""The file that a calibration can go on from."""

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

# A batch is known again by at most so many values of each of its tensors.
_VALUES = 4096


class Work(Protocol):
    """What is done with the batches; they stay as they are."""

    def run(self, batch: Inputs, start: int) -> None:
        """A batch, on the model's device; ``start`` is the number of its first sample among those of all data."""

    def run_before(self, batch: Inputs, start: int) -> None:
        """A batch that had been run when the checkpoint was written."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint is to hold of it."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""


class CalibrationFile:
    """One rank's checkpoint: what observers have gathered, how many batches it is of, and which they were.

    Attributes:
        every: after how many of the rank's batches it is written.
    """

    def __init__(self, path: Path, every: int, run: Mapping[str, Any]) -> None:
        self.path, self.every, self._run = path, every, run
        self._known = hashlib.sha256()
        self._batches, self._theirs = 0, ""

    @classmethod
    def of(
        cls, folder: str | Path | None, every: int, observed: fx.GraphModule, ranks: Ranks, settings: Mapping[str, Any]
    ) -> CalibrationFile | None:
        """The rank's file in a folder; None without a folder.

        Raises:
            CalibrationError: ``every`` is not a number of batches.
            ArtifactError: the folder cannot be made or written.
        """
        if every < 1:
            raise CalibrationError(f"checkpoint_every must be at least 1, found {every}")
        if folder is None:
            return None
        name = f"calibration.{ranks.rank}.safetensors" if ranks.rank else "calibration.safetensors"
        gathering = [
            f"{o.name} {o.axis} {o.start} {o.step} {o.width} {o.masked} {o.every} {o.rows_a_sample}"
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
        """Give observers and work back what the file holds; returns of how many batches that is.

        Raises:
            ArtifactError: the file is damaged, or of another run.
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
        """Take note of a batch, counted from 1, before it is run.

        Raises:
            ArtifactError: it is the last one that the file holds, and they were others.
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
        """Write what was gathered from so many batches."""
        tensors, counts = to_tensors(watching)
        tensors |= {f"work/{name}": tensor for name, tensor in work.state().items()}
        data = {"batches": batches, "counts": counts, "known by": self._known.hexdigest()}
        save_checkpoint(CALIBRATION, self.path, self._run, tensors, data)
        self._batches = batches

    def finish(self, watching: Sequence[Observer], work: Work, batches: int) -> None:
        """Write what was gathered from all batches, if the file does not hold it yet.

        Raises:
            ArtifactError: the file is of more batches than there are.
        """
        if batches < self._batches:
            raise ArtifactError(
                f"{self.path} is of {self._batches} batches, the data has {batches}; pass the same data, or {CALIBRATION.instead}"
            )
        if batches > self._batches:
            self.save(watching, work, batches)
