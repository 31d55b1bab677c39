"""Run the reference and the narrowed network side by side, and compare them behind layers that read a narrowed axis.

Graphs run node by node, so that both together hold no more values than each needs by itself. If the narrowed network
is a model in its own class, it runs first, and hooks record the outputs of its layers. Both networks run in their own
precision, or with all values, weights and folds in float64. In float64, casts to another floating-point type are
skipped, and a remaining difference is not due to rounding.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from vbpfx.data.inputs import Inputs, tensors_in
from vbpfx.graph.capture import Captured, named_tensors, share_parameters
from vbpfx.graph.fake import graph_arguments
from vbpfx.outputs.differences import relative_error
from vbpfx.plans.records import BlockPlan, Consumer, Factor, Plan, ValueAxis
from vbpfx.rewrite.narrow import Changes, Removed, constant_channels, pruned_channels
from vbpfx.rewrite.substitute import in_other_coordinates, reference_graph
from vbpfx.rules.layers import matrix_product
from vbpfx.rules.table import operator_of


class Steps(fx.Interpreter):
    """Runs a graph node by node.

    Args:
        graph_module: the graph.
        inputs: the batch to run it on.
        dtype: the precision for all floating-point values; None keeps the network's own.
        exact: ``id`` of a tensor of the graph -> a function that returns its value before rounding to the network's
            precision.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Inputs,
        dtype: torch.dtype | None = None,
        exact: Mapping[int, Callable[[], Tensor]] | None = None,
    ) -> None:
        super().__init__(graph_module)
        self.nodes, self._root = list(graph_module.graph.nodes), graph_module
        self._inputs, self._dtype, self._exact = inputs, dtype, exact or {}
        self.outputs: list[Tensor] = []

    def until(self, watched: set[fx.Node]) -> Iterator[fx.Node]:
        """Run all nodes, and yield each watched node after it ran, while its inputs are still in ``env``."""
        self.args_iter = iter(pytree.tree_map(self._cast, graph_arguments(self._root, self._inputs)))
        self.env = {}
        for node in self.nodes:
            self.env[node] = self.run_node(node)
            if node.op == "output":
                self.outputs = tensors_in(self._root.graph.process_outputs(self.env[node]))
            if node in watched:
                yield node
            for done in self.user_to_last_uses.get(node, []):
                del self.env[done]

    def finish(self) -> list[Tensor]:
        """Run all nodes, and return the tensors among the outputs."""
        for _ in self.until(set()):
            pass
        return self.outputs

    def again(self, node: fx.Node, instead: Mapping[fx.Node, Tensor]) -> Tensor:
        """Run a node again with some of its operands replaced, and return its value."""
        kept, self.env = self.env, {**self.env, **instead}
        try:
            value: Tensor = self.run_node(node)
        finally:
            self.env = kept
        return value

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as fx's interpreter does, in the requested precision."""
        if self._dtype is None:
            return super().run_node(n)
        if n.op == "call_module":
            return pytree.tree_map(self._cast, self._run_module(n))
        value = super().run_node(n)
        if n.op == "get_attr":
            return pytree.tree_map(self._cast, value)
        operand = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if (
            operator_of(n).casts
            and isinstance(operand, Tensor)
            and operand.is_floating_point()
            and value.is_floating_point()
        ):
            return operand if value is operand else operand.clone()
        return pytree.tree_map(self._cast, value)

    def _run_module(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        module = self.fetch_attr(str(n.target))
        tensors = {name: self._cast(tensor) for name, tensor in named_tensors(module).items()}
        return torch.func.functional_call(module, tensors, args, kwargs, tie_weights=False)

    def _cast(self, value: Any) -> Any:
        if self._dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return (self._exact[id(value)]() if id(value) in self._exact else value).to(self._dtype)


@dataclass(frozen=True)
class Behind:
    """The outputs of both networks behind one layer that reads a block.

    Attributes:
        block: the block's name.
        found, expected: the output in the narrowed network and in the reference, without removed channels. ``found`` is
            None if the output was not recorded in the narrowed network.
        whole, without: the output of the reference's layer, and its output with all channels of the block set to zero.
    """

    block: str
    found: Tensor | None
    expected: Tensor
    whole: Tensor
    without: Tensor


class Comparison:
    """Compares a plan's reference with a narrowed network. It can be iterated over once.

    Args:
        captured: the dense graph.
        small: the narrowed graph, or the narrowed model in its own class and already in the requested precision.
        plan: the plan by which ``small`` was narrowed.
        inputs: the batch on which both networks run.
        dtype: see :class:`Steps`. If it is given, the weights of a graph are narrowed and folded in float64.

    Attributes:
        expected, found: the outputs of the reference and of the narrowed network, available after the iteration.
    """

    def __init__(
        self, captured: Captured, small: nn.Module, plan: Plan, inputs: Inputs, dtype: torch.dtype | None = None
    ) -> None:
        self._own, self._pruned, self._constant = captured.nodes, pruned_channels(plan), constant_channels(plan)
        self._reference = Steps(reference_graph(captured, plan), inputs, dtype)
        self._readers: dict[str, list[tuple[BlockPlan, Consumer | Factor]]] = defaultdict(list)
        self._turned: dict[str, list[tuple[ValueAxis, Tensor, int]]] = defaultdict(list)
        self._in_groups: dict[str, list[tuple[BlockPlan, ValueAxis]]] = defaultdict(list)
        self._by_row: set[str] = set()
        for entry in plan.blocks:
            for reader in entry.block.ends:
                self._readers[reader.node].append((entry, reader))
            for carrier in entry.block.carriers:
                if entry.block.has_experts:
                    self._by_row.add(carrier.node)
                if entry.basis is not None:
                    matrices = (entry.basis.dual if carrier.dual else entry.basis).to
                    self._turned[carrier.node].append((carrier, matrices, entry.block.width))
                if carrier.of_one_group:
                    self._in_groups[carrier.node].append((entry, carrier))
        self._small: _GraphSide | _ClassSide
        if can_compare(small, plan):
            small = share_parameters(small)
            exact = {} if dtype is None else exact_tensors(captured, small, plan)
            ends = {node: self._total(node) for node in self._readers}
            self._small = _GraphSide(Steps(small, inputs, dtype, exact), ends, self._own)
        else:
            self._small = _ClassSide(small, self._readers, inputs)
        self.expected: list[Tensor] = []
        self.found: list[Tensor] = []

    def __iter__(self) -> Iterator[Behind]:
        nodes = {node.name: node for node in self._reference.nodes}
        layers = {
            node: nodes.get(self._total(node.name), _corrected(node))
            for node in self._reference.nodes
            if node.name in self._readers
        }
        layer_of = {end: node for node, end in layers.items()}
        parts: list[tuple[str, Tensor, Tensor]] = []
        for node in self._reference.until({*layers, *layers.values()}):
            if node in layers:
                # a bias may be added to the value in place
                parts = [(entry.block.name, self._reference.env[node].clone(), self._without(node, entry, consumer))
                         for entry, consumer in self._readers[node.name]]  # fmt: skip
            if node in layer_of:
                name = layer_of[node].name
                expected, found = self._kept(self._reference.env[node], name), self._small.at(name)
                # which channels are removed there may depend on the row
                found = None if found is None or name in self._by_row else self._without_constants(found, name)
                for block, whole, without in parts:
                    yield Behind(block, found, expected, whole, without)
        self.expected, self.found = self._reference.outputs, self._small.finish()

    def _total(self, node: str) -> str:
        """Return the node that adds the bias of experts to the value of a layer; "" if there is none."""
        reader = self._readers[node][0][1]
        return reader.total if isinstance(reader, Consumer) else ""

    def _without(self, node: fx.Node, entry: BlockPlan, reader: Consumer | Factor) -> Tensor:
        """Return the output of the reference's layer with a block's channels set to zero."""
        operand = next(n for n in node.all_input_nodes if _behind_insertions(n, self._own) == reader.source.node)
        value = self._reference.env[operand]
        own = reader.source.marked(range(entry.block.value_width), value.shape, entry.block.value_width).to(
            value.device
        )
        return self._reference.again(node, {operand: value.masked_fill(own, 0)})

    def _kept(self, value: Tensor, name: str) -> Tensor:
        """Return a node's value without the removed channels, in the coordinates of the plan."""
        for place, matrices, width in self._turned.get(name, ()):
            value = in_other_coordinates(value, place, matrices, width)
        for entry, carrier in self._in_groups.get(name, ()):
            value = _left_out_of_groups(value, carrier, entry)
        return value if name in self._in_groups else _left_out(value, name, self._pruned)

    def _without_constants(self, value: Tensor, name: str) -> Tensor:
        """Return the value of a narrowed node without constant channels, to which no channel of the reference corresponds."""
        return _left_out(value, name, self._constant)


def _left_out(value: Tensor, name: str, channels: Removed) -> Tensor:
    for axis in range(value.ndim):
        if positions := channels.get((name, axis, False)):
            kept = torch.tensor([i for i in range(value.shape[axis]) if i not in positions], device=value.device)
            value = value.index_select(axis, kept)
    return value


def _left_out_of_groups(value: Tensor, place: ValueAxis, entry: BlockPlan) -> Tensor:
    """Return a value without the removed channels, where another axis counts the groups, and each group lacks other channels."""
    own = place.marked(entry.pruned, value.shape, entry.block.width).to(value.device).expand(value.shape)
    axis = place.axis % value.ndim
    last, kept = value.movedim(axis, -1), ~own.movedim(axis, -1)
    return last[kept].reshape(*last.shape[:-1], -1).movedim(-1, axis)


class _GraphSide:
    """A narrowed graph that runs step by step, each time up to the next layer that reads a block."""

    def __init__(self, steps: Steps, ends: Mapping[str, str], own: Mapping[str, fx.Node]) -> None:
        self._steps = steps
        nodes = {node.name: node for node in steps.nodes}
        self._reached = steps.until({nodes.get(end, _folded(nodes[reader], own)) for reader, end in ends.items()})

    def at(self, name: str) -> Tensor:
        """Return the output of the next layer that reads a block; ``name`` must be that layer's."""
        node = next(self._reached)
        value: Tensor = self._steps.env[node]
        return value

    def finish(self) -> list[Tensor]:
        """Run the rest of the graph, and return the outputs."""
        for _ in self._reached:
            pass
        return self._steps.outputs


class _ClassSide:
    """A narrowed model in its own class; hooks record the outputs of its layers while it runs."""

    def __init__(
        self, small: nn.Module, readers: Mapping[str, list[tuple[BlockPlan, Consumer | Factor]]], inputs: Inputs
    ) -> None:
        layers = {node: found[0][1] for node, found in readers.items()}
        self._path = {
            node: layer.weight.rpartition(".")[0]
            for node, layer in layers.items()
            if isinstance(layer, Consumer) and layer.is_layer
        }
        self._heard: dict[str, list[Tensor]] = {path: [] for path in self._path.values()}
        handles = [small.get_submodule(path).register_forward_hook(self._hear(path)) for path in self._heard]
        try:
            self._output = tensors_in(inputs.run(small))
        finally:
            for handle in handles:
                handle.remove()
        calls = Counter(self._path.values())
        self._whole = {path for path, heard in self._heard.items() if len(heard) == calls[path]}

    def _hear(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hear(layer: nn.Module, given: Any, value: Any) -> None:
            if isinstance(value, Tensor):
                self._heard[path].append(value.clone())

        return hear

    def at(self, name: str) -> Tensor | None:
        """Return the output of a layer's next call, or None if not all of its calls were recorded."""
        path = self._path.get(name)
        return self._heard[path].pop(0) if path is not None and path in self._whole else None

    def finish(self) -> list[Tensor]:
        """Return the outputs."""
        return self._output


def can_compare(small: nn.Module, plan: Plan) -> TypeGuard[fx.GraphModule]:
    """Return whether a pruned network is a graph that still has the dense graph's nodes that read blocks."""
    names = {node.name for node in small.graph.nodes} if isinstance(small, fx.GraphModule) else set()
    readers = (reader for entry in plan.blocks for reader in entry.block.ends)
    return all(reader.node in names for reader in readers) and bool(names)


def exact_tensors(captured: Captured, small: nn.Module, plan: Plan) -> dict[int, Callable[[], Tensor]]:
    """Return a dict: ``id`` of a changed tensor of the narrowed network -> a function that computes it in float64."""
    dense, narrow, changes = named_tensors(captured.graph_module), named_tensors(small), Changes(plan)

    def wide(name: str) -> Tensor:
        return dense[name].detach().double()

    return {id(narrow[name]): partial(changes.of, name, wide) for name in changes.names if name in narrow}


def _corrected(node: fx.Node) -> fx.Node:
    """Return the node that adds the plan's correction to a layer of the reference, or the layer if it has none."""
    added = (user for user in node.users if user.op == "call_module" and str(user.target).startswith("correct_"))
    return next((user for user in added if user.args[0] is node), node)


def _folded(node: fx.Node, own: Mapping[str, fx.Node]) -> fx.Node:
    """Return the node that adds a new bias to a layer of the narrowed graph, or the layer if no bias was added.

    Only a matrix product gets its new bias from a node of its own.
    """
    users = [user for user in node.users if user.name not in own and user.target is torch.add]
    return users[0] if operator_of(node).rule is matrix_product and len(node.users) == len(users) == 1 else node


def _behind_insertions(node: fx.Node, own: Mapping[str, fx.Node]) -> str:
    """Follow inserted calls back to a node of the captured graph, and return that node's name."""
    while node.name not in own:
        node = node.all_input_nodes[0]
    return node.name


@dataclass(frozen=True)
class Seen:
    """The result of a comparison.

    Attributes:
        expected, found: the outputs of the reference and of the pruned network.
        errors: block -> the largest relative error behind its layers; None if these were not compared.
        shares: block -> the largest relative change behind its layers when the block is set to zero.
    """

    expected: list[Tensor]
    found: list[Tensor]
    errors: Mapping[str, float] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def behind(self) -> float | None:
        """The largest error behind any block's layers; None if these were not compared."""
        return None if self.errors is None else max(self.errors.values(), default=0.0)

    @property
    def largest(self) -> float:
        """The largest error, at the outputs or behind any block's layers."""
        return max(relative_error(self.found, self.expected), self.behind or 0.0)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Names of the blocks for which the comparison proves nothing: their share is not larger than the error."""
        return tuple(name for name, error in (self.errors or {}).items() if self.shares[name] <= error)


def look(comparison: Comparison) -> Seen:
    """Run a comparison, and return its errors."""
    errors: dict[str, float] = defaultdict(float)
    shares: dict[str, float] = defaultdict(float)
    for at in comparison:
        if at.found is None:
            errors[at.block], shares[at.block] = errors[at.block], shares[at.block]  # enters the block with zeros
            continue
        alike = at.found.shape == at.expected.shape
        error = relative_error([at.found], [at.expected], both_nan=True) if alike else math.inf
        errors[at.block] = max(errors[at.block], error)
        shares[at.block] = max(shares[at.block], relative_error([at.without], [at.whole], both_nan=True))
    return Seen(comparison.expected, comparison.found, dict(errors), dict(shares))
