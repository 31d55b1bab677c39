"""Placeholders in a graph for layers whose weights are fitted while the graph runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import finish
from vbpfx.plans.records import Consumer
from vbpfx.reconstruction.layer_input import LayerInput


class Fitted(nn.Module):
    """A layer V x + c in the narrowed stream. :meth:`set` gives it V and c once the stream has reached it."""

    def __init__(self, read: LayerInput) -> None:
        super().__init__()
        self.read = read
        self.weight: Tensor | None = None

    def set(self, weight: Tensor, bias: Tensor, channels: Tensor) -> None:
        """Set V (out, n, ...), c (out,), and the indices (n,) of the channels that V reads."""
        self.weight, self.bias, self.channels = weight, bias, channels

    def forward(self, x: Tensor) -> Tensor:
        """Return V x + c."""
        assert self.weight is not None
        return self.read.apply(x, self.weight, self.bias, self.channels)


def with_fitted(captured: Captured, calls: Mapping[Consumer, LayerInput]) -> tuple[fx.GraphModule, dict[str, Fitted]]:
    """Return a copy of the graph in which :class:`Fitted` modules replace layers, and these modules by node name.

    The nodes keep their names.
    """
    graph_module = share_parameters(captured.graph_module)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    places = {}
    for number, (layer, read) in enumerate(calls.items()):
        places[layer.node] = Fitted(read)
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
