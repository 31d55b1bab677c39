"""Fine-tuning: a pruned network learns from the dense one, without labels.

The losses are in :mod:`vbpfx.finetuning.distillation`, the hyperparameters in :mod:`vbpfx.finetuning.recipes`, the
split into training and held-out data in :mod:`vbpfx.finetuning.training_data`, and the loop in
:mod:`vbpfx.finetuning.training`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from vbpfx.data.inputs import Inputs, model_device, reader
from vbpfx.display.tables import table
from vbpfx.errors import FinetuneError
from vbpfx.finetuning.distillation import Distillation, Loss, matching
from vbpfx.finetuning.processes import Precision, Processes, generators_kept, processes
from vbpfx.finetuning.recipes import Recipe, make_recipe
from vbpfx.finetuning.sharding import gathered, views_allowed
from vbpfx.finetuning.sharding import shard as shard_network
from vbpfx.finetuning.training import Settings, Stop, Training
from vbpfx.finetuning.training_data import TrainingData, training_data
from vbpfx.finetuning.training_state import Epoch, parameters_and_buffers
from vbpfx.graph.capture import plain_tensors, require_module, share_parameters
from vbpfx.storage.checkpoint import digest
from vbpfx.storage.files import make_folder


@dataclass(frozen=True)
class FineTuned:
    """The result of :func:`finetune`. Printing it shows the epochs.

    Attributes:
        model: the network with the best weights, in eval mode, on the student's device.
        history: the losses at the start and after every epoch.
        best: the entry of the history whose weights ``model`` has.
        stopped: why training ended: all ``epochs`` were done, or ``patience`` or ``time`` ran out.
        features: the names of the modules whose outputs were matched.
    """

    model: nn.Module = field(repr=False)
    history: tuple[Epoch, ...]
    best: Epoch
    stopped: Stop
    features: tuple[str, ...]

    def __str__(self) -> str:
        def shown(loss: float | None) -> str:
            return "" if loss is None else f"{loss:.5g}"

        rows = [(e.epoch, e.step, shown(e.train_loss), shown(e.held_out_loss),
                 "best" if e is self.best else "") for e in self.history]  # fmt: skip
        columns = ("epoch", "steps", "training loss", "held-out loss", "")
        return table(f"Fine-tuned; stopped by {self.stopped}", columns, rows)


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    recipe: str | Recipe = "default",
    loss: Loss = "kl",
    labels: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    temperature: float | None = None,
    feature_weight: float | None = None,
    features: Sequence[str] | str | None = None,
    outputs: Sequence[str] | str | None = None,
    patience: int | None = None,
    mixing: float | None = None,
    held_out: float = 0.1,
    validation: Iterable[Any] | None = None,
    trainable: Sequence[str] | str | None = None,
    augment: Callable[[Inputs], Inputs] | None = None,
    mixed_precision: Precision = "no",
    accumulate: int = 1,
    shard: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    max_seconds: float | None = None,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FineTuned:
    """Train a copy of a pruned network to compute what the dense one computes.

    It runs on every device that ``accelerate`` supports: on a GPU if there is one, otherwise on the CPU
    (``ACCELERATE_USE_CPU=1`` forces it), and in several processes under ``torchrun``. Batches are per process: R
    processes take R batches in one step. Pass the whole ``data`` in every process; each reads its share.

    Args:
        student: ``Pruned.apply_to(model)``, which keeps its dropout and its blocks, or a GraphModule. It is not
            changed: a copy is trained, in train mode.
        teacher: the dense network. It is not changed, and runs in eval mode without gradients.
        data: batches as :func:`vbpfx.prune` takes them, in an iterable that can be iterated over once per epoch. A
            ``DataLoader`` with PyTorch's own samplers is split by samples, anything else by batches
            (:mod:`vbpfx.finetuning.training_data`).
        recipe: ``"default"`` (for little data), ``"few"`` (for no more data than pruning saw), ``"paper"``, or a
            :class:`vbpfx.finetuning.recipes.Recipe`. The options below override its numbers. The paper holds nothing
            out: ``held_out=0`` trains on everything, and returns the last weights.
        loss: ``"kl"`` (the default) for models that return logits over their last axis, ``"mse"`` for embeddings. This
            cannot be seen from a tensor, so pass ``"mse"`` for a network without a classifier.
        labels: add the cross-entropy of the labels, which are a batch's second entry or its ``labels``. They are
            compared position by position, so those of a language model must be shifted already. By default labels are
            ignored.
        epochs, learning_rate, weight_decay, temperature, feature_weight, patience, mixing: see
            :class:`vbpfx.finetuning.recipes.Recipe`.
        features: glob patterns for the names of modules whose outputs should match the teacher's; by default repeated
            blocks. They matter only if ``feature_weight`` is above 0.
        outputs: glob patterns for the names of further outputs that should match, if the networks return several
            tensors (``"boxes"``, ``"hidden_states.*"``; entries of a tuple are named by their index, ``"1"``). By
            default all of them, each relative to the variance of the teacher's. ``()`` trains only toward the logits
            (or values).
        held_out: the share of the data that is not trained on, and decides which epoch is best.
        validation: batches that decide instead. All of ``data`` is then trained on.
        trainable: glob patterns for the names of parameters to train; by default all that require gradients in the
            student.
        augment: changes the arguments of a training batch, before both student and teacher see them.
        mixed_precision: ``"bf16"`` or ``"fp16"`` for autocast. The weights keep their precision.
        accumulate: batches per step, in each process.
        shard: shard the student's weights, gradients and AdamW moments, and the teacher's weights, over the processes
            (FSDP2; :mod:`vbpfx.finetuning.sharding`). Each process then holds a part of every parameter. Pass
            ``student`` and ``teacher`` on the CPU, so that only parts are moved to the device. The result is whole
            again, on the student's device.
        checkpoint, checkpoint_every: a folder that all processes can access. ``finetune.safetensors`` is written there
            after every epoch, after every ``checkpoint_every`` steps, and when the time is over.
        resume: continue from the checkpoint if there is one. The result is bit for bit that of an uninterrupted run, if
            the device computes deterministically. Random transforms in a loader's worker processes repeat only from the
            start of an epoch.
        max_seconds: stop after the first step that ends later than this. At least one step is made.
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        seed: the seed of the split, the order and all random numbers. The caller's random generators are not changed.
        progress: show a progress bar on standard error.

    Returns:
        The network with the weights of the lowest held-out loss, among the start and the ends of all epochs. So by that
        loss it is never worse than the student. If no epoch is better, the weights are the student's, unchanged.

    Raises:
        FinetuneError: the settings, networks or data do not fit, a loss is not finite, the checkpoint belongs to
            another run, or accelerate is missing. With ``shard=True``, there is only one process, or a network cannot
            be sharded.
        RankError: another process has ended.
        CaptureError: student or teacher is not a module, or cannot be copied.
        ArtifactError: the checkpoint cannot be written.
    """
    require_module(student)
    require_module(teacher)
    chosen = make_recipe(recipe, epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay,
                         temperature=temperature, feature_weight=feature_weight, patience=patience, mixing=mixing)  # fmt: skip
    if loss not in ("kl", "mse") or (labels and loss != "kl"):
        raise FinetuneError(f"loss must be 'kl' or 'mse', and 'kl' with labels=True, found {loss!r}")
    for name, value in (("accumulate", accumulate), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise FinetuneError(f"{name} must be at least 1, found {value}")
    split = training_data(data, held_out, validation, seed)
    # a graph does not know how its decoder's input is made from labels, but the teacher does
    settings = Settings(
        reader(teacher if isinstance(student, fx.GraphModule) else student, inputs),
        labels,
        augment,
        accumulate,
        seed,
        shard,
    )
    measure = Distillation(loss, chosen.temperature)
    network = copy.deepcopy(student, plain_tensors(student))
    _choose_trainable(network, trainable)
    with processes(mixed_precision) as running, generators_kept(running.device):
        dense = share_parameters(teacher)
        running.broadcast([*network.parameters(), *network.buffers()])
        digests = {} if checkpoint is None else {"student": digest(network), "teacher": digest(dense)}
        if shard:
            _shard(network, dense, settings, split, running)
        else:
            network.to(running.device)
            if model_device(dense) != running.device:
                # Without the copy, .to() would move the teacher's own parameters.
                dense = copy.deepcopy(dense).to(running.device)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        training = Training(network, dense, trained, split, chosen, measure, settings, running)
        with views_allowed() if shard else nullcontext():
            training.choose_features(features, outputs)
            if checkpoint is not None:
                training.keep_in(make_folder(Path(checkpoint)), checkpoint_every, resume, digests)
            stopped = training.run(math.inf if max_seconds is None else max_seconds, progress)
        if shard:
            network = copy.deepcopy(student, plain_tensors(student))
            whole = parameters_and_buffers(network)
            with torch.no_grad():
                for name, tensor in gathered(training.state.tensors):
                    whole[name].copy_(tensor)
    network.zero_grad(set_to_none=True)
    for ours, original in zip(network.parameters(), student.parameters(), strict=True):
        ours.requires_grad_(original.requires_grad)
    network.to(model_device(student)).eval()
    history = tuple(training.state.history)
    return FineTuned(network, history, history[training.state.position.best], stopped, measure.features)


def _shard(student: nn.Module, teacher: nn.Module, settings: Settings, data: TrainingData, running: Processes) -> None:
    """Shard both networks over the processes, in place."""
    if running.count == 1:
        raise FinetuneError(
            "shard=True divides the networks over several processes, but there is only one process. Start several with torchrun --nproc-per-node, or leave shard out"
        )
    inputs = settings.read(next(data.read(data.order(0)[:1]))).unlabelled
    for network, trained in ((student, True), (teacher, False)):
        shard_network(network, inputs.to(model_device(network)), running.device, trained=trained)


def _choose_trainable(network: nn.Module, patterns: Sequence[str] | str | None) -> None:
    """Make the parameters to train, and no others, require gradients."""
    named = dict(network.named_parameters())
    if patterns is None:
        names = [name for name, parameter in named.items() if parameter.requires_grad]
    else:
        names = matching(list(named), [patterns] if isinstance(patterns, str) else list(patterns), "trainable")
    if not names:
        raise FinetuneError("no parameter of the student requires gradients; name those to train: trainable=['*']")
    for name, parameter in named.items():
        parameter.requires_grad_(name in names)
    half = [name for name in names if named[name].element_size() < 4]
    if half:
        raise FinetuneError(
            f"{half[0]} is {named[half[0]].dtype}, too coarse for small steps; train student.float(), with "
            f"mixed_precision='bf16' to compute in half precision"
        )
