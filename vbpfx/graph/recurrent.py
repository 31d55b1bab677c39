"""Keep the recurrent layers nn.RNN, nn.LSTM and nn.GRU as one call each, with shapes and flops from their sizes.

On fake tensors, torch unrolls these layers step by step, which takes far longer than running the layer itself. So
torch.export and runs on fake tensors call a stand-in operator instead.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.graph.tidy import replace_by

_LIBRARY = torch.library.Library("vbpfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "recurrent(Tensor x, Tensor[] state, str path, str kind, int gates, int hidden, int projected, int layers, "
    "int directions, bool batch_first) -> Tensor[]"
)
STAND_IN = torch.ops.vbpfx.recurrent.default
_GATES = {"LSTM": 4, "GRU": 3}


@torch.library.register_fake("vbpfx::recurrent", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _values(
    x: Tensor, state: list[Tensor], path: str, kind: str, gates: int, hidden: int, projected: int, layers: int, directions: int,
    batch_first: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the layer's output and its last states as fake tensors, which have only shapes."""
    out = projected or hidden
    batch = [x.shape[0 if batch_first else 1]] if x.ndim == 3 else []
    sizes = [[*x.shape[:-1], directions * out], [directions * layers, *batch, out]]
    sizes += [[directions * layers, *batch, hidden]] * (kind == "LSTM")
    return [x.new_empty(size) for size in sizes]


def recurrent_flops(
    x: Any, state: Any, path: str, kind: str, gates: int, hidden: int, projected: int, layers: int, directions: int, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Return the flops of a recurrent layer, two for every multiplication.

    In every step, each layer and direction multiplies the weights of its gates with the input and with the previous
    state.

    Args:
        x: the input's shape, as :mod:`torch.utils.flop_counter` passes it. The other arguments are those of the
            stand-in.
    """
    *steps, width = x
    out = projected or hidden
    widths = [width, *[directions * out] * (layers - 1)]
    per_step = directions * sum(gates * hidden * (w + out) + projected * hidden for w in widths)
    return int(2 * torch.Size(steps).numel() * per_step)


def call_stand_in(module: nn.RNNBase, path: str, x: Tensor, state: Any = None) -> Any:
    """Call the stand-in, and return its results in the structure that the layer returns."""
    given = [] if state is None else [state] if isinstance(state, Tensor) else list(state)
    kind = module.mode.partition("_")[0]
    output, *states = STAND_IN(
        x, given, path, kind, _GATES.get(kind, 1), module.hidden_size, module.proj_size, module.num_layers,
        1 + module.bidirectional, module.batch_first,
    )  # fmt: skip
    return output, tuple(states) if len(states) > 1 else states[0]


def run_fake_call(target: Any, args: tuple[Any, ...]) -> list[Tensor] | None:
    """Call the stand-in for one of torch's recurrent operators, and return its results; None for any other operator."""
    if target not in _OPERATORS:
        return None
    x, states, _, _, layers, _, _, bidirectional, batch_first = args
    kind = _OPERATORS[target]
    states = list(states) if kind == "LSTM" else [states]
    hidden, out = states[-1].shape[-1], states[0].shape[-1]
    found: list[Tensor] = STAND_IN(
        x,
        states,
        "",
        kind,
        _GATES.get(kind, 1),
        hidden,
        out if out != hidden else 0,
        layers,
        1 + bidirectional,
        batch_first,
    )
    return found


_OPERATORS = {torch.ops.aten.gru.input: "GRU", torch.ops.aten.lstm.input: "LSTM", torch.ops.aten.rnn_tanh.input: "RNN",
              torch.ops.aten.rnn_relu.input: "RNN"}  # fmt: skip


@contextmanager
def recurrent_as_leaves(model: nn.Module) -> Iterator[None]:
    """A context in which the model's recurrent layers call the stand-in. Packed sequences are computed as usual."""
    changed = []
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and "forward" not in vars(module) and type(module).forward in _FORWARDS:
            module.forward = _forward(module, path)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


_FORWARDS = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


def _forward(module: nn.RNNBase, path: str) -> Any:
    own = module.forward

    def forward(input: Any, hx: Any = None) -> Any:
        return call_stand_in(module, path, input, hx) if isinstance(input, Tensor) else own(input, hx)

    return forward


def restore_recurrent(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Replace the stand-in calls of a graph, in place, by calls of the model's own recurrent layers."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=STAND_IN):
        x, state, path = node.args[:3]
        layer = model.get_submodule(path)
        holder, _, name = path.rpartition(".")
        setattr(graph_module.get_submodule(holder), name, layer)
        given = (tuple(state) if layer.mode == "LSTM" else state[0],) if state else ()
        with graph.inserting_before(node):
            call = graph.call_module(path, (x, *given))
            call.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            parts = [graph.call_function(operator.getitem, (call, index)) for index in (0, 1)]
            if layer.mode == "LSTM":
                parts += [graph.call_function(operator.getitem, (parts[1], index)) for index in (0, 1)]
        for user in list(node.users):
            replace_by(user, parts[user.args[1] if layer.mode != "LSTM" or not user.args[1] else user.args[1] + 1])
        graph.erase_node(node)
        for part in reversed(parts):
            if not part.users:
                graph.erase_node(part)
