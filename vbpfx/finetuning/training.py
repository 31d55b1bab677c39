"""The training loop of a distillation: steps, evaluations, the best weights, and resuming from a checkpoint.

One step takes ``accumulate`` batches in each process. With n_i samples in batch i, N = sum n_i and L_i the mean loss
over its samples, the gradient is that of

    L = 1/N sum_i n_i L_i,    L_i = output loss + feature_weight * feature loss (+ cross-entropy of labels),

so that the result does not depend on how a step's samples are split into batches or over processes.

Every step draws its random numbers (dropout, augmentation) from a seed of its own, which is made of the run's seed, the
step and the process. So no generator state has to be saved, and an interrupted run resumes exactly.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vbpfx.data.inputs import LABELS, Inputs, named_labels
from vbpfx.display.progress import loss_bar
from vbpfx.distributed.meeting import exchanging
from vbpfx.errors import FinetuneError
from vbpfx.finetuning.distillation import COMPARED, Distillation, choose_features, choose_outputs, label_loss
from vbpfx.finetuning.processes import Processes, seed_everything
from vbpfx.finetuning.recipes import Recipe
from vbpfx.finetuning.training_data import TrainingData, chunks, seed_of
from vbpfx.finetuning.training_state import TrainingState
from vbpfx.outputs.watched import Watched
from vbpfx.storage.checkpoint import FINETUNE, load_checkpoint, save_checkpoint

Stop = Literal["epochs", "patience", "time"]

# The teacher's variances are measured on at most this many batches.
_SCALE_BATCHES = 8
# Keys that keep the seeds of steps and of held-out data apart from that of the data's order.
_STEP, _HELD_OUT = 1, 2


@dataclass(frozen=True)
class Settings:
    """The settings of a run besides its recipe.

    Attributes:
        read: converts a batch to the arguments of the forward call.
        labels: whether labels contribute to the loss.
        augment: changes the arguments of a training batch.
        accumulate: batches per step, in each process.
        seed: the seed of the data's order and all random numbers.
        sharded: whether the networks are sharded. Then all processes must run them equally often.
    """

    read: Callable[[Any], Inputs]
    labels: bool
    augment: Callable[[Inputs], Inputs] | None
    accumulate: int
    seed: int
    sharded: bool


class Training:
    """A training run.

    The network is trained in place, and must have the same weights in every process. Network and teacher must be on the
    process's device, the teacher in eval mode.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        trained: Sequence[nn.Parameter],
        data: TrainingData,
        recipe: Recipe,
        measure: Distillation,
        settings: Settings,
        processes: Processes,
    ) -> None:
        self.network, self.teacher, self.trained, self.data = network, teacher, trained, data
        self.recipe, self.measure, self.settings, self.processes = recipe, measure, settings, processes
        self.optimizer = processes.prepare(
            torch.optim.AdamW(
                [{"params": trained, "initial_lr": recipe.learning_rate}],
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
            )
        )
        self.state = TrainingState(network, self.optimizer)
        self.deadline = math.inf
        self.path: Path | None = None
        self.every: int | None = None
        self._identity: dict[str, Any] = {}

    def choose_features(self, patterns: Sequence[str] | str | None, outputs: Sequence[str] | str | None = None) -> None:
        """Choose the modules and the further outputs to compare, and measure the variances of the teacher's values."""
        self.network.eval()
        examples = list(itertools.islice(self._examples(), _SCALE_BATCHES))
        if not examples:
            raise FinetuneError("validation is empty: pass at least one batch")
        self._stand_in = examples[0]
        with torch.no_grad():
            if self.recipe.feature_weight:
                self.measure.features = choose_features(
                    self.network, self.teacher, examples[0], patterns, self.measure.loss
                )
            with self._watched(self.teacher) as teacher:
                dense = teacher(examples[0])
                with self._watched(self.network) as student:
                    self.measure.others = choose_outputs(student(examples[0]), dense, outputs)
                self.measure.measure_scales((inputs, teacher(inputs)) for inputs in examples)

    def keep_in(self, folder: Path, every: int | None, resume: bool, digests: Mapping[str, str]) -> None:
        """Write checkpoints to a folder, and resume from the one that is there if ``resume``.

        Args:
            folder: the folder.
            every: the number of steps between checkpoints; None writes one only after every epoch.
            resume: whether to resume.
            digests: the digests of student and teacher, by which a checkpoint of another run is recognised.
        """
        self.path, self.every = folder / "finetune.safetensors", every
        self._identity = {
            **digests,
            "recipe": asdict(self.recipe),
            "loss": self.measure.loss,
            "labels": self.settings.labels,
            "features": list(self.measure.features),
            **({"outputs": list(self.measure.others)} if self.measure.others else {}),
            "trained parameters": len(self.trained),
            "batches": len(self.data.order(0)),
            "batches a step": self.settings.accumulate * self.processes.count,
            "seed": self.settings.seed,
        }
        if resume and self.path.exists():
            tensors, data = load_checkpoint(FINETUNE, self.path, self._identity)
            self.state.unpack(tensors, data)
            self.measure.scales = data["scales"]
            if self.processes.scaler is not None:
                self.processes.scaler.load_state_dict(data["scaler"])

    def run(self, max_seconds: float, progress: bool) -> Stop:
        """Train, and leave the best weights in the network. Return why training ended."""
        self.deadline = time.monotonic() + max_seconds
        size = self.settings.accumulate * self.processes.count
        steps = len(chunks(self.data.order(0), size)) * self.recipe.epochs
        self._schedule = self.recipe.schedule(self.optimizer, self.state.position.step, steps)
        with (
            self._watched(self.network) as student,
            self._watched(self.teacher) as teacher,
            loss_bar("fine-tuning", steps, progress and self.processes.first, self.state.position.step) as show,
        ):
            self._student, self._teacher = student, teacher
            if not self.state.history:
                self._record(None)
                held_out = self.state.history[0].held_out_loss
                if held_out is not None and not math.isfinite(held_out):
                    raise FinetuneError(
                        f"the student's loss on the held-out data is {held_out} before any step: "
                        f"look at its outputs, and the teacher's, for NaN or infinity"
                    )
            stopped = self._run_epochs(size, show)
        self.state.restore_best()
        return stopped

    def _run_epochs(self, size: int, show: Callable[[int, float], None]) -> Stop:
        at = self.state.position
        while at.epoch < self.recipe.epochs:
            if self._impatient():
                return "patience"
            groups = chunks(self.data.order(at.epoch), size)[at.group :]
            own = [group[self.processes.rank :: self.processes.count] for group in groups]
            batches = self.data.read([unit for group in own for unit in group])
            over = False
            for number, group in enumerate(own, start=1):
                over = self._step(itertools.islice(batches, len(group)))
                show(at.step, at.mean_loss)
                if over and number < len(own):
                    self._save()
                    self._record(at.mean_loss)  # recorded after saving, since an uninterrupted run has no such entry
                    return "time"
                if self.every is not None and at.step % self.every == 0:
                    self._save()
            at.epoch, at.group = at.epoch + 1, 0
            self._record(at.mean_loss)
            at.loss = at.samples = 0.0
            self._save()
            if over and at.epoch < self.recipe.epochs and not self._impatient():
                return "time"
        return "epochs"

    def _step(self, batches: Iterator[Any]) -> bool:
        """Make one step of the optimizer. Return whether the time is over in any process."""
        at, rate = self.state.position, self._schedule.get_last_lr()[0]
        self._seed(_STEP, at.step, self.processes.rank)
        self.network.train()
        self.optimizer.zero_grad()
        loss = samples = 0.0
        for inputs, labels, counts in self._arguments(batches):
            if counts and self.settings.augment is not None:
                inputs = self.settings.augment(inputs)
            with self.processes.autocast():
                with torch.no_grad():
                    target = self._teacher(inputs)
                ours = self._student(inputs)
                total = self.measure.output_loss(inputs, ours, target)
                if self.measure.features:
                    total = total + self.recipe.feature_weight * self.measure.feature_loss(inputs, ours, target)
                if labels is not None:
                    total = total + label_loss(ours.output, labels)
            count = len(ours.output) * counts
            with exchanging():
                self.processes.backward(total * count)
            loss, samples = loss + total.item() * count, samples + count
        loss, samples, late = self.processes.sums([loss, samples, time.monotonic() >= self.deadline])
        if not math.isfinite(loss):
            raise FinetuneError(
                f"the loss is {loss / samples} at step {at.step + 1} (epoch {at.epoch + 1}, learning rate {rate:.3g}). Lower learning_rate, and look for NaN in the data. With mixed_precision='fp16', look for overflow, too, or use 'bf16', which has none"
            )
        self.processes.sum_gradients(self.trained)
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad /= samples
        if self.recipe.max_norm is not None:
            self.processes.clip(self.trained, self.recipe.max_norm)
        self.optimizer.step()
        self._schedule.step()
        at.group, at.step = at.group + 1, at.step + 1
        at.loss, at.samples = at.loss + loss, at.samples + samples
        return late > 0

    def _held_out_loss(self) -> float | None:
        if not self.data.measured:
            return None
        self._seed(_HELD_OUT)
        self.network.eval()
        loss = samples = 0.0
        with torch.no_grad(), self.processes.autocast():
            for inputs, _, counts in self._arguments(self.data.held_out(self.processes.rank, self.processes.count)):
                ours, target = self._student(inputs), self._teacher(inputs)
                count = len(ours.output) * counts
                loss, samples = (
                    loss + self.measure.output_loss(inputs, ours, target).item() * count,
                    samples + count,
                )
        loss, samples = self.processes.sums([loss, samples])
        return loss / samples

    def _record(self, train_loss: float | None) -> None:
        # the running statistics of BatchNorm differ between processes
        self.processes.broadcast(self.network.buffers())
        with self.state.mixed(self.recipe.mixing):
            self.state.record(train_loss, self._held_out_loss())

    def _impatient(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and len(self.state.history) - 1 - self.state.position.best >= patience

    def _arguments(self, batches: Iterator[Any]) -> Iterator[tuple[Inputs, Tensor | None, bool]]:
        """Yield the arguments and labels of each batch, and whether it counts.

        If a process of a sharded network has no batch left while others have, it runs an earlier batch again, which
        does not count.
        """
        for batch in self.processes.evenly(batches) if self.settings.sharded else batches:
            yield (self._stand_in, None, False) if batch is None else (*self._read(batch), True)

    def _read(self, batch: Any) -> tuple[Inputs, Tensor | None]:
        """Return the arguments of a batch on the device, without labels, and the labels if the loss uses them."""
        inputs = self.settings.read(batch)
        labels = inputs.kwargs.get(LABELS, named_labels(batch))
        own = inputs.unlabelled.to(self.processes.device)
        if not self.settings.labels:
            return own, None
        if isinstance(batch, (tuple, list)) and len(batch) > 1 and labels is None:
            labels = batch[1]
        if not isinstance(labels, Tensor):
            raise FinetuneError(
                f"labels=True, and a batch (a {type(batch).__name__}) has none: pass (inputs, labels), or a mapping with labels"
            )
        return own, labels.to(self.processes.device)

    def _examples(self) -> Iterator[Inputs]:
        """Yield held-out batches, or training batches if nothing is held out. They are the same in every process."""
        self._seed(_HELD_OUT)
        batches = (
            self.data.held_out(0, 1) if self.data.measured else self.data.read(self.data.order(0)[:_SCALE_BATCHES])
        )
        return (self._read(batch)[0] for batch in batches)

    def _seed(self, *key: int) -> None:
        seed_everything(seed_of(self.settings.seed, *key))

    @contextmanager
    def _watched(self, network: nn.Module) -> Iterator[Watched]:
        watched = Watched(network, self.measure.features, COMPARED[self.measure.loss], FinetuneError)
        try:
            yield watched
        finally:
            watched.stop()

    def _save(self) -> None:
        if self.path is None:
            return
        self.processes.broadcast(self.network.buffers())
        tensors, data = self.state.packed(keep=self.processes.first)
        if self.processes.first:
            scaler = self.processes.scaler
            data |= {"scales": self.measure.scales, "scaler": scaler.state_dict() if scaler is not None else None}
            save_checkpoint(FINETUNE, self.path, self._identity, tensors, data)
