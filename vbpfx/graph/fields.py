"""Graphs that return ``Fields``: which nodes make them, and a tracer that knows them.

Networks that earlier versions pickled look for :class:`~vbpfx.outputs.fields.Fields` in this module, so it can be
imported from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from vbpfx.outputs.fields import Fields


class FieldsTracer(fx.Tracer):
    """fx's tracer for graphs that return :class:`Fields`. When such a graph is unpickled, it is traced again."""

    def create_arg(self, a: Any) -> Any:
        """Turn :class:`Fields` into a call of the class, as fx does for dataclasses, and all else as fx does."""
        if not isinstance(a, Fields):
            return super().create_arg(a)
        return self.create_node("call_function", Fields, (), {name: self.create_arg(v) for name, v in vars(a).items()})


def tracer_of(spec: pytree.TreeSpec) -> type[fx.Tracer]:
    """Return the tracer that can trace a graph's code again, given the structure of its result."""
    result = pytree.tree_unflatten(range(spec.num_leaves), spec)
    found = pytree.tree_leaves(result, is_leaf=lambda value: isinstance(value, Fields))
    return FieldsTracer if any(isinstance(leaf, Fields) for leaf in found) else fx.Tracer


def returned_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values a graph returns, in order; for a node that makes a record, its arguments."""
    (output,) = graph.find_nodes(op="output")
    found: list[fx.Node] = []

    def collect(value: Any) -> None:
        for node in pytree.tree_leaves(value):
            if not isinstance(node, fx.Node):
                continue
            if node.op == "call_function" and makes_record(node.target):
                collect((node.args, node.kwargs))
            else:
                found.append(node)

    collect(output.args)
    return found


def makes_record(target: Any) -> bool:
    """Return whether a call's target is a dataclass, a named tuple, or :class:`Fields`."""
    return isinstance(target, type) and (
        target is Fields
        or dataclasses.is_dataclass(target)
        or (issubclass(target, tuple) and hasattr(target, "_fields"))
    )
