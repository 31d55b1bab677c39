"""The table of ONNX operators: which function makes the torch calls that compute the same.

The rows are in the files of the operators' kinds. An operator goes by its name, and by ``domain.name`` in other domains than ONNX's
own.
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
    """Return the name by which the table has an operator."""
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


def translation_of(node: ir.Node) -> Translation | None:
    """Return what makes the torch calls for a node; None if the table does not have its operator."""
    return _OPERATORS.get(name_of(node.op_type, node.domain))


def register_onnx_operator(translation: Translation, *op_types: str, domain: str = "") -> None:
    """Add ONNX operators that the table lacks, so that :func:`vbpfx.prune_onnx` narrows what they read and make.

    The file still has to run in ONNX Runtime, so this is for operators that ONNX Runtime knows and vbpfx does not: contributed ones
    (``com.microsoft``), those of ``ai.onnx.ml``, new ones of ONNX. What the call returns is compared with ONNX Runtime when a file is
    read. See ``docs/adding_an_operator.md``.

    Args:
        translation: a function of a :class:`~vbpfx.onnx_graph.builder.Builder`, which gives access to one node of the file: its inputs as
            tensors (``b.tensor(0)``), its attributes (``b.attribute("alpha", 1.0)``), and ``b.emit(function, *arguments)``, which adds a
            call of a torch function to the graph and returns its value. It returns the value of the node, or the tuple of its values.
            :class:`vbpfx.CaptureError` says that this form of the operator is not supported: then nothing around the node is narrowed.
        op_types: the operators' names.
        domain: their domain; by default ONNX's own.

    Raises:
        AnalysisError: no function or no name is given, or the table has the operator already.
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
