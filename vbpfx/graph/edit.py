"""Edit a graph: insert modules and checks. Every edit ends with :func:`finish`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from vbpfx.data.inputs import Inputs, Place
from vbpfx.errors import ArtifactError
from vbpfx.graph.capture import Captured
from vbpfx.graph.fake import graph_arguments
from vbpfx.plans.records import Block, Consumer, ValueAxis

_CAPTURE_ANOTHER = "Prune on data of this size, or make the model's code independent of it"


@dataclass(frozen=True)
class _Place:
    """A marker that replaces a tensor of the inputs."""

    place: Place


def insert_at_sources(
    graph_module: fx.GraphModule,
    blocks: Iterable[Block],
    make: Callable[[Block, int], nn.Module],
    label: str,
    beside: Mapping[ValueAxis, str] | None = None,
) -> list[tuple[Block, int, nn.Module]]:
    """Insert a module in front of everything that reads a block's axis, in place.

    Args:
        make: returns the module to insert. It is called with the block and the index of the source in
            ``block.sources``.
        label: the beginning of the new submodules' names.
        beside: source -> name of a node whose value the module gets as a second argument.

    Returns:
        The inserted modules, each with its block and the index of the source. Only the block's readers read the new
        module's value; all other nodes still read the source itself.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    latest: dict[tuple[str, int], fx.Node] = {}  # several blocks may share an axis; their modules follow each other
    inserted = []
    for number, block in enumerate(blocks):
        for index, source in enumerate(block.sources):
            readers = list(dict.fromkeys(reader.node for reader in block.readers if reader.source == source))
            missing = [name for name in (source.node, *readers) if name not in nodes]
            if missing:
                raise ArtifactError(f"block {block.name} belongs to another model: the graph has no node {missing[0]}")
            path = f"{label}_{number}_{index}"
            module = make(block, index)
            graph_module.add_submodule(path, module)
            before = latest.get((source.node, source.axis), nodes[source.node])
            with graph_module.graph.inserting_before(min(nodes[name] for name in readers)):
                further = (nodes[beside[source]],) if beside and source in beside else ()
                call = graph_module.graph.call_module(path, (before, *further))
            for name in readers:
                nodes[name].replace_input_with(before, call)
            latest[source.node, source.axis] = call
            inserted.append((block, index, module))
    finish(graph_module)
    return inserted


def divided_by(blocks: Iterable[Block]) -> dict[ValueAxis, str]:
    """Return source -> the node that tells which of its rows belong to which expert, for the stacks among the blocks."""
    routed = ((source, block.routing(source)) for block in blocks for source in block.sources)
    return {source: routing.by for source, routing in routed if routing is not None and routing.by}


def require_sizes(graph_module: fx.GraphModule, captured: Captured) -> None:
    """Insert checks that raise AssertionError if an input has another size than the one that the graph has fixed.

    Tensors inside a tuple, list or dictionary are not checked if the graph takes the container as one argument.
    """
    if not captured.fixed:
        return
    marked = Inputs(*captured.inputs.by_place(lambda leaf, place: leaf if place is None else _Place(place)))
    inputs = graph_module.graph.find_nodes(op="placeholder")
    nodes = {
        value.place: node
        for node, value in zip(inputs, graph_arguments(captured.graph_module, marked), strict=True)
        if isinstance(value, _Place)
    }
    graph = graph_module.graph
    for fixed in captured.fixed:
        if fixed.place in nodes:
            message = (
                f"this graph only accepts the size at which it was captured: {fixed}. {fixed.where}{_CAPTURE_ANOTHER}"
            )
            with graph.inserting_before(inputs[-1].next):
                size = graph.call_method("size", (nodes[fixed.place], fixed.axis))
                same = graph.call_function(operator.eq, (size, fixed.size))
                required = graph.call_function(torch._assert, (same, message))
            size.meta["val"], same.meta["val"], required.meta["val"] = fixed.size, True, None


def insert_behind(
    graph_module: fx.GraphModule, layers: Iterable[Consumer], make: Callable[[Consumer], nn.Module], label: str
) -> None:
    """Insert a module behind each layer, in place. It gets the layer's output and input, and all users read its output.

    The input includes what was inserted before, so substitutions must be inserted first, and then layers in graph
    order.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes if "val" in node.meta}
    for number, layer in enumerate(layers):
        missing = [name for name in (layer.node, layer.source.node) if name not in nodes]
        if missing:
            raise ArtifactError(f"layer {layer.weight} belongs to another model: the graph has no node {missing[0]}")
        path = f"{label}_{number}"
        graph_module.add_submodule(path, make(layer))
        node = nodes[layer.node]
        operand = next(n for n in node.all_input_nodes if _behind_insertions(n, nodes) is nodes[layer.source.node])
        with graph_module.graph.inserting_after(node):
            call = graph_module.graph.call_module(path, (node, operand))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    finish(graph_module)


def _behind_insertions(node: fx.Node, nodes: Mapping[str, fx.Node]) -> fx.Node:
    """Return the captured graph's own node in front of any inserted calls."""
    while node.name not in nodes:
        node = node.all_input_nodes[0]
    return node


def finish(graph_module: fx.GraphModule) -> None:
    """End an edit: check the graph and regenerate its code."""
    graph_module.graph.lint()
    graph_module.recompile()
