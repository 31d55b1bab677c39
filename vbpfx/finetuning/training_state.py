"""The state of a training run: position, history, weights, the best weights, and AdamW's moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.finetuning.sharding import gathered, like


@dataclass(frozen=True)
class Epoch:
    """The losses after an epoch; epoch 0 is the start.

    Attributes:
        epoch, step: the number of epochs and steps done.
        train_loss: the mean loss over the epoch's samples, including features and labels; None at the start.
        held_out_loss: the mean loss of the outputs over the held-out samples; None if there are none.
    """

    epoch: int
    step: int
    train_loss: float | None
    held_out_loss: float | None


@dataclass
class Position:
    """The position of a run.

    Attributes:
        epoch: the number of epochs done.
        group: the number of steps done in the current epoch.
        step: the number of all steps done.
        loss, samples: the sums of losses and of samples in the current epoch.
        best: the index of the best entry of the history.
    """

    epoch: int = 0
    group: int = 0
    step: int = 0
    loss: float = 0.0
    samples: float = 0.0
    best: int = 0

    @property
    def mean_loss(self) -> float:
        """The mean loss of the current epoch."""
        return self.loss / self.samples


def parameters_and_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor for all parameters and buffers, each once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


class TrainingState:
    """Everything that changes during a run. It can be packed as tensors and JSON."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer
        self.position = Position()
        self.history: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        self._start = self._copied()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the network, by name."""
        return parameters_and_buffers(self.network)

    def record(self, train_loss: float | None, held_out_loss: float | None) -> None:
        """Add an entry to the history. Keep the weights if they are the best so far, or if nothing is held out."""
        at = self.position
        self.history.append(Epoch(at.epoch + (at.group > 0), at.step, train_loss, held_out_loss))
        best = self.history[at.best].held_out_loss
        if len(self.history) == 1 or held_out_loss is None or best is None or held_out_loss < best:
            at.best = len(self.history) - 1
            self._best = self._copied()

    @contextmanager
    def mixed(self, alpha: float) -> Iterator[None]:
        """A context in which the network's weights are start + alpha (trained - start). It restores them at the end."""
        if alpha == 1:
            yield
            return
        trained = self._copied()
        self._write({n: self._start[n].lerp(t, alpha) if t.is_floating_point() else t for n, t in trained.items()})
        try:
            yield
        finally:
            self._write(trained)

    def restore_best(self) -> None:
        """Write the best weights into the network."""
        self._write(self._best)

    def packed(self, *, keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as whole tensors, and everything else in a form that JSON can hold.

        Args:
            keep: False for a process that only takes part in gathering sharded tensors. It gets no tensors.
        """
        tensors = {f"network.{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        moments = self.optimizer.state_dict()["state"]
        tensors |= {f"adamw.{n}.{key}": value for n, entry in moments.items() for key, value in entry.items()}
        whole = {name: tensor.cpu() for name, tensor in gathered(tensors) if keep}
        return whole, {"position": asdict(self.position), "history": [asdict(epoch) for epoch in self.history]}

    def unpack(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`packed` returned."""
        of: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "adamw": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            of[kind][name] = tensor
        own = self.tensors
        self._write({name: like(of["network"][name], tensor) for name, tensor in own.items()})
        self._best = {name: like(of["best"][name].to(tensor.device), tensor) for name, tensor in own.items()}
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in of["adamw"].items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = like(tensor, trained[int(number)])
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.position = Position(**data["position"])
        self.history = [Epoch(**epoch) for epoch in data["history"]]

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])
