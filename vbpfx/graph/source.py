"""Find the line of the model's code that raised an error or made a node."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable

import torch
from torch import fx

_NOT_USER_CODE = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
                  os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)  # fmt: skip
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')


def line_of_node(node: fx.Node) -> str:
    """Return ``file:line: code`` of the code that made a node, or "" if tracing did not record it."""
    return _of_text(str(node.meta.get("stack_trace") or ""))


def line_of_error(error: BaseException) -> str:
    """Return ``file:line: code`` of the innermost line that raised an error and is neither torch's nor ours.

    A graph's interpreter adds the model's lines for the failing node to the message. These are searched first.
    """
    if found := _of_text(str(error)):
        return found
    return _innermost((f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_tb(error.__traceback__))


def line_of_call() -> str:
    """Return ``file:line: code`` of the model's code that is running now."""
    return _innermost((f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_stack())


def line_of_frames(frames: Iterable[traceback.FrameSummary]) -> str:
    """Return ``file:line: code`` of the first frame that is neither torch's nor ours, or "" if there is none."""
    return _innermost(reversed([(f.filename, f.lineno or 0, f.line or "") for f in frames]))


def _of_text(text: str) -> str:
    return _innermost((file, int(line), code.strip()) for file, line, code in _FRAME.findall(text))


def _innermost(frames: Iterable[tuple[str, int, str]]) -> str:
    for file, line, code in reversed(list(frames)):
        if os.path.exists(file) and not file.startswith(_NOT_USER_CODE):
            return f"{file}:{line}: {code}"
    return ""
