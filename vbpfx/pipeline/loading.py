"""Run a graph piece by piece. The weights of a piece are read from files just before it runs, and dropped after it.

A piece runs on all batches before the next one is read. Between two pieces, every batch holds the values that later nodes
read. So pieces end where these values are small: in a network of residual blocks, at the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.graph.capture import named_tensors, share_parameters
from vbpfx.graph.edit import finish
from vbpfx.graph.memory import live_bytes
from vbpfx.reconstruction.stream import Stream
from vbpfx.storage.tensors import Stored

# Modules whose forward reads the weights of submodules without calling the submodules.
_READ_THEIR_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Loans:
    """The values of a model's tensors, which are on the meta device.

    Attributes:
        stored: the values that are in files.
        names: name in the model -> stored name.
        buffers: name in the model -> value, for buffers that no file holds.
    """

    stored: Stored
    names: Mapping[str, str]
    buffers: Mapping[str, Tensor]

    def value(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the value of the tensor of that name in the model."""
        # a copy: forward may write to a buffer, and this one is the caller's
        found = self.buffers[name].clone() if name in self.buffers else self.stored.read(self.names[name])
        return found.to(dtype)

    def knows(self, name: str) -> bool:
        """Return whether there is a value for the tensor of that name."""
        return name in self.names or name in self.buffers

    @contextmanager
    def lent(self, root: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Give tensors of a module their values within this context.

        Args:
            names: the names of the tensors, or path in the module -> name in the model if these differ.
        """
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        values: dict[int, Tensor] = {}
        paths = names if isinstance(names, Mapping) else {name: name for name in names}
        try:
            for path, name in paths.items():
                owner, _, attribute = path.rpartition(".")
                module = root.get_submodule(owner)
                place: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
                own = place[attribute]
                if own is None or not own.is_meta or not self.knows(name):
                    continue
                if id(own) not in values:
                    value = self.value(name, own.dtype)
                    is_parameter = place is module._parameters
                    values[id(own)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
                before.append((place, attribute, own))
                place[attribute] = values[id(own)]
            yield
        finally:
            for place, attribute, own in before:
                place[attribute] = own


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes that run together.

    Attributes:
        last: the name of the last node.
        tensors: the names of the parameters and buffers that the nodes read.
        live_bytes: the bytes per sample of the values that later nodes read.
    """

    last: str
    tensors: tuple[str, ...]
    live_bytes: int


def runnable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Change a graph that was captured on the meta device so that it runs on the CPU, in place. Return it.

    The devices in arguments of nodes become the CPU, and every weight is fetched just before each node that reads it.
    """
    graph = graph_module.graph

    def device(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value

    for node in list(graph.nodes):
        node.args = fx.node.map_aggregate(node.args, device)
        node.kwargs = fx.node.map_aggregate(node.kwargs, device)
        if node.op == "get_attr":
            for user in list(node.users):
                with graph.inserting_before(user):
                    fetch = graph.get_attr(str(node.target))
                fetch.meta = dict(node.meta)
                user.replace_input_with(node, fetch)
            graph.erase_node(node)
    finish(graph_module)
    return graph_module


def pieces(graph_module: fx.GraphModule, samples: int, weights: float) -> list[Piece]:
    """Cut a graph into pieces.

    Args:
        samples: the batch size of the shapes in ``meta["val"]``.
        weights: the largest size of a piece's weights, in bytes. A single node with more becomes a separate piece.
    """
    nodes = list(graph_module.graph.nodes)
    tensors, live = named_tensors(graph_module), [behind for _, behind in live_bytes(nodes)]
    nodes = [node for node in nodes if node.op != "output"]
    used = [_tensors_of(graph_module, node) for node in nodes]
    found: list[Piece] = []
    start = 0
    while start < len(nodes):
        names: dict[str, None] = {}
        size, best = 0, start
        for position in range(start, len(nodes)):
            new = [name for name in used[position] if name not in names]
            size += sum(tensors[name].numel() * tensors[name].element_size() for name in new)
            if size > weights and position > start:
                break
            names |= dict.fromkeys(new)
            if live[position] <= live[best] or position == len(nodes) - 1:
                best = position
        wanted = dict.fromkeys(name for own in used[start : best + 1] for name in own)
        found.append(Piece(nodes[best].name, tuple(wanted), math.ceil(live[best] / samples)))
        start = best + 1
    return found


def _tensors_of(graph_module: fx.GraphModule, node: fx.Node) -> list[str]:
    """Return the names of the parameters and buffers that a node reads."""
    if node.op == "call_module":
        return [f"{node.target}.{name}" for name in named_tensors(graph_module.get_submodule(str(node.target)))]
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        value = getattr(graph_module.get_submodule(owner), attribute)
        return [str(node.target)] if isinstance(value, Tensor) else []
    return []


class Loading:
    """A graph whose weights are read piece by piece.

    Args:
        graph_module: the graph, as :func:`runnable` returns it. Its tensors are on the meta device.
        loans: the values of these tensors.
        samples: the batch size of the shapes in ``meta["val"]``.
        memory: bytes for the weights of a piece, and as many again for the values that batches hold between two pieces.
        until: the last node that is needed. The pieces after it do not run. By default all pieces run.
    """

    def __init__(
        self, graph_module: fx.GraphModule, loans: Loans, samples: int, memory: float, until: str | None = None
    ) -> None:
        self.graph_module, self.loans, self.memory = graph_module, loans, memory
        found = pieces(graph_module, samples, memory)
        if until is not None:
            order = {node.name: number for number, node in enumerate(graph_module.graph.nodes)}
            found = [piece for n, piece in enumerate(found) if not n or order[found[n - 1].last] < order[until]]
        self.pieces = found
        self.live_bytes = max((piece.live_bytes for piece in found[:-1]), default=0)
        self._returned = graph_module.graph.output_node().args if not until else ()

    def samples_at_once(self) -> int:
        """Return how many samples the batches of one pass through the graph may have together."""
        return int(self.memory / max(1, self.live_bytes))

    def run(
        self,
        batches: Sequence[Inputs],
        *,
        before: Callable[[int], None] = lambda number: None,
        behind: Callable[[Piece], None] = lambda piece: None,
    ) -> list[list[Tensor]]:
        """Run every piece on all batches. Return the outputs of each batch, which are empty if ``until`` was given.

        Args:
            before: called with the number of a batch before each piece runs on it.
            behind: called with each piece after it has run on all batches.
        """
        streams = [Stream(self.graph_module, [batch]) for batch in batches]
        for piece in self.pieces:
            with self.loans.lent(self.graph_module, piece.tensors):
                for number, stream in enumerate(streams):
                    before(number)
                    stream.run_through(piece.last)
            behind(piece)
        # the values that the output node reads directly are still held; the fields of a record that it reads are not
        return [tensors_in(fx.map_arg(self._returned, stream.runs[0].env.__getitem__)) for stream in streams]


def run_by_module(model: nn.Module, loans: Loans, inputs: Inputs) -> list[Tensor]:
    """Run a model in its own class, and return its outputs. Each module has its weights only while its forward runs.

    Args:
        model: a model on the meta device. It is not changed.
    """
    copy = share_parameters(model)
    lending: list[tuple[nn.Module, AbstractContextManager[None]]] = []

    def lend(module: nn.Module, args: object) -> None:
        own = [name for name in named_tensors(module) if "." not in name or isinstance(module, _READ_THEIR_PARTS)]
        lending.append((module, loans.lent(module, {name: f"{paths[module]}{name}" for name in own})))
        lending[-1][1].__enter__()

    def take_back(module: nn.Module, args: object, output: object) -> None:
        lending.pop()[1].__exit__(None, None, None)

    paths = {module: f"{path}." if path else "" for path, module in copy.named_modules()}
    for module in paths:
        module.register_forward_pre_hook(lend)
        module.register_forward_hook(take_back)
    with torch.no_grad():
        output = inputs.run(copy)
    return tensors_in(output)
