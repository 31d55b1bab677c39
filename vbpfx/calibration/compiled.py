"""Forward passes that torch.compile has compiled, in pieces from observer to observer.

An observer looks at values and keeps what it found, which no compiler can take: the graph is cut at the observers, every piece in
between is compiled by itself, and the observers are called as ever. What a piece hands on is freed as soon as nobody reads it.
The prepared graph is not touched: the pieces are a copy of its nodes, and share its modules.
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
from vbpfx.errors import CalibrationError, first_line
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.frontends import quiet_logging

# Whether, and with which arguments of torch.compile.
Compile = bool | Mapping[str, Any]
# By torch.compile's ``dynamic``: after so many compiled shapes its code is for any.
_SHAPES_TO_OPEN = {True: 1, None: 2, False: math.inf}
# Characters: Inductor lists all of its options where it does not know one.
_LONGEST_REASON = 300


def forward_passes(observed: fx.GraphModule, compile: Compile) -> Forward:
    """Passes through a prepared graph for its observers.

    Args:
        compile: see :func:`vbpfx.calibrate`.

    Raises:
        CalibrationError: torch.compile does not take these options, or the graph cannot be cut.
    """
    if not isinstance(compile, (bool, Mapping)):
        raise CalibrationError(
            f"compile={compile!r}: expected True, False, or a mapping of torch.compile's arguments such as {{'mode': 'reduce-overhead'}}"
        )
    if compile is False:
        return Forward(functools.partial(run_forward, observed))
    return CompiledForward(observed, {} if compile is True else compile)


def compiling(compile: Compile) -> dict[str, str | None]:
    """What a checkpoint holds of it: statistics of compiled passes differ in their last digits."""
    if isinstance(compile, Mapping):
        named = {name: getattr(value, "__qualname__", value) for name, value in sorted(compile.items())}
        return {"compile": str(named)}
    return {"compile": "True" if compile else None}


class CompiledForward(Forward):
    """Passes that are compiled for the shapes of a batch when they come for the second time.

    What comes once is run as it is: a last smaller batch is not worth a compilation, and what does not fit the model says so in
    the model's own words. Which batches run compiled follows from the batches alone, those of a checkpoint included.

    Args:
        observed: a prepared graph.
        options: arguments of torch.compile; ``fullgraph=True`` by default, so that what it cannot take is an error.

    Raises:
        CalibrationError: torch.compile does not take the options, or the graph cannot be cut.
    """

    def __init__(self, observed: fx.GraphModule, options: Mapping[str, Any]) -> None:
        super().__init__(functools.partial(run_forward, observed))
        self.observed = observed
        self.pieces = _compiled_pieces(observed, {"fullgraph": True} | dict(options))
        self.to_open = _SHAPES_TO_OPEN.get(options.get("dynamic"), 1)
        self.once: set[Any] = set()
        self.compiled: set[Any] = set()

    def run(self, batch: Inputs, start: int) -> None:
        """One batch."""
        if not self._is_compiled(batch):
            self.forward(batch)
            return
        if model_device(self.observed).type == "cuda":
            # what one piece hands to the next is of one step: CUDA graphs keep its memory until then
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        own = batch.map(torch.clone)
        with torch.inference_mode(), quiet_logging():
            self.pieces(*graph_arguments(self.observed, own))

    def run_before(self, batch: Inputs, start: int) -> None:
        """A batch that was run: its shapes count."""
        self._is_compiled(batch)

    def _is_compiled(self, batch: Inputs) -> bool:
        """Whether a batch runs compiled; takes note of its shapes."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in batch.tensors)
        if shapes in self.once and len(self.compiled) < self.to_open:
            self.compiled.add(shapes)
        self.once.add(shapes)
        return shapes in self.compiled or len(self.compiled) >= self.to_open


class _Piece(nn.Module):
    """A compiled piece that says where it is when the compiler gives up."""

    def __init__(self, piece: nn.Module, place: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.piece, self.place = piece, place
        try:
            self.compiled = torch.compile(piece, **options)
        except Exception as error:  # unknown options raise RuntimeError, KeyError, TypeError
            raise CalibrationError(f"torch.compile does not take compile={dict(options)}: {_reason(error)}") from error

    def forward(self, *values: Any) -> Any:
        """The piece's values."""
        try:
            return self.compiled(*values)
        except Exception as error:
            self.piece(*values)  # where the values are at fault, the operators say so themselves
            raise CalibrationError(
                f"torch.compile cannot take the network {self.place}: {_reason(error)}; leave compile out"
            ) from error


def _compiled_pieces(observed: fx.GraphModule, options: Mapping[str, Any]) -> fx.GraphModule:
    """The prepared graph's calls, with everything between its observers compiled; it returns nothing."""
    from torch.fx.passes.split_module import split_module  # takes sympy along

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
    """Raise where a value is changed in place in one piece and read in another: a piece may hand on a view as a copy."""
    nodes = {node.name: node for node in whole.graph.nodes}
    for value, change in read_after_mutation(whole).items():
        touching = {piece_of[node] for node in (value, nodes[change], *value.users)}
        if len(touching) > 1 and value.op not in ("placeholder", "get_attr"):
            raise CalibrationError(
                f"the network cannot be compiled in pieces: {value.name} is changed in place by {change} and read again on the other "
                f"side of a block; leave compile out"
            )


def _reason(error: BaseException) -> str:
    """What the compiler says, in one line: of a backend's failure the backend's own words."""
    return textwrap.shorten(
        first_line(getattr(error, "inner_exception", None) or error), _LONGEST_REASON, placeholder=" ..."
    )
