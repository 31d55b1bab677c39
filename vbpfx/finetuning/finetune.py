"""Fine-tuning: a pruned network learns from the dense one, without labels.

The losses stand in :mod:`vbpfx.finetuning.distillation`, the numbers in :mod:`vbpfx.finetuning.recipes`, what is held out in
:mod:`vbpfx.finetuning.training_data`, and the loop in :mod:`vbpfx.finetuning.training`.
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
        history: the start, and the network after every epoch.
        best: the entry of the history whose weights these are.
        stopped: why training ended: its ``epochs`` were done, ``patience`` or ``time`` was over.
        features: the modules whose outputs were matched.
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

    It runs where ``accelerate`` runs: on the CPU (``ACCELERATE_USE_CPU=1`` forces it), on a GPU if there is one, and in many
    processes under ``torchrun``. A batch is then one process's: R processes take R batches a step. Every process gets the
    whole of ``data`` and reads its share.

    Args:
        student: ``Pruned.apply_to(model)``, which has its dropout and its blocks, or a GraphModule. It stays as it was; the
            copy is trained in train mode.
        teacher: the dense network; it stays as it was, and runs in eval mode without gradients.
        data: batches that can be gone through once an epoch, as :func:`vbpfx.prune` takes them; the batch size is theirs. A
            ``DataLoader`` with PyTorch's own samplers is split by samples, anything else by batches
            (:mod:`vbpfx.finetuning.training_data`).
        recipe: ``"default"`` (little data), ``"few"`` (no more than pruning saw), ``"paper"``, or a :class:`vbpfx.finetuning.recipes.Recipe`; the numbers below change it.
            The paper holds nothing out: ``held_out=0`` trains on everything and returns the last weights.
        loss: ``"kl"`` for models that return logits over their last axis, the default; ``"mse"`` for embeddings. A tensor
            does not tell which it is: a network without a classifier needs ``"mse"``.
        labels: add the cross-entropy of the labels, a batch's second entry or its ``labels``, position by position (a
            language model's must be shifted already). Without it they are left out.
        epochs, learning_rate, weight_decay, temperature, feature_weight, patience, mixing: see :class:`vbpfx.finetuning.recipes.Recipe`.
        features: glob patterns over names of modules whose outputs are to agree; by default repeated blocks. They count
            where ``feature_weight`` is above 0.
        outputs: glob patterns over names of further outputs that are to agree, where the networks return several tensors
            (``"boxes"``, ``"hidden_states.*"``; of tuples the places, ``"1"``); by default all of them, each relative to the variance
            of the teacher's. ``()`` trains toward the logits (or values) alone.
        held_out: the share of the data that is never trained on, and decides.
        validation: batches to decide on instead; then all of ``data`` is trained on.
        trainable: glob patterns over names of parameters; by default all that require gradients in the student.
        augment: changes the arguments of a training batch, for student and teacher alike.
        mixed_precision: ``"bf16"`` or ``"fp16"`` for autocast; weights stay as they are.
        accumulate: batches a step, in each process.
        shard: divide weights, gradients and AdamW's moments of the student, and the teacher's weights, over the processes
            (FSDP2; :mod:`vbpfx.finetuning.sharding`): each holds a piece of every parameter. ``student`` and ``teacher`` best
            lie on the CPU, from where only pieces go to the device; the result has the student's device again, whole.
        checkpoint, checkpoint_every: a folder that all processes see; ``finetune.safetensors`` is written there after every epoch, every
            ``checkpoint_every`` steps, and when the time is over.
        resume: go on from the checkpoint if there is one. The result is bit for bit that of a run without a break, as far
            as the device computes the same twice; random transforms in a loader's worker processes repeat only from
            the start of an epoch.
        max_seconds: end with the first step that is done after this time. At least one step is made.
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        seed: of the split, the order and all random numbers; the caller's generators stay as they were.
        progress: show a bar on standard error.

    Returns:
        The weights with the lowest held-out loss among the start and the ends of the epochs: by that measure never worse
        than the student. If no epoch is better, they are the student's, unchanged.

    Raises:
        FinetuneError: the settings, networks or data do not fit, a loss is not finite, the checkpoint is of another run, or
            accelerate is missing; with ``shard=True``, there is one process, or a network cannot be divided.
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
    # a graph does not know how its decoder's input is made of labels
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
                dense = copy.deepcopy(dense).to(running.device)  # .to() alone would move the teacher's own parameters
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
    """Divide both networks over the processes, in place."""
    if running.count == 1:
        raise FinetuneError(
            "shard=True divides the networks over several processes, but there is only one process. Start several with torchrun --nproc-per-node, or leave shard out"
        )
    inputs = settings.read(next(data.read(data.order(0)[:1]))).unlabelled
    for network, trained in ((student, True), (teacher, False)):
        shard_network(network, inputs.to(model_device(network)), running.device, trained=trained)


def _choose_trainable(network: nn.Module, patterns: Sequence[str] | str | None) -> None:
    """Let the parameters to train, and no others, require gradients."""
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
