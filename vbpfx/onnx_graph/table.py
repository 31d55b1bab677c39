"""The table of ONNX operators, with the function that translates each one into calls of torch functions.

The rows are in one file for each kind of operator. An operator is listed under its name, or under ``domain.name`` if its domain is
not ONNX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from vbpfx.errors import AnalysisError
from vbpfx.onnx_graph.builder import Builder
from vbpfx.onnx_graph.elementwise import ELEMENTWISE
from vbpfx.onnx_graph.layers import LAYERS
from vbpfx.onnx_graph.reductions import REDUCTIONS
from vbpfx.onnx_graph.resize import RESIZE
from vbpfx.onnx_graph.shapes import SHAPES
from vbpfx.onnx_graph.sizes import READ_SIZES

Translation = Callable[[Builder], Any]

_OPERATORS: dict[str, Translation] = {**ELEMENTWISE, **LAYERS, **SHAPES, **REDUCTIONS, **RESIZE, **READ_SIZES}


def name_of(op_type: str, domain: str) -> str:
    """Return the name under which the table lists an operator."""
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


def translation_of(node: ir.Node) -> Translation | None:
    """Return the function that translates a node into torch calls; None if the table does not have its operator."""
    return _OPERATORS.get(name_of(node.op_type, node.domain))


def register_onnx_operator(translation: Translation, *op_types: str, domain: str = "") -> None:
    """Add ONNX operators to the table, so that :func:`vbpfx.prune_onnx` can narrow the tensors that they read and return.

    The file still has to run in ONNX Runtime, so this is for operators that ONNX Runtime knows and vbpfx does not: contributed
    operators (``com.microsoft``), operators of ``ai.onnx.ml``, new operators of ONNX. When a file is read, the values that the
    translation computes are compared with ONNX Runtime's. See ``docs/adding_an_operator.md``.

    Args:
        translation: a function of a :class:`~vbpfx.onnx_graph.builder.Builder`, which gives access to one node of the file: its inputs as
            tensors (``b.tensor(0)``), its attributes (``b.attribute("alpha", 1.0)``), and ``b.emit(function, *arguments)``, which adds a
            call of a torch function to the graph and returns its value. The translation returns the value of the node, or a tuple
            of its values. It raises :class:`vbpfx.CaptureError` if it does not support this form of the operator; then no tensor
            that the node reads or returns is narrowed.
        op_types: the operators' names.
        domain: the operators' domain; by default ONNX's own.

    Raises:
        AnalysisError: no function or no name is given, or the table already has the operator with another translation.
    """
    if not callable(translation) or not op_types or not all(isinstance(name, str) for name in op_types):
        raise AnalysisError(
            "register_onnx_operator takes a function and the name of at least one operator that it translates"
        )
    names = [name_of(op_type, domain) for op_type in op_types]
    for name in names:
        if _OPERATORS.get(name, translation) is not translation:
            raise AnalysisError(
                f"the table of ONNX operators has {name} already, translated by {getattr(_OPERATORS[name], '__name__', 'another function')}"
            )
    _OPERATORS.update(dict.fromkeys(names, translation))
