"""A network divided over the processes: FSDP2, torch's ``fully_shard``.

Every parameter is cut along its first axis; a process holds one piece of it, of its gradient and of AdamW's moments. A unit
(:mod:`vbpfx.finetuning.units`) is gathered while it runs, forward and backward, and its gradients are summed into the pieces.

``accelerate``'s plugin for FSDP2 is not used: it exists for GPUs alone (on the CPU it makes DistributedDataParallel of a network), it averages
gradients where sums are wanted, it prepares a network only with an optimizer of its own, where the teacher has none, and it chooses
modules by class or size, of which some cannot be divided.
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
    """Divide a network over all processes, in place: afterwards its parameters are pieces, on the device.

    Args:
        network: with the same weights in every process. Tensors that it shares with another network stay as they are.
        inputs: of one batch, on the network's device.
        device: where this process computes.
        trained: whether gradients are wanted.

    Raises:
        FinetuneError: the network cannot be divided.
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
            # the root, too: parameters are pieces whenever nothing runs
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FinetuneError(
            f"{type(network).__name__} cannot be sharded; change the network, or leave shard out: {first_line(error)}"
        ) from error
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _own_parameters(network: nn.Module) -> None:
    """Give a network parameters of its own, on the same memory: FSDP2 moves those that it is given."""
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in own:
                    own[parameter] = nn.Parameter(parameter.data.contiguous(), parameter.requires_grad)
                module._parameters[name] = own[parameter]


def is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is divided, and this process has a piece of it."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, whole; pieces are put together one by one. All processes go through all of them."""
    for name, tensor in tensors.items():
        if is_piece(tensor):
            piece: Any = tensor
            with torch.no_grad(), reaching():
                tensor = piece.full_tensor()
        yield name, tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as the other is: divided, or whole. Nothing is exchanged."""
    if not is_piece(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = other
    return distribute_tensor(tensor.to(other.device), placed.device_mesh, placed.placements, src_data_rank=None)


@contextmanager
def views_allowed() -> Iterator[None]:
    """FSDP2 warns of every output that is a view; :func:`vbpfx.finetuning.units.find_units` has looked whether anything writes to one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module", UserWarning)
        yield
