"""How far a training run has come: position, history, weights, the best weights, and AdamW's moments."""

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
    """The network after so many epochs and steps; epoch 0 is the start.

    Attributes:
        train_loss: mean loss over the epoch's samples, features and labels included; None at the start.
        held_out_loss: mean loss of the outputs over the held-out samples; None where there are none.
    """

    epoch: int
    step: int
    train_loss: float | None
    held_out_loss: float | None


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: epochs that are done.
        group: steps of the present epoch that are done.
        step: all steps that are done.
        loss, samples: sums over the present epoch.
        best: the number of the best entry of the history.
    """

    epoch: int = 0
    group: int = 0
    step: int = 0
    loss: float = 0.0
    samples: float = 0.0
    best: int = 0

    @property
    def mean_loss(self) -> float:
        """The mean loss of the present epoch."""
        return self.loss / self.samples


def parameters_and_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


class TrainingState:
    """Everything of a run that changes, and its form as tensors and JSON."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer
        self.position = Position()
        self.history: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        self._start = self._copied()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the network."""
        return parameters_and_buffers(self.network)

    def record(self, train_loss: float | None, held_out_loss: float | None) -> None:
        """Add an entry to the history; keep the weights if none before were as good, or if nothing is held out."""
        at = self.position
        self.history.append(Epoch(at.epoch + (at.group > 0), at.step, train_loss, held_out_loss))
        best = self.history[at.best].held_out_loss
        if len(self.history) == 1 or held_out_loss is None or best is None or held_out_loss < best:
            at.best = len(self.history) - 1
            self._best = self._copied()

    @contextmanager
    def mixed(self, alpha: float) -> Iterator[None]:
        """Within it the network is start + alpha (trained - start), and as it was afterwards."""
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
        """Give the network the best weights."""
        self._write(self._best)

    def packed(self, *, keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, whole, and the rest as JSON can hold it.

        Args:
            keep: False for a process that takes part and writes nothing; it gets no tensors.
        """
        tensors = {f"network.{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        moments = self.optimizer.state_dict()["state"]
        tensors |= {f"adamw.{n}.{key}": value for n, entry in moments.items() for key, value in entry.items()}
        whole = {name: tensor.cpu() for name, tensor in gathered(tensors) if keep}
        return whole, {"position": asdict(self.position), "history": [asdict(epoch) for epoch in self.history]}

    def unpack(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Become what :meth:`packed` gave."""
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
