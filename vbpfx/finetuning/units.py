"""Where a network can be divided: modules whose weights need to be whole only while they run.

FSDP2 gathers a module's weights before its forward and lets go of them behind it. Names and classes do not say for which
modules that is enough: attention may read the weight of a layer that it never calls, and operators of an exported graph read weights
straight from the graph. So the network runs once, and a module is a unit only if

- it is called, and every operator that reads one of its weights runs inside it;
- no module outside of it holds one of its weights, too;
- its outputs are tensors in tuples, lists and dictionaries, where FSDP2 finds them and waits for their gradients;
- nothing writes into an output that is a view, which would undo that.

What is not a unit's stays with the unit around it, at last with the network as a whole.
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

# A unit has at most this share of the network's weights, where the modules inside it can be units themselves; and what is too
# small to be worth an exchange of its own has together at most this share, too.
_SHARE = 8


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """One run of a network, watched.

    Attributes:
        called: the modules that were called.
        closed: those that cannot be units, for what they return.
        inside: parameter -> the modules that were running whenever an operator read it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.called: set[nn.Module] = set()
        self.closed: set[nn.Module] = set()
        self.inside: dict[nn.Parameter, set[nn.Module]] = {}
        self._network = network
        self._known = {id(parameter) for parameter in network.parameters()}
        self._running: list[nn.Module] = []
        self._views: list[tuple[Tensor, nn.Module]] = []  # kept, so that no other tensor takes a view's memory

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
        """Watch which modules run."""
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
        # losses are taken of what is seen of the network's own output; a cache beside it does no harm
        if hides and not (module is self._network and any(isinstance(leaf, Tensor) for leaf in leaves)):
            self.closed.add(module)
        self._views += [(leaf, module) for leaf in leaves if isinstance(leaf, Tensor) and leaf._base is not None]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def find_units(network: nn.Module, inputs: Inputs, *, trained: bool) -> list[str]:
    """The names of the modules to divide one by one, those inside others first; the network itself is not among them.

    Args:
        network: its weights whole; it stays as it was.
        inputs: of one batch, on the network's device.
        trained: the network runs in train mode with gradients, too.

    Raises:
        FinetuneError: the batch does not run, or a network that is trained returns something that hides its tensors.
    """
    network = share_parameters(network)  # running changes buffers
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
    except Exception as error:  # the model's own operators raise whatever they raise
        raise FinetuneError(
            f"a batch does not run through {type(network).__name__} on {inputs.tensors[0].device}, before it is sharded: "
            f"{first_line(error)}\n  the batch: {inputs.describe()}"
        ) from error
    return run
