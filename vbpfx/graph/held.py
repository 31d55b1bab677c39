"""What a run of a graph holds: the values that are still to be read, counted by the shapes that its nodes know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vbpfx.graph.capture import Captured
from vbpfx.graph.fields import returned_nodes

GIB = 2**30
# Copies that an operator, an observer or the rows of a regression make of the largest value that they read.
_COPIES = 4
# Bytes beside every byte of the output where a narrowed network's is compared with the dense one's, in float64.
_COMPARED = 12


def last_reads(nodes: Sequence[fx.Node]) -> list[int]:
    """Position of the last node that reads each node's value; its own where none does."""
    order = {node: number for number, node in enumerate(nodes)}
    return [max((order[user] for user in node.users), default=number) for number, node in enumerate(nodes)]


def held(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Bytes that a run of the nodes holds at each of them, and behind it: values that are still to be read, weights not counted."""
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
    """Bytes of a node's value; none of a weight."""
    tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    return 0 if node.op == "get_attr" else sum(t.numel() * t.element_size() for t in tensors)


def held_bytes(captured: Captured, names: Iterable[str]) -> int:
    """The most bytes per sample that a run holds when it stands at any of the nodes."""
    nodes, wanted = list(captured.graph_module.graph.nodes), set(names)
    return _a_sample(
        captured, max((at for n, (at, _) in zip(nodes, held(nodes), strict=True) if n.name in wanted), default=0)
    )


def input_bytes(captured: Captured) -> int:
    """Bytes of one sample as it is given."""
    return _a_sample(captured, sum(map(value_bytes, captured.graph_module.graph.find_nodes(op="placeholder"))))


def output_bytes(captured: Captured) -> int:
    """Bytes of what the graph makes of one sample."""
    return _a_sample(captured, sum(map(value_bytes, returned_nodes(captured.graph_module.graph))))


def pass_bytes(captured: Captured, together: Iterable[str] = ()) -> int:
    """The most bytes per sample that a forward pass holds, what looks at its values included.

    Args:
        together: nodes whose values are all held to the end of the pass.
    """
    nodes = list(captured.graph_module.graph.nodes)
    within = max(at for at, _ in held(nodes)) + _COPIES * max(map(value_bytes, nodes))
    kept = sum(value_bytes(captured.nodes[name]) for name in set(together))
    return input_bytes(captured) + max(_a_sample(captured, within + kept), _COMPARED * output_bytes(captured))


def samples_in_a_pass(captured: Captured, memory: float, together: Iterable[str] = ()) -> int:
    """How many samples may run at once in so many GiB, at least one.

    Args:
        together: as for :func:`pass_bytes`.
    """
    return max(1, int(memory * GIB / max(1, pass_bytes(captured, together))))


def _a_sample(captured: Captured, size: int) -> int:
    return size // (captured.batch or captured.inputs.batch_size or 1)
