"""Find the units of a network for sharding: modules whose weights need to be whole only while the module runs.

FSDP2 gathers a module's weights before its forward and frees them afterwards. Names and classes do not tell for which
modules this is enough. Attention, for example, may read the weight of a layer that it never calls, and operators of an
exported graph read weights directly from the graph. So the network is run, and a module is a unit only if

- it is called, and every operator that reads one of its weights runs inside it;
- no module outside of it holds one of its weights;
- its outputs are tensors in tuples, lists and dictionaries, where FSDP2 finds them and waits for their gradients;
- nothing writes into an output that is a view, since FSDP2 would then miss its gradient.

Weights that belong to no unit are gathered with the unit around them, or with the network as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vbpfx.data.inputs import Inputs
from vbpfx.errors import FinetuneError, first_line
from vbpfx.graph.capture import share_parameters

# A unit holds at most 1/8 of the network's weights, if the modules inside it can be units themselves. All modules that
# are too small for a communication of their own together hold at most 1/8, too.
_SHARE = 8


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """A recording of one run of a network.

    Attributes:
        called: the modules that were called.
        closed: the modules that cannot be units because of what they return.
        inside: parameter -> the modules that were running every time an operator read it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.called: set[nn.Module] = set()
        self.closed: set[nn.Module] = set()
        self.inside: dict[nn.Parameter, set[nn.Module]] = {}
        self._network = network
        self._known = {id(parameter) for parameter in network.parameters()}
        self._running: list[nn.Module] = []
        self._views: list[tuple[Tensor, nn.Module]] = []  # kept alive, so that no other tensor reuses their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self._known:
                now = set(self._running)
                self.inside[leaf] = self.inside.get(leaf, now) & now
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.closed |= {module for view, module in self._views if _memory(view) == _memory(value)}
        return func(*args, **(kwargs or {}))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """A context that records which modules run."""
        handles = []
        for module in self._network.modules():
            handles.append(module.register_forward_pre_hook(self._before))
            handles.append(module.register_forward_hook(self._behind))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self.called.add(module)
        self._running.append(module)

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        leaves = pytree.tree_leaves(output)
        hides = any(not isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in leaves)
        # the loss uses only the tensors that are found in the network's own output; a cache beside them does no harm
        if hides and not (module is self._network and any(isinstance(leaf, Tensor) for leaf in leaves)):
            self.closed.add(module)
        self._views += [(leaf, module) for leaf in leaves if isinstance(leaf, Tensor) and leaf._base is not None]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def find_units(network: nn.Module, inputs: Inputs, *, trained: bool) -> list[str]:
    """Return the names of the modules to shard one by one, inner modules first, without the network itself.

    Args:
        network: the network, not sharded yet. It is not changed.
        inputs: one batch, on the network's device.
        trained: whether the network will also run in train mode with gradients.

    Raises:
        FinetuneError: the network does not run on the batch, or it is to be trained and hides the tensors that it
            returns.
    """
    network = share_parameters(network)  # a copy, because a run may change buffers
    runs = [_run(network, inputs, training) for training in (False, True)[: 1 + trained]]
    if trained and any(network in run.closed for run in runs):
        raise FinetuneError(
            f"{type(network).__name__} cannot be sharded: FSDP2 does not find the tensors in what this network returns. Wrap it in a module that returns a tensor, or a dictionary of tensors"
        )
    names = {module: name for name, module in network.named_modules()}
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(module)
    total = sum(parameter.numel() for parameter in owners)
    smallest = total / (_SHARE * max(1, len(set().union(*owners.values()))))
    found: list[str] = []
    taken: set[nn.Parameter] = set()

    def is_unit(module: nn.Module) -> bool:
        own = set(module.modules())
        return all(module in run.called and module not in run.closed for run in runs) and all(
            owners[parameter] <= own and all(module in run.inside.get(parameter, own) for run in runs)
            for parameter in module.parameters()
        )

    def visit(module: nn.Module) -> None:
        for child in module.children():
            possible = is_unit(child)
            if not possible or sum(parameter.numel() for parameter in child.parameters()) > total / _SHARE:
                visit(child)
            left = set(child.parameters()) - taken
            if possible and sum(parameter.numel() for parameter in left) > smallest:
                found.append(names[child])
                taken.update(left)

    visit(network)
    return found


def _run(network: nn.Module, inputs: Inputs, training: bool) -> _Run:
    run = _Run(network)
    network.train(training)
    try:
        with torch.set_grad_enabled(training), run.hooks(), run:
            inputs.run(network)
    except Exception as error:  # the model may raise any exception
        raise FinetuneError(
            f"a batch does not run through {type(network).__name__} on {inputs.tensors[0].device}, before it is sharded: "
            f"{first_line(error)}\n  the batch: {inputs.describe()}"
        ) from error
    return run
