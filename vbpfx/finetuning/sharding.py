"""Shard a network over the processes with FSDP2, torch's ``fully_shard``.

Every parameter is cut along its first axis. A process holds one piece of the parameter, of its gradient and of its
AdamW moments. The weights of a unit (:mod:`vbpfx.finetuning.units`) are gathered while it runs forward and backward,
and its gradients are summed into the pieces.

``accelerate``'s plugin for FSDP2 is not used, for four reasons. It supports only GPUs (on the CPU it uses
DistributedDataParallel). It averages gradients, where sums are needed. It prepares a network only together with an
optimizer, which the teacher does not have. And it chooses modules by class or size, although some of them cannot be
sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vbpfx.data.inputs import Inputs
from vbpfx.distributed.meeting import reaching
from vbpfx.errors import FinetuneError, first_line
from vbpfx.finetuning.units import find_units


def shard(network: nn.Module, inputs: Inputs, device: torch.device, *, trained: bool) -> None:
    """Shard a network over all processes, in place. Afterwards its parameters are pieces, on the device.

    Args:
        network: a network with the same weights in every process. Tensors that it shares with another network do not
            change.
        inputs: one batch, on the network's device.
        device: the device of this process.
        trained: whether the network needs gradients.

    Raises:
        FinetuneError: the network cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    units = find_units(network, inputs, trained=trained)
    _own_parameters(network)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    single = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for parameter in single:
        parameter.data = parameter.to(device)
    try:
        for module in (*map(network.get_submodule, units), network):
            # for the root, too, so that all parameters are pieces when nothing runs
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FinetuneError(
            f"{type(network).__name__} cannot be sharded; change the network, or leave shard out: {first_line(error)}"
        ) from error
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the gloo backend supports no other reduction


def _own_parameters(network: nn.Module) -> None:
    """Give a network parameter objects of its own on the same memory, because FSDP2 moves those that it gets."""
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in own:
                    own[parameter] = nn.Parameter(parameter.data.contiguous(), parameter.requires_grad)
                module._parameters[name] = own[parameter]


def is_piece(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded, so that this process holds a piece of it."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors whole, joining the pieces of one after another. All processes must iterate over all of them."""
    for name, tensor in tensors.items():
        if is_piece(tensor):
            piece: Any = tensor
            with torch.no_grad(), reaching():
                tensor = piece.full_tensor()
        yield name, tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor sharded like ``other``, or whole if ``other`` is. Processes do not communicate."""
    if not is_piece(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = other
    return distribute_tensor(tensor.to(other.device), placed.device_mesh, placed.placements, src_data_rank=None)


@contextmanager
def views_allowed() -> Iterator[None]:
    """A context without FSDP2's warning about outputs that are views.

    :func:`vbpfx.finetuning.units.find_units` has already checked that nothing writes to such a view.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module", UserWarning)
        yield
