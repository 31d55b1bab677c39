"""Forward passes with torch.compile. The graph is compiled in pieces, from one observer to the next.

An observer reads values and keeps state, which torch.compile cannot handle. So the graph is cut at the observers: every
piece between two of them is compiled by itself, and the observers are called as usual. A value that one piece passes to
another is freed after its last use. The prepared graph is not changed: the pieces are copies of its nodes, and share
its modules.
"""

from __future__ import annotations

import copy
import functools
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from vbpfx.analysis.mutation import read_after_mutation
from vbpfx.calibration.observer import Observer
from vbpfx.calibration.passes import Forward, run_forward
from vbpfx.data.inputs import Inputs, model_device
from vbpfx.display.quiet import quiet_logging
from vbpfx.errors import CalibrationError, first_line
from vbpfx.graph.fake import graph_arguments

# Whether to compile, or a mapping of arguments for torch.compile.
Compile = bool | Mapping[str, Any]
# torch.compile's ``dynamic`` -> the number of compiled shapes after which its code works for any shape.
_SHAPES_TO_OPEN = {True: 1, None: 2, False: math.inf}
# Longest reason in characters. For an unknown option Inductor's message lists all of its options.
_LONGEST_REASON = 300


def forward_passes(observed: fx.GraphModule, compile: Compile) -> Forward:
    """Return the work that runs forward passes through a prepared graph, for its observers.

    Args:
        compile: see :func:`vbpfx.calibrate`.

    Raises:
        CalibrationError: torch.compile does not accept these options, or the graph cannot be cut into pieces.
    """
    if not isinstance(compile, (bool, Mapping)):
        raise CalibrationError(
            f"compile={compile!r}: expected True, False, or a mapping of torch.compile's arguments such as {{'mode': 'reduce-overhead'}}"
        )
    if compile is False:
        return Forward(functools.partial(run_forward, observed))
    return CompiledForward(observed, {} if compile is True else compile)


def compiling(compile: Compile) -> dict[str, str | None]:
    """Return the setting for a checkpoint, since compiled passes give statistics that differ in their last digits."""
    if isinstance(compile, Mapping):
        named = {name: getattr(value, "__qualname__", value) for name, value in sorted(compile.items())}
        return {"compile": str(named)}
    return {"compile": "True" if compile else None}


class CompiledForward(Forward):
    """Forward passes that are compiled when the shapes of a batch occur for the second time.

    Shapes that occur once run without compilation: a smaller last batch is not worth it, and a batch that does not fit
    the model then raises the model's own error. Which batches run compiled depends on the batches alone, including
    those that a checkpoint covers.

    Args:
        observed: a prepared graph.
        options: arguments of torch.compile. ``fullgraph=True`` is the default, so that it is an error if some code
            cannot be compiled.

    Raises:
        CalibrationError: torch.compile does not accept the options, or the graph cannot be cut into pieces.
    """

    def __init__(self, observed: fx.GraphModule, options: Mapping[str, Any]) -> None:
        super().__init__(functools.partial(run_forward, observed))
        self.observed = observed
        self.pieces = _compiled_pieces(observed, {"fullgraph": True} | dict(options))
        self.to_open = _SHAPES_TO_OPEN.get(options.get("dynamic"), 1)
        self.once: set[Any] = set()
        self.compiled: set[Any] = set()

    def run(self, batch: Inputs, start: int) -> None:
        """Run one batch."""
        if not self._is_compiled(batch):
            self.forward(batch)
            return
        if model_device(self.observed).type == "cuda":
            # all pieces of a pass are one step: CUDA graphs keep the memory of its values until the next step begins
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        own = batch.map(torch.clone)
        with torch.inference_mode(), quiet_logging():
            self.pieces(*graph_arguments(self.observed, own))

    def run_before(self, batch: Inputs, start: int) -> None:
        """Count the shapes of a batch that was run before."""
        self._is_compiled(batch)

    def _is_compiled(self, batch: Inputs) -> bool:
        """Count the batch's shapes, and return whether it runs compiled."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in batch.tensors)
        if shapes in self.once and len(self.compiled) < self.to_open:
            self.compiled.add(shapes)
        self.once.add(shapes)
        return shapes in self.compiled or len(self.compiled) >= self.to_open


class _Piece(nn.Module):
    """A compiled piece of the graph. If compilation fails, its error names the place in the network."""

    def __init__(self, piece: nn.Module, place: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.piece, self.place = piece, place
        try:
            self.compiled = torch.compile(piece, **options)
        except Exception as error:  # unknown options raise RuntimeError, KeyError, TypeError
            raise CalibrationError(f"torch.compile does not take compile={dict(options)}: {_reason(error)}") from error

    def forward(self, *values: Any) -> Any:
        """Return the piece's outputs."""
        try:
            return self.compiled(*values)
        except Exception as error:
            self.piece(*values)  # if the values are to blame, the operators themselves raise the better error here
            raise CalibrationError(
                f"torch.compile cannot take the network {self.place}: {_reason(error)}; leave compile out"
            ) from error


def _compiled_pieces(observed: fx.GraphModule, options: Mapping[str, Any]) -> fx.GraphModule:
    """Return a copy of the prepared graph with everything between its observers compiled. It returns nothing."""
    from torch.fx.passes.split_module import split_module  # imported here because it imports sympy

    whole = fx.GraphModule(observed, copy.deepcopy(observed.graph))
    (output,) = whole.graph.find_nodes(op="output")
    output.args = (None,)
    piece_of: dict[fx.Node, int] = {}
    names: list[str] = []
    for node in whole.graph.nodes:
        observer = whole.get_submodule(str(node.target)) if node.op == "call_module" else None
        piece_of[node] = 2 * len(names)
        if isinstance(observer, Observer):
            piece_of[node] += 1
            names.append(observer.name)
    _refuse_shared_memory(whole, piece_of)
    pieces = split_module(whole, whole, piece_of.__getitem__, keep_original_order=True)
    parts = dict(pieces.named_children())
    for number, name in enumerate([*names, None]):
        path = f"submod_{2 * number}"
        if path in parts:
            place = "behind the last block" if name is None else f"before the second layer of block {name}"
            setattr(pieces, path, _Piece(parts[path], place, options))
    return pieces


def _refuse_shared_memory(whole: fx.GraphModule, piece_of: Mapping[fx.Node, int]) -> None:
    """Raise a CalibrationError if a value is changed in place in one piece and read in another.

    A compiled piece may return a copy instead of a view, and the copy would miss the change.
    """
    nodes = {node.name: node for node in whole.graph.nodes}
    for value, change in read_after_mutation(whole).items():
        touching = {piece_of[node] for node in (value, nodes[change], *value.users)}
        if len(touching) > 1 and value.op not in ("placeholder", "get_attr"):
            raise CalibrationError(
                f"the network cannot be compiled in pieces: {value.name} is changed in place by {change} and read again on the other "
                f"side of a block; leave compile out"
            )


def _reason(error: BaseException) -> str:
    """Return the compiler's message in one line; if a backend failed, the backend's own message."""
    return textwrap.shorten(
        first_line(getattr(error, "inner_exception", None) or error), _LONGEST_REASON, placeholder=" ..."
    )
