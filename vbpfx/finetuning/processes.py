"""Processes: what a training run needs from ``accelerate``.

Gradients are summed here, once per step. The wrapper DistributedDataParallel would average them over processes, where
sums over samples are needed, and would fail at a parameter that the loss does not reach. FSDP2 can sum, and is set up
with torch itself (:mod:`vbpfx.finetuning.sharding`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vbpfx.distributed.meeting import reaching
from vbpfx.errors import FinetuneError, first_line
from vbpfx.finetuning.sharding import is_piece

T = TypeVar("T")
Precision = Literal["no", "bf16", "fp16"]


class Processes:
    """The processes of a run, and the device of this one.

    Attributes:
        rank: the number of this process, from 0.
        count: the number of processes.
        device: the device of this process.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows output."""
        return self.rank == 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the gradients in float16; None in other precisions."""
        scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        return scaler

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of mixed precision."""
        region: AbstractContextManager[None] = self._accelerator.autocast()
        return region

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer, wrapped so that it unscales gradients before a step."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare(optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, and add them to those of the parameters."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """Clip the gradient to a norm."""
        self._accelerator.clip_grad_norm_(parameters, max_norm)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over the processes.

        Raises:
            RankError: another process has ended.
        """
        if self.count == 1:
            return list(values)
        with reaching():
            summed: Tensor = self._accelerator.reduce(
                torch.tensor(values, dtype=torch.float64, device=self.device), reduction="sum"
            )
        return summed.tolist()

    def evenly(self, batches: Iterator[T]) -> Iterator[T | None]:
        """Yield the batches of this process, and then None as long as another process has more."""
        while True:
            batch = next(batches, None)
            if not self.sums([float(batch is not None)])[0]:
                return
            yield batch

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the processes. A parameter without a gradient in all processes gets none.

        The gradients of sharded parameters are summed already.
        """
        parameters = [parameter for parameter in parameters if not is_piece(parameter)]
        if self.count == 1 or not parameters:
            return
        reached = self.sums([float(parameter.grad is not None) for parameter in parameters])
        kinds: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter, seen in zip(parameters, reached, strict=True):
            if seen:
                kinds[parameter.dtype].append(parameter)
        for group in kinds.values():
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in group])
            with reaching():
                flat = self._accelerator.reduce(flat, reduction="sum")
            for parameter, summed in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.grad = summed.view_as(parameter)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite floating-point tensors with those of the first process."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        with reaching():
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.data.copy_(broadcast(tensor.detach().to(self.device).contiguous()))


@contextmanager
def processes(mixed_precision: Precision) -> Iterator[Processes]:
    """Yield the processes of this run: those that ``torchrun`` started, or this process alone.

    Raises:
        FinetuneError: accelerate is not installed, the precision is unknown, or this machine does not support it.
    """
    if mixed_precision not in get_args(Precision):
        choices = ", ".join(get_args(Precision))
        raise FinetuneError(f"mixed_precision={mixed_precision!r} is unknown: choose one of {choices}")
    try:
        import accelerate
        from accelerate.state import AcceleratorState, is_initialized
    except ImportError as error:
        raise FinetuneError(f"fine-tuning needs accelerate ({error}): pip install accelerate") from error
    callers = is_initialized()
    try:
        try:
            accelerator = accelerate.Accelerator(mixed_precision=mixed_precision)
        except (ValueError, TypeError) as error:
            raise FinetuneError(
                f"this machine cannot train with mixed_precision={mixed_precision!r}: {first_line(error)}"
            ) from error
        yield Processes(accelerator)
    finally:
        if not callers:
            # accelerate fixes one precision for the whole process; the next run may need another
            AcceleratorState._reset_state()


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """A context that restores the state of all random number generators that :func:`seed_everything` seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    from accelerate.utils import set_seed

    set_seed(seed)
