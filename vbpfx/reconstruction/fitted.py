"""Placeholders in a graph for layers whose weights are fitted while the graph runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import finish
from vbpfx.plans.records import Consumer


class Fitted(nn.Module):
    """A layer V x + c in the narrowed stream. :meth:`set` gives it V and c once the stream has reached it."""

    def __init__(self, layer: Consumer) -> None:
        super().__init__()
        self.axis = layer.source.axis
        self.weight: Tensor | None = None

    def set(self, weight: Tensor, bias: Tensor, columns: Tensor) -> None:
        """Set V (out, in), c (out,), and the indices of the columns where V is not zero."""
        self.weight, self.bias, self.columns = weight[:, columns], bias, columns

    def forward(self, x: Tensor) -> Tensor:
        """Return V x + c."""
        assert self.weight is not None
        if x.shape[self.axis] > len(self.columns):
            x = x.index_select(self.axis, self.columns.to(x.device))
        y = nn.functional.linear(x.movedim(self.axis, -1), self.weight.to(x), self.bias.to(x))
        return y.movedim(-1, self.axis)


def with_fitted(captured: Captured, calls: Sequence[Consumer]) -> tuple[fx.GraphModule, dict[str, Fitted]]:
    """Return a copy of the graph in which :class:`Fitted` modules replace layers, and these modules by node name.

    The nodes keep their names.
    """
    graph_module = share_parameters(captured.graph_module)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    places = {}
    for number, layer in enumerate(calls):
        places[layer.node] = Fitted(layer)
        graph_module.add_submodule(f"fitted_{number}", places[layer.node])
        node = nodes[layer.node]
        node.op, node.target, node.args, node.kwargs = (
            "call_module",
            f"fitted_{number}",
            (nodes[layer.source.node],),
            {},
        )
    finish(graph_module)
    return graph_module, places
