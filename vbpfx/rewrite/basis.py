"""Other coordinates of channels: the dense network with the weights that belong to the coordinates of a plan.

A plan may keep and remove linear combinations of the channels of a head (:class:`vbpfx.plans.records.Basis`). The dense network in these
coordinates computes the same function: the rows of the producers are E W, and the columns of the readers are W D. In it, the plan removes
channels as usual.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.graph.capture import Captured, named_tensors, plain_tensors
from vbpfx.plans.records import Basis, Block, ParameterAxis, Plan


class Coordinates:
    """Computes what the dense network's tensors are in the coordinates of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._places: dict[str, list[tuple[Block, ParameterAxis, Basis]]] = defaultdict(list)
        for entry in plan.blocks:
            for parameter in entry.block.parameters if entry.basis is not None else ():
                self._places[parameter.name].append((entry.block, parameter, entry.basis))  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that differ from the dense network's."""
        return tuple(self._places)

    def of(self, name: str, dense: Tensor) -> Tensor:
        """Return a tensor in the plan's coordinates: float64 if it differs, and otherwise the dense tensor itself."""
        new = dense
        for block, parameter, basis in self._places.get(name, ()):
            matrix = (basis.dual if parameter.dual else basis).to
            positions = parameter.at(range(block.width)).to(dense.device)
            new = new.detach().double() if new is dense else new
            own = new.index_select(parameter.axis, positions).movedim(parameter.axis, -1)
            parts = own.reshape(*own.shape[:-1], block.groups, -1)
            turned = torch.einsum("...gc,gkc->...gk", parts, matrix.to(own)).flatten(-2)
            new = new.index_copy(parameter.axis, positions, turned.movedim(-1, parameter.axis))
        return new


def in_coordinates(captured: Captured, plan: Plan) -> Captured:
    """Return the dense network with the weights that belong to the plan's coordinates. It shares all other weights."""
    coordinates, tensors = Coordinates(plan), named_tensors(captured.graph_module)
    memo: dict[int, Any] = {id(p): p for p in captured.graph_module.parameters()}
    memo |= {id(p): p for p in captured.reference.parameters()}
    memo |= plain_tensors(captured.graph_module) | plain_tensors(captured.reference)
    for name in coordinates.names:
        like = tensors[name]
        memo[id(like)] = nn.Parameter(coordinates.of(name, like).to(like.dtype), like.requires_grad)
    network = copy.deepcopy(captured.graph_module, dict(memo))
    return replace(captured, graph_module=network, reference=copy.deepcopy(captured.reference, memo))
