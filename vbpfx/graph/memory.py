"""Count the memory that a run of a graph holds: the values that are still to be read, by the shapes of the nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.graph.capture import Captured
from vbpfx.graph.fields import returned_nodes

GIB = 2**30
# How many copies of the largest value an operator, an observer or the rows of a regression may make.
_COPIES = 4
# Additional bytes per byte of the output, for comparing the outputs of the narrowed and the dense network in float64.
_COMPARED = 12


def last_reads(nodes: Sequence[fx.Node]) -> list[int]:
    """Return, for each node, the position of the last node that reads its value, or its own if none does."""
    order = {node: number for number, node in enumerate(nodes)}
    return [max((order[user] for user in node.users), default=number) for number, node in enumerate(nodes)]


def live_bytes(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Return, for each node, the bytes that a run holds while the node runs, and after it.

    Values that are still to be read are counted, weights are not.
    """
    ends: dict[int, int] = defaultdict(int)
    live, found = 0, []
    for number, (node, last) in enumerate(zip(nodes, last_reads(nodes), strict=True)):
        size = value_bytes(node)
        live += size
        ends[last] += size
        found.append((live, live - ends[number]))
        live -= ends[number]
    return found


def value_bytes(node: fx.Node) -> int:
    """Return the bytes of a node's value, 0 for a weight."""
    tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    return 0 if node.op == "get_attr" else sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(captured: Captured, names: Iterable[str]) -> int:
    """Return the most bytes per sample that a run holds while any of the named nodes runs."""
    nodes, wanted = list(captured.graph_module.graph.nodes), set(names)
    return _a_sample(
        captured, max((at for n, (at, _) in zip(nodes, live_bytes(nodes), strict=True) if n.name in wanted), default=0)
    )


def input_bytes(captured: Captured) -> int:
    """Return the bytes of one sample of the inputs."""
    return _a_sample(captured, sum(map(value_bytes, captured.graph_module.graph.find_nodes(op="placeholder"))))


def output_bytes(captured: Captured) -> int:
    """Return the bytes of the graph's outputs for one sample."""
    return _a_sample(captured, sum(map(value_bytes, returned_nodes(captured.graph_module.graph))))


def pass_bytes(captured: Captured, together: Iterable[str] = ()) -> int:
    """Return the most bytes per sample that a forward pass holds, including copies made by observers and comparisons.

    Args:
        together: nodes whose values are all held until the end of the pass.
    """
    nodes = list(captured.graph_module.graph.nodes)
    within = max(at for at, _ in live_bytes(nodes)) + _COPIES * max(map(value_bytes, nodes))
    kept = sum(value_bytes(captured.nodes[name]) for name in set(together))
    return input_bytes(captured) + max(_a_sample(captured, within + kept), _COMPARED * output_bytes(captured))


def samples_in_a_pass(captured: Captured, memory: float, together: Iterable[str] = ()) -> int:
    """Return how many samples may run at once in ``memory`` GiB, at least one.

    Args:
        together: as for :func:`pass_bytes`.
    """
    return max(1, int(memory * GIB / max(1, pass_bytes(captured, together))))


def _a_sample(captured: Captured, size: int) -> int:
    return size // (captured.batch or captured.inputs.batch_size or 1)
